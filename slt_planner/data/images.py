"""What all datasets are, images and labels in memory, and how coded images become such tensors."""

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = tuple[int, int, int]

_IMAGES_AT_ONCE = 4096  # in numbers wider than a byte
_PIL_MODES = {1: "L", 3: "RGB"}  # by channels of the model's input


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images for training and for testing, all in memory.

    Images are contiguous uint8 tensors (N, C, H, W). Labels are classes 0..num_classes-1: one an image, int64
    tensors (N,); or one a pixel, contiguous uint8 tensors (N, H, W), where 255 marks pixels that do not count
    and no image is without one that does. (Losses want int64: convert a batch at a time, all at once they would
    take eight times the memory.) `mean` and `std` are of the train images, a number a channel, pixels in 0..1;
    a channel that never changes has std 1. `title` names the data to people. `augment` says whether random
    crops and flips of the images alone make sense (a flipped digit is no digit, and the labels of pixels would
    stay where they were). `train_groups`, int64 (N,), says which train images belong together, numbered from 0, such
    as by who wrote them; None where nobody knows.
    """

    title: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    train_groups: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of train or of test, as a `Dataset` has them."""

    images: Tensor
    labels: Tensor


def make_dataset(
    title: str, train: Split, test: Split, num_classes: int, augment: bool, train_groups: Tensor | None = None
) -> Dataset:
    """A data set of two splits, with the statistics of its train images."""
    mean, std = channel_statistics(train.images)
    return Dataset(
        title=title,
        train_images=train.images,
        train_labels=train.labels,
        test_images=test.images,
        test_labels=test.labels,
        num_classes=num_classes,
        mean=mean,
        std=std,
        augment=augment,
        train_groups=train_groups,
    )


def check_classes(name: str, classes: int, num_classes: int) -> None:
    """Refuse models that tell fewer classes apart than a data set has."""
    if num_classes < classes:
        raise InputError(f"dataset {name} has {classes} classes, the model {num_classes}; give it at least {classes}")


def check_size(where: str, size: tuple[int, int], input_shape: Shape) -> None:
    """Refuse images of another size (height, width) than the model's."""
    channels, height, width = input_shape
    if size != (height, width):
        raise InputError(
            f"{where}: the images are {size[0]}x{size[1]} (height x width), the model takes {height}x{width}; "
            f"plan it with --input-shape {channels},{size[0]},{size[1]}"
        )


def to_labels(values: NDArray[Any], where: str, num_classes: int, first: int = 0) -> Tensor:
    """Class numbers of a file, (N,), as labels: int64, counted from 0; `first` is the file's number of class 0.

    Raises:
        InputError: numbers that are not whole, or out of range; the message names the first by its place.
    """
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(f"{where}: labels are {values.dtype} of shape {values.shape}; they must be integers (N,)")
    wrong = np.flatnonzero((values < first) | (values >= first + num_classes))
    if len(wrong):
        raise InputError(
            f"{where}, row {wrong[0]}: label {values[wrong[0]]} is out of range; the model has {num_classes} "
            f"classes, so labels must be {first}..{first + num_classes - 1}"
        )
    return torch.from_numpy(values.astype(np.int64) - first)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Images, uint8 (N, 1 or 3, H, W), with 1 or 3 channels: grey repeated, colour weighed as Pillow does (ITU-R 601).

    The result is contiguous.
    """
    if images.shape[1] == channels:
        return images.contiguous()
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    grey = torch.empty((len(images), 1, *images.shape[2:]), dtype=torch.uint8)
    for some, out in zip(images.split(_IMAGES_AT_ONCE), grey.split(_IMAGES_AT_ONCE), strict=True):
        red, green, blue = some.to(torch.int32).unbind(1)
        out[:, 0] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def check_channels(name: str, channels: int) -> None:
    """Refuse models whose number of channels coded images cannot be converted to."""
    if channels not in _PIL_MODES:
        raise InputError(f"dataset {name}: its images are read with 1 or 3 channels; the model takes {channels}")


def decode_image(coded: bytes, where: str, input_shape: Shape) -> NDArray[np.uint8]:
    """An image's pixels, (C, H, W), converted to that many channels; `where` names it in messages."""
    channels, height, width = input_shape
    values = _decode(coded, where, "image", "JPEG or PNG", (height, width), _PIL_MODES[channels])
    return values.reshape(height, width, channels).transpose(2, 0, 1)


def decode_mask(coded: bytes, where: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask's numbers, (H, W), as they stand in a PNG file: what colours a palette gives them is not looked at."""
    _check_mask_coding(coded, where)
    return _decode(coded, where, "mask", "PNG", size, None)


def _check_mask_coding(coded: bytes, where: str) -> None:
    # Read from the file's own header: the decoder would scale greyscale of 2 and 4 bits up to 0..255.
    right = "masks are 8-bit greyscale or palette PNG files, a class number a pixel"
    if len(coded) < 26 or coded[:8] != b"\x89PNG\r\n\x1a\n" or coded[12:16] != b"IHDR":
        raise InputError(f"{where}: not a PNG file, or damaged; {right}")
    depth, colours = coded[24], coded[25]
    if colours == 3 or (colours, depth) == (0, 8):  # numbers of a palette can be stored in fewer than 8 bits
        return
    names = {0: "greyscale", 2: "RGB", 4: "greyscale with alpha", 6: "RGBA"}
    raise InputError(f"{where}: the mask is {depth}-bit {names.get(colours, 'of unknown coding')}; {right}")


def _decode(
    coded: bytes, where: str, what: str, formats: str, size: tuple[int, int], mode: str | None
) -> NDArray[np.uint8]:
    """Pixels of an image that must have this size (height, width), converted to Pillow's `mode` if one is given."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(coded)) as image:
            found = image.height, image.width
            # The size is known before decoding: nothing large is decoded only to be refused.
            values = np.asarray(_of_8_bits(image, where).convert(mode) if mode else image) if found == size else None
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more for damaged bytes
        raise InputError(f"{where}: the {what} cannot be decoded; give whole {formats} files") from error
    if values is None:
        raise InputError(
            f"{where}: the {what} is {found[0]}x{found[1]} (height x width), the model takes {size[0]}x{size[1]}; "
            f"resize the {what}s, or use a model planned for their size"
        )
    return values


def _of_8_bits(image: "Image", where: str) -> "Image":
    """An image as it is, but grey of 16 bits by its upper 8: Pillow would cut off all that is above 255."""
    from PIL.Image import fromarray

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # by version of Pillow
        return fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{where}: its pixels are of 32 bits, on no known scale; give images of 8 or 16 bits")
    return image


def image_format(coded: bytes) -> str:
    """How an image that is known to be readable is coded, such as JPEG."""
    from PIL import Image

    with Image.open(io.BytesIO(coded)) as image:
        return str(image.format)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in 0..1, from how often each value occurs."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.int64)
        for piece in images[:, channel].split(_IMAGES_AT_ONCE):
            counts += torch.bincount(piece.flatten(), minlength=256)
        shares = counts.double() / counts.sum()
        mean = (shares * values).sum()
        variance = (shares * (values - mean) ** 2).sum().item()
        means.append(mean.item())
        # A constant channel has a deviation of 0 or a rounding error: dividing by it would ruin the images.
        deviations.append(math.sqrt(variance) if variance > 1e-12 else 1.0)
    return tuple(means), tuple(deviations)
