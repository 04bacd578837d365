"""Datasets by name: scikit-learn's handwritten digits, a folder of parquet files, or folders of images and masks."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.data.images import Dataset, Shape, channel_statistics, check_channels, decode_image, image_format
from slt_planner.data.masks import load_masks
from slt_planner.errors import InputError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_ROWS_AT_ONCE = 1024  # coded images held in memory while a file is decoded
_DIGITS_TRAIN_FRACTION = 0.8


def load_dataset(name: str, input_shape: Shape, num_classes: int) -> Dataset:
    """Load a dataset for a model that takes images of `input_shape` (C, H, W) and tells `num_classes` apart.

    ``digits``: 1,797 images of 8x8, one channel, brought to the input shape; shuffled with a fixed seed, 80 %
    train.

    ``parquet:DIR``: the layout of Hugging Face datasets. DIR holds train*.parquet and test*.parquet (or,
    where there is no test, valid*.parquet), whole or in shards (train-00000-of-00002.parquet). A row is an
    image: column ``img`` or ``image``, a struct with the coded image in ``bytes``, and column ``label``,
    ``labels`` or ``fine_label``, an integer. Images must have the size that the model takes; they are
    converted to its 1 or 3 channels.

    ``masks:DIR``: the class of every pixel. DIR holds the folders train and test (or, where there is no test,
    val), each with the folders images and masks. images holds .png, .jpg or .jpeg files, sized and converted as
    above; masks holds a .png file of the same stem for each, 8-bit greyscale or palette, whose numbers are the
    classes, 255 for pixels that do not count. Hidden files, and files with other suffixes, are not looked at.

    Raises:
        InputError: an unknown name; a folder, files or columns that are missing, unreadable or empty; an
            image that cannot be decoded or has another size; a label that is missing or out of range. The
            message names the file, and the row or pixel, counted from 0.
    """
    kind, _, folder = name.partition(":")
    if name == "digits":
        return _load_digits(input_shape, num_classes)
    if kind == "parquet" and folder:
        return _load_parquet(Path(os.path.expanduser(folder)), input_shape, num_classes)
    if kind == "masks" and folder:
        return load_masks(Path(os.path.expanduser(folder)), input_shape, num_classes)
    raise InputError(
        f"unknown dataset {name!r}; known are digits, parquet:DIR (DIR a folder of parquet files) and masks:DIR "
        "(DIR a folder of images and masks)"
    )


def normalise(images: Tensor, dataset: Dataset) -> Tensor:
    """What a model takes: (images / 255 - mean) / std by channel, float32, of uint8 `images` (N, C, H, W)."""
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=images.device)[:, None, None]
        for numbers in (dataset.mean, dataset.std)
    )
    return (images.to(torch.float32) / 255).sub_(mean).div_(std)


def _load_digits(input_shape: Shape, num_classes: int) -> Dataset:
    from sklearn.datasets import load_digits

    if num_classes < 10:
        raise InputError(f"dataset digits has 10 classes, the model {num_classes}; give it at least 10")
    digits = load_digits()
    channels, height, width = input_shape
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # its values are 0..16
    size = f"{height}x{width}"
    resized = F.interpolate(grey, size=(height, width), mode="bilinear", align_corners=False)
    images = resized.round().to(torch.uint8).repeat(1, channels, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, test = order.tensor_split([int(_DIGITS_TRAIN_FRACTION * len(labels))])
    mean, std = channel_statistics(images[train])
    return Dataset(
        title=f"handwritten digits (scikit-learn, {len(labels):,} images of 8x8, resized to {size})",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        num_classes=num_classes,
        mean=mean,
        std=std,
        augment=False,
    )


def _load_parquet(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    check_channels(f"parquet:{folder}", input_shape[0])
    train, test = _find_splits(folder)
    # Labels of both splits first: they are quick to check, images take time to decode.
    train_labels, test_labels = _read_labels(train, num_classes), _read_labels(test, num_classes)
    train_images = _read_images(train, len(train_labels), input_shape)
    mean, std = channel_statistics(train_images)
    return Dataset(
        title=f"{folder.resolve().name} ({_first_format(train[0])})",
        train_images=train_images,
        train_labels=train_labels,
        test_images=_read_images(test, len(test_labels), input_shape),
        test_labels=test_labels,
        num_classes=num_classes,
        mean=mean,
        std=std,
        augment=True,
    )


@dataclass(frozen=True)
class _File:
    """A parquet file that holds rows, and which of its columns are the images and the labels."""

    path: Path
    image_column: str
    label_column: str

    def rows(self, column: str) -> Iterator[Any]:
        """The column's values, in arrow arrays of at most `_ROWS_AT_ONCE`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: column {column!r} cannot be read; the file is damaged") from error

    def coded_images(self) -> Iterator[tuple[int, bytes | None]]:
        """Row and coded image; None where there is none."""
        row = 0
        for array in self.rows(self.image_column):
            for coded in array.field("bytes").to_pylist():
                yield row, coded
                row += 1


