"""Folders of image files: where the splits are, what lies in them, and many images as one tensor."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.data.images import Shape, decode_image
from slt_planner.errors import InputError


def check_folder(name: str, folder: Path, needed: str) -> None:
    """Refuse a data set whose folder is not there, with what it must hold."""
    if not folder.is_dir():
        raise InputError(f"dataset {name}: no such folder; it needs {needed}")


def split_folders(name: str, folder: Path, each: str) -> tuple[Path, Path]:
    """The folders train and test (or, where there is no test, val or valid); `each` says what they hold.

    Raises:
        InputError: a folder is missing.
    """
    needed = f"train and test (or val), {each}"
    check_folder(name, folder, needed)
    train, test = folder / "train", folder / "test"
    if not test.is_dir():
        test = next((other for name in ("val", "valid") if (other := folder / name).is_dir()), folder / "val")
    for split, names in ((train, "train"), (test, "test or val")):
        if not split.is_dir():
            raise InputError(f"dataset {name}: the folder has no {names}; it needs {needed}")
    return train, test


def in_one_line(error: Exception) -> str:
    """What another library says of a failure, short enough for a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, by name, without hidden files.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); make it readable") from error


def read_file(path: Path) -> bytes:
    """A file's content.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file, or leave it out") from error


def read_images(paths: Sequence[Path], input_shape: Shape) -> Tensor:
    """Image files, decoded one after the other: (N, C, H, W), uint8.

    Raises:
        InputError: one cannot be read or decoded, or has another size; the message names it.
    """
    decoded = (decode_image(read_file(path), str(path), input_shape) for path in paths)
    return stack(decoded, (len(paths), *input_shape))


def stack(arrays: Iterable[NDArray[np.uint8]], shape: tuple[int, ...]) -> Tensor:
    """As many arrays as `shape` says, in one tensor that is there before they are: one at a time is held twice."""
    stacked = torch.empty(shape, dtype=torch.uint8)
    values = stacked.numpy()  # the same memory
    for index, array in enumerate(arrays):
        values[index] = array
    return stacked
