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
    count, channels, height, width = images.shape
    tops, lefts, flips = (draws.to(images.device)[:, None] for draws in (tops, lefts, flips))
    padded = F.pad(images, (padding, padding, padding, padding))
    across = torch.arange(width, device=images.device)
    rows = tops + torch.arange(height, device=images.device)
    columns = lefts + torch.where(flips, across.flip(0), across)
    places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # of a crop's pixels in its padded image
    places = places.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(images.shape)
