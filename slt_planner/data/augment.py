"""Random crops and flips, a whole batch at once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Crop each image at random from its zero-padded self, and flip it left to right half of the time.

    `images` is (N, C, H, W), uint8 or float; the result is a new contiguous tensor of the same shape and
    type. The same state of `generator` gives the same result. The padding is zero in the values given: for
    uint8 images, not yet normalised, that is black pixels.
    """
    count = len(images)
    tops, lefts = torch.randint(2 * padding + 1, (2, count), generator=generator, device=generator.device)
    flips = torch.randint(2, (count,), generator=generator, device=generator.device).bool()
    return crop_flip(images, tops, lefts, flips, padding)


def crop_flip(images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop and flip with given draws: `random_crop_flip` without the chance.

    `images` is (N, C, H, W); `tops` and `lefts`, int64 of (N,), place the crop's first row and column in the
    image zero-padded by `padding` on all sides (0..2*padding; `padding` itself leaves the image in place);
    `flips`, bool of (N,), says which crops are then flipped left to right. The result is contiguous.
    """
    count, _, height, width = images.shape
    tops, lefts, flips = (draws.to(images.device) for draws in (tops, lefts, flips))
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, top, left, H, W): a view, nothing is copied
    crops = windows[torch.arange(count, device=images.device), :, tops, lefts]
    return torch.where(flips[:, None, None, None], crops.flip(3), crops).contiguous()
