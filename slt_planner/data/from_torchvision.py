"""Data sets that torchvision reads, and fetches on request: CIFAR, Fashion-MNIST, EMNIST and SVHN."""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slt_planner.data.folders import in_one_line
from slt_planner.data.images import (
    Dataset,
    Shape,
    Split,
    check_channels,
    check_classes,
    check_size,
    make_dataset,
    to_channels,
    to_labels,
)
from slt_planner.errors import InputError

NAMES = ("cifar10", "cifar100", "fashion-mnist", "emnist", "svhn")
EMNIST_SPLITS = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 26, "mnist": 10}  # classes


@dataclass(frozen=True)
class _Source:
    """What is known of a data set before it is read.

    `files` are its files below the root, each with its MD5 sum where torchvision checks one; `read(train, download)`
    gives images, uint8 (N, C, H, W), and labels (N,) from 0.
    """

    title: str
    side: int
    classes: int
    augment: bool
    files: Mapping[Path, str | None]
    read: Callable[[bool, bool], tuple[Tensor, Tensor]]


def load_from_torchvision(
    name: str, split: str, input_shape: Shape, num_classes: int, root: Path, download: bool
) -> Dataset:
    """Load one of `NAMES` (of EMNIST a `split`) from the folder `root`, see `load_dataset`."""
    given = f"{name}:{split}" if split else name
    check_channels(given, input_shape[0])
    source = _source(name, split, root)
    check_size(f"dataset {given}", (source.side, source.side), input_shape)
    check_classes(given, source.classes, num_classes)
    missing = _missing(source, root)
    if missing and not download:
        raise InputError(
            f"dataset {given}: no {missing} in {root}; name the folder that has it with --data-root, or fetch it with "
            "--download"
        )
    train, test = (_read(given, source, train, input_shape, root, download) for train in (True, False))
    return make_dataset(source.title, train, test, num_classes, source.augment)


def _missing(source: _Source, root: Path) -> Path | None:
    return next((path for path in source.files if not (root / path).is_file()), None)


def _read(name: str, source: _Source, train: bool, input_shape: Shape, root: Path, download: bool) -> Split:
    what = f"dataset {name}: the {'train' if train else 'test'} files in {root}"
    again = "remove them and fetch them again with --download"
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            images, labels = source.read(train, download)
    except Exception as error:  # loaders and downloads raise nearly everything: OSError, RuntimeError, AssertionError
        if missing := _missing(source, root):
            reason = in_one_line(error)
            raise InputError(f"dataset {name}: {missing} could not be fetched into {root} ({reason})") from error
        if isinstance(error, OSError) and error.filename:
            raise InputError(f"dataset {name}: {error.filename} cannot be read ({error.strerror})") from error
        if wrong := _wrong(source, root):
            raise InputError(
                f"dataset {name}: {root / wrong} is damaged (not the MD5 sum it should have); {again}"
            ) from error
        raise InputError(f"{what} cannot be read, at least one is damaged; {again}") from error
    side = source.side
    if images.dtype != torch.uint8 or images.shape[2:] != (side, side) or not 0 < len(images) == len(labels):
        raise InputError(
            f"{what} hold {images.dtype} images of shape {tuple(images.shape)} and {len(labels)} labels; it must be "
            f"as many of both, of {side}x{side} pixels; {again}"
        )
    return Split(to_channels(images, input_shape[0]), to_labels(labels.numpy(), what, source.classes))


def _wrong(source: _Source, root: Path) -> Path | None:
    """The first file that has not the sum it should have."""
    from torchvision.datasets.utils import check_integrity

    return next((path for path, md5 in source.files.items() if md5 and not check_integrity(root / path, md5)), None)


def _source(name: str, split: str, root: Path) -> _Source:
    from torchvision import datasets

    if name == "cifar10":
        return _cifar(datasets.CIFAR10, "CIFAR-10", 10, root)
    if name == "cifar100":
        return _cifar(datasets.CIFAR100, "CIFAR-100", 100, root)
    if name == "fashion-mnist":
        return _fashion_mnist(root)
    if name == "emnist":
        return _emnist(split or "balanced", root)
    return _svhn(root)


def _cifar(kind: Any, title: str, classes: int, root: Path) -> _Source:
    def read(train: bool, download: bool) -> tuple[Tensor, Tensor]:
        # The files are pickles, which run whatever they say. torchvision loads none before its MD5 sum is right,
        # and that is the one reason why these may be read.
        data = kind(root, train=train, download=download)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)

    sums = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    files = {Path(kind.base_folder, file): md5 for file, md5 in sums.items()}
    return _Source(title, 32, classes, True, files, read)


def _fashion_mnist(root: Path) -> _Source:
    from torchvision.datasets import FashionMNIST

    _refuse_processed(root / "FashionMNIST")

    def read(train: bool, download: bool) -> tuple[Tensor, Tensor]:
        data = FashionMNIST(root, train=train, download=download)
        return data.data[:, None], data.targets

    raw = Path("FashionMNIST", "raw")
    parts = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = {raw / f"{split}-{part}": None for split in ("train", "t10k") for part in parts}
    return _Source("Fashion-MNIST", 28, 10, True, files, read)


def _emnist(split: str, root: Path) -> _Source:
    from torchvision.datasets import EMNIST

    if split not in EMNIST_SPLITS:
        raise InputError(f"dataset emnist has no split {split!r}; known are {', '.join(EMNIST_SPLITS)}")

    _refuse_processed(root / "EMNIST")

    def read(train: bool, download: bool) -> tuple[Tensor, Tensor]:
        data = EMNIST(root, split, train=train, download=download)
        labels = data.targets - 1 if split == "letters" else data.targets  # there a is 1, not 0
        return data.data.transpose(1, 2)[:, None], labels  # in the files, letters lie on their side

    raw = Path("EMNIST", "raw")
    parts = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = {raw / f"emnist-{split}-{half}-{part}": None for half in ("train", "test") for part in parts}
    return _Source(f"EMNIST {split}", 28, EMNIST_SPLITS[split], False, files, read)


def _refuse_processed(folder: Path) -> None:
    """torchvision prefers files of its old versions, which are pickles that it does not check."""
    if old := next((folder / "processed").glob("*.pt"), None):
        raise InputError(
            f"{old} is a pickle of an old torchvision; remove it, the files in {folder / 'raw'} are what counts"
        )


def _svhn(root: Path) -> _Source:
    from torchvision.datasets import SVHN

    def read(train: bool, download: bool) -> tuple[Tensor, Tensor]:
        data = SVHN(root, "train" if train else "test", download=download)
        return torch.from_numpy(data.data), torch.from_numpy(data.labels)

    files = {Path(SVHN.split_list[split][1]): SVHN.split_list[split][2] for split in ("train", "test")}
    return _Source("SVHN", 32, 10, False, files, read)  # a mirrored digit is no digit
