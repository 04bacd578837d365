"""FEMNIST as LEAF writes it (Caldas et al. 2018, arXiv 1812.01097): JSON files with the images of many writers."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.data.folders import check_folder, list_folder
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

_SIDE = 28
_LAYOUT = "LEAF's users, num_samples and user_data, in which each user has images x and classes y"


def load_femnist(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    """Load ``femnist:DIR``, see `load_dataset`."""
    name = f"femnist:{folder}"
    check_channels(name, input_shape[0])
    check_size(f"dataset {name}", (_SIDE, _SIDE), input_shape)
    check_folder(name, folder, "train and test, each with LEAF's .json files")
    train, writers = _read_split(name, folder / "train", input_shape[0], num_classes)
    test, _ = _read_split(name, folder / "test", input_shape[0], num_classes)
    title = f"FEMNIST (LEAF, {int(writers.max()) + 1:,} writers)"
    return make_dataset(title, train, test, num_classes, augment=False, train_groups=writers)


def _read_split(name: str, folder: Path, channels: int, num_classes: int) -> tuple[Split, Tensor]:
    """Images and labels of a split, and of each image its writer, by number in the order of their names."""
    paths = [path for path in list_folder(folder) if path.suffix == ".json"] if folder.is_dir() else []
    if not paths:
        raise InputError(f"dataset {name}: no .json files in {folder}; it needs train and test with LEAF's files")
    images, labels = [], []
    names: dict[str, str] = {}  # of writers, and the file that has them
    for path in paths:
        for user, x, y in _read_users(path):
            where = f"{path}, user {user!r}"
            if user in names:
                raise InputError(f"{where}: there already in {names[user]}; keep files of one sampling only")
            names[user] = path.name
            images.append(_pixels(x, where))
            labels.append(to_labels(np.array(y), where, num_classes))
            if len(images[-1]) != len(labels[-1]):
                raise InputError(f"{where}: {len(x)} images and {len(y)} classes; there must be as many")
    if not images:
        raise InputError(f"{folder}: no user in its files; give at least one")
    ranks = np.argsort(np.argsort(np.array(list(names))))
    writers = torch.from_numpy(np.repeat(ranks, [len(own) for own in labels]).astype(np.int64))
    pixels = torch.from_numpy(np.concatenate(images))
    return Split(to_channels(pixels, channels), torch.cat(labels)), writers


def _read_users(path: Path) -> Iterator[tuple[str, list[object], list[object]]]:
    """Each user of a file, with what stands under x and y; users without images are passed over."""
    try:
        content = json.loads(path.read_bytes())
        users, counts, data = content["users"], content["num_samples"], content["user_data"]
        given = [(user, count, data[user]["x"], data[user]["y"]) for user, count in zip(users, counts, strict=True)]
        whole = len(data) == len(given) and all(isinstance(user, str) for user in users)
        whole = whole and all(isinstance(x, list) and isinstance(y, list) for _, _, x, y in given)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a LEAF file, or damaged; it must be JSON with {_LAYOUT}") from error
    if not whole:
        raise InputError(f"{path}: users and user_data do not go together; it must be JSON with {_LAYOUT}")
    for user, count, x, y in given:
        if count != len(y):
            raise InputError(f"{path}, user {user!r}: {len(y)} classes, and num_samples says {count}")
        if x or y:
            yield user, x, y


def _pixels(x: list[object], where: str) -> NDArray[np.uint8]:
    """Images of one user, (n, 1, 28, 28), from rows of numbers 0..1."""
    wanted = f"each image must be {_SIDE * _SIDE} numbers in 0..1"
    try:
        values = np.array(x)
    except (ValueError, OverflowError) as error:  # rows of different lengths
        raise InputError(f"{where}: images of different sizes; {wanted}") from error
    if values.ndim != 2 or values.shape[1] != _SIDE * _SIDE or values.dtype.kind not in "fiu":
        raise InputError(f"{where}: images are {values.dtype} of shape {values.shape}; {wanted}")
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise InputError(f"{where}: a pixel is outside 0..1; {wanted}")
    return np.round(values * 255).astype(np.uint8).reshape(-1, 1, _SIDE, _SIDE)