def _find_splits(folder: Path) -> tuple[list[_File], list[_File]]:
    """The train and the test files of a folder, shards in their order."""
    if not folder.is_dir():
        raise InputError(f"dataset parquet:{folder}: no such folder; give one with train and test parquet files")
    train = sorted(folder.glob("train*.parquet"))
    test = sorted(folder.glob("test*.parquet")) or sorted(folder.glob("valid*.parquet"))
    for paths, pattern in ((train, "train*.parquet"), (test, "test*.parquet or validation*.parquet")):
        if not paths:
            raise InputError(
                f"dataset parquet:{folder}: the folder has no {pattern}; it needs both train and test files"
            )
        _check_shards(paths)
    return [_open(path) for path in train], [_open(path) for path in test]


def _check_shards(paths: list[Path]) -> None:
    """Refuse part of a split, and a split that is there twice: whole and in shards, or in two cuts."""
    matches = [re.search(r"-(\d{5})-of-(\d{5})", path.name) for path in paths]
    shards = [(int(match[1]), int(match[2])) for match in matches if match]
    if not shards:
        return
    total = shards[0][1]
    if len(shards) != len(paths) or sorted(shards) != [(shard, total) for shard in range(total)]:
        names = ", ".join(path.name for path in paths)
        raise InputError(
            f"{paths[0].parent}: {names} are not one whole set of {total} shards; give all of them, once each"
        )


def _open(path: Path) -> _File:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file, or damaged; give files as parquet writers make them") from error
    if not count:
        raise InputError(f"{path}: the file has no rows; give at least one image")
    image = _choose_column(path, schema.names, "image", _IMAGE_COLUMNS)
    label = _choose_column(path, schema.names, "label", _LABEL_COLUMNS)
    kind = schema.field(image).type
    if not (pa.types.is_struct(kind) and _is_binary(kind, "bytes")):
        raise InputError(f"{path}: column {image!r} is {kind}; it must be a struct {{bytes: binary, path: string}}")
    if not pa.types.is_integer(schema.field(label).type):
        raise InputError(f"{path}: column {label!r} is {schema.field(label).type}; labels must be integers")
    return _File(path, image, label)


def _is_binary(struct: Any, name: str) -> bool:
    """Whether the struct has a field of that name that holds bytes."""
    import pyarrow as pa

    return struct.get_field_index(name) >= 0 and struct.field(name).type in (pa.binary(), pa.large_binary())


def _choose_column(path: Path, names: list[str], what: str, wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(
        f"{path}: no {what} column; name it {' or '.join(wanted)} (the columns there are: {', '.join(names)})"
    )


def _read_labels(files: list[_File], num_classes: int) -> Tensor:
    """Labels of a split, (N,), int64."""
    return torch.from_numpy(np.concatenate([_file_labels(file, num_classes) for file in files]))


def _file_labels(file: _File, num_classes: int) -> NDArray[np.int64]:
    labels: list[int | None] = [label for array in file.rows(file.label_column) for label in array.to_pylist()]
    for row, label in enumerate(labels):
        if label is None:
            raise InputError(f"{file.path}, row {row}: the label is missing (null); every image needs one")
        if not 0 <= label < num_classes:
            raise InputError(
                f"{file.path}, row {row}: label {label} is out of range; the model has {num_classes} "
                f"classes, so labels must be 0..{num_classes - 1}"
            )
    return np.array(labels, dtype=np.int64)


def _read_images(files: list[_File], count: int, input_shape: Shape) -> Tensor:
    """Images of a split, (N, C, H, W), uint8."""
    images = torch.empty((count, *input_shape), dtype=torch.uint8)
    pixels = images.numpy()  # the same memory
    coded_images = ((file, row, coded) for file in files for row, coded in file.coded_images())
    for index, (file, row, coded) in enumerate(coded_images):
        where = f"{file.path}, row {row}"
        if coded is None:
            raise InputError(
                f"{where}: no image bytes (null); the image itself must be in the file, a path is not enough"
            )
        pixels[index] = decode_image(coded, where, input_shape)
    return images


def _first_format(file: _File) -> str:
    """How the first image is coded, such as JPEG; asked once it is known to be readable."""
    _, coded = next(file.coded_images())
    return image_format(coded or b"")
