"""Data sets by name; each layout on disk has a file of its own beside this one."""

import difflib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs
import torch
import torch.nn.functional as F
from torch import Tensor

from slt_planner.data.from_torchvision import NAMES, load_from_torchvision
from slt_planner.data.imagefolder import load_imagefolder, load_tiny_imagenet
from slt_planner.data.imagenet64 import load_imagenet64
from slt_planner.data.images import Dataset, Shape, Split, check_classes, make_dataset
from slt_planner.data.leaf import load_femnist
from slt_planner.data.masks import load_masks
from slt_planner.data.parquet import load_parquet
from slt_planner.errors import InputError

_DIGITS_TRAIN_FRACTION = 0.8
_OF_FOLDERS: dict[str, Callable[[Path, Shape, int], Dataset]] = {
    "parquet": load_parquet,
    "imagefolder": load_imagefolder,
    "masks": load_masks,
    "femnist": load_femnist,
    "tiny-imagenet": load_tiny_imagenet,
    "imagenet64": load_imagenet64,
}


def load_dataset(
    name: str, input_shape: Shape, num_classes: int, *, root: Path | None = None, download: bool = False
) -> Dataset:
    """Load a dataset for a model that takes images of `input_shape` (C, H, W) and tells `num_classes` apart.

    Images are decoded once and kept as uint8. They must have the size that the model takes (``digits`` alone is
    resized); they are converted to its 1 or 3 channels. The model may have more classes than the data.

    ``digits``: 1,797 images of 8x8, one channel, brought to the input shape; shuffled with a fixed seed, 80 %
    train.

    ``cifar10``, ``cifar100``, ``fashion-mnist``, ``svhn``, ``emnist`` (the split balanced) or ``emnist:SPLIT``
    (byclass, bymerge, letters, digits, mnist): the files that torchvision keeps in the folder `root`, by default
    `default_root`. With `download`, those that are not there are fetched into it.

    ``parquet:DIR``: the layout of Hugging Face datasets. DIR holds train*.parquet and test*.parquet (or,
    where there is no test, valid*.parquet), whole or in shards (train-00000-of-00002.parquet). A row is an
    image: column ``img`` or ``image``, a struct with the coded image in ``bytes``, and column ``label``,
    ``labels``, ``fine_label`` or ``character``, an integer. A column ``writer_id``, ``client_id`` or ``user_id``,
    numbers or strings, says whose it is.

    ``imagefolder:DIR``: DIR holds the folders train and test (or, where there is no test, val or valid), each with a
    folder of image files for every class. Classes are numbered in the order of their names in train.

    ``masks:DIR``: the class of every pixel. DIR holds the folders train and test (or, where there is no test,
    val or valid), each with the folders images and masks. images holds .png, .jpg or .jpeg files; masks holds a .png
    file of the same stem for each, 8-bit greyscale or palette, whose numbers are the classes, 255 for pixels that do
    not count.

    ``femnist:DIR``: FEMNIST as LEAF writes it. DIR holds the folders train and test with .json files: `users`,
    `num_samples` and `user_data`, in which each user has images ``x``, 784 numbers in 0..1 each, and classes ``y``.

    ``tiny-imagenet:DIR``: the folder that tiny-imagenet-200.zip unpacks: wnids.txt, train/WNID/images, and val with
    images and val_annotations.txt. Classes are numbered in the order of their names.

    ``imagenet64:DIR``: the downsampled ImageNet in NumPy files: train_data_batch_1.npz and so on, and val_data.npz,
    with ``data``, uint8, a row of 3 x H x W pixels an image, and ``labels`` from 1. H and W are the model's.

    Hidden files, and files with other suffixes, are not looked at.

    Raises:
        InputError: an unknown name; a folder, files or columns that are missing, unreadable or empty; an
            image that cannot be decoded or has another size; a label that is missing or out of range; a download
            that fails. The message names the file, and the row or pixel, counted from 0.
    """
    kind, colon, rest = name.partition(":")
    if kind in NAMES and (not colon or (kind == "emnist" and rest)):
        return load_from_torchvision(
            kind, rest, input_shape, num_classes, (root or default_root()).expanduser(), download
        )
    if download and (name == "digits" or kind in _OF_FOLDERS):
        raise InputError(f"dataset {name!r} is not for --download; {', '.join(NAMES)} are")
    if name == "digits":
        return _load_digits(input_shape, num_classes)
    if kind in _OF_FOLDERS and rest:
        return _OF_FOLDERS[kind](Path(rest).expanduser(), input_shape, num_classes)
    raise InputError(_unknown(name))


def default_root() -> Path:
    """Where torchvision's data sets are looked for and downloaded to: the user's data folder of the platform."""
    return Path(platformdirs.user_data_dir("slt_planner")) / "datasets"


def normalise(images: Tensor, dataset: Dataset) -> Tensor:
    """What a model takes: (images / 255 - mean) / std by channel, float32, of uint8 `images` (N, C, H, W)."""
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32).to(images.device, non_blocking=True)[:, None, None]
        for numbers in (dataset.mean, dataset.std)
    )
    return (images.to(torch.float32) / 255).sub_(mean).div_(std)


def _unknown(name: str) -> str:
    """What is wrong with a name, and what was perhaps meant."""
    known = {kind: kind for kind in ("digits", *NAMES)} | {kind: f"{kind}:DIR" for kind in _OF_FOLDERS}
    spelled = {kind.replace("-", ""): shown for kind, shown in known.items()}
    asked = name.partition(":")[0].lower().replace("-", "").replace("_", "")
    close = difflib.get_close_matches(asked, spelled, n=1, cutoff=0.8)
    meant = f" (did you mean {spelled[close[0]]}?)" if close else ""
    return f"unknown dataset {name!r}{meant}; known are {', '.join(known.values())} (DIR a folder)"


def _load_digits(input_shape: Shape, num_classes: int) -> Dataset:
    from sklearn.datasets import load_digits

    check_classes("digits", 10, num_classes)
    digits = load_digits()
    channels, height, width = input_shape
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # its values are 0..16
    size = f"{height}x{width}"
    resized = F.interpolate(grey, size=(height, width), mode="bilinear", align_corners=False)
    images = resized.round().to(torch.uint8).repeat(1, channels, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, test = order.tensor_split([int(_DIGITS_TRAIN_FRACTION * len(labels))])
    return make_dataset(
        f"handwritten digits (scikit-learn, {len(labels):,} images of 8x8, resized to {size})",
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        num_classes,
        augment=False,
    )
