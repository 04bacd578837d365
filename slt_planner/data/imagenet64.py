"""The downsampled ImageNet batches (Chrabaszcz et al. 2017, arXiv 1707.08819), as NumPy files: ``imagenet64:DIR``."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slt_planner.data.folders import check_folder, in_one_line, list_folder
from slt_planner.data.images import (
    Dataset,
    Shape,
    Split,
    check_channels,
    check_size,
    make_dataset,
    to_channels,
    to_labels,
)
from slt_planner.errors import InputError

_TRAIN = re.compile(r"train_data_batch_(\d{1,4})\.npz")
_TEST = "val_data.npz"
_NEEDED = f"train_data_batch_1.npz and so on, and {_TEST}, each with the arrays data and labels"
_FIRST_LABEL = 1  # the files count classes from 1


def load_imagenet64(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    """Load ``imagenet64:DIR``, see `load_dataset`."""
    name = f"imagenet64:{folder}"
    check_channels(name, input_shape[0])
    check_folder(name, folder, _NEEDED)
    train_files = _train_files(name, folder)
    if not (folder / _TEST).is_file():
        raise InputError(f"dataset {name}: the folder has no {_TEST}; it needs {_NEEDED}")
    train, test = (_read_split(paths, input_shape, num_classes) for paths in (train_files, [folder / _TEST]))
    title = f"{folder.resolve().name} (downsampled ImageNet, {input_shape[1]}x{input_shape[2]})"
    return make_dataset(title, train, test, num_classes, augment=True)


def _train_files(name: str, folder: Path) -> list[Path]:
    """The batches of train by their numbers, which must be 1 and so on: a gap is a file that was lost."""
    files = {int(match[1]): path for path in list_folder(folder) if (match := _TRAIN.fullmatch(path.name))}
    if not files:
        pickled = " (pickled batches are code, and not read)" if (folder / "train_data_batch_1").exists() else ""
        raise InputError(f"dataset {name}: the folder has no train_data_batch_*.npz{pickled}; it needs {_NEEDED}")
    lost = sorted(set(range(1, max(files) + 1)) - files.keys())
    if lost:
        raise InputError(f"dataset {name}: the folder has no train_data_batch_{lost[0]}.npz, but later ones; add it")
    return [files[number] for number in sorted(files)]


def _read_split(paths: list[Path], input_shape: Shape, num_classes: int) -> Split:
    """One tensor for all files, which are held one at a time beside it: the whole of ImageNet64 is 15.7 GB."""
    labels = [to_labels(_read(path, "labels"), str(path), num_classes, _FIRST_LABEL) for path in paths]
    images = torch.empty((sum(map(len, labels)), *input_shape), dtype=torch.uint8)
    start = 0
    for path, own in zip(paths, labels, strict=True):
        pixels = _read(path, "data")
        side = math.isqrt(pixels.shape[-1] // 3) if pixels.ndim == 2 else 0
        if pixels.dtype != np.uint8 or side == 0 or pixels.shape[1] != 3 * side * side:
            raise InputError(
                f"{path}: data is {pixels.dtype} of shape {pixels.shape}; it must be uint8, a row of 3 x side x side "
                "pixels an image"
            )
        if len(pixels) != len(own):
            raise InputError(f"{path}: {len(pixels)} images and {len(own)} labels; there must be as many")
        check_size(str(path), (side, side), input_shape)
        batch = torch.from_numpy(pixels).view(-1, 3, side, side)
        images[start : start + len(own)] = to_channels(batch, input_shape[0])
        start += len(own)
    return Split(images, torch.cat(labels))


def _read(path: Path, name: str) -> NDArray[Any]:
    """One array of a file, not empty."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a .npz file, or damaged; give a whole one")
    try:
        # A pickle is a program, and data is not to be run.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            array = file.get(name)
    except Exception as error:  # damaged bytes raise OSError, ValueError, BadZipFile, NotImplementedError and more
        raise InputError(
            f"{path}: {name} cannot be read ({in_one_line(error)}); give a whole .npz file of numbers, without pickles"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: no array {name!r} in it; it must hold data and labels")
    if not array.size:
        raise InputError(f"{path}: {name} is empty; give at least one image")
    return array
