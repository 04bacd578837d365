"""A folder of parquet files, as Hugging Face data sets have them: ``parquet:DIR``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.data.folders import check_folder, stack
from slt_planner.data.images import (
    Dataset,
    Shape,
    Split,
    check_channels,
    decode_image,
    image_format,
    make_dataset,
    to_labels,
)
from slt_planner.errors import InputError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "character")
_WRITER_COLUMNS = ("writer_id", "client_id", "user_id")
_ROWS_AT_ONCE = 1024  # coded images held in memory while a file is decoded


def load_parquet(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    """Load ``parquet:DIR``, see `load_dataset`."""
    check_channels(f"parquet:{folder}", input_shape[0])
    train, test = _find_splits(folder)
    # Labels of both splits first: they are quick to check, images take time to decode.
    train_labels, test_labels = _read_labels(train, num_classes), _read_labels(test, num_classes)
    writers = _read_writers(train)
    return make_dataset(
        f"{folder.resolve().name} ({_first_format(train[0])})",
        Split(_read_images(train, len(train_labels), input_shape), train_labels),
        Split(_read_images(test, len(test_labels), input_shape), test_labels),
        num_classes,
        augment=train[0].writer_column != _WRITER_COLUMNS[0],  # a mirrored letter is no letter
        train_groups=writers,
    )


@dataclass(frozen=True)
class _File:
    """A parquet file that holds rows, and which of its columns are images, labels and, if there are any, writers."""

    path: Path
    image_column: str
    label_column: str
    writer_column: str | None

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
    check_folder(f"parquet:{folder}", folder, "train*.parquet and test*.parquet")
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
    return _File(path, image, label, next((name for name in _WRITER_COLUMNS if name in schema.names), None))


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
    return torch.cat([_file_labels(file, num_classes) for file in files])


def _file_labels(file: _File, num_classes: int) -> Tensor:
    labels: list[int | None] = [label for array in file.rows(file.label_column) for label in array.to_pylist()]
    if None in labels:
        row = labels.index(None)
        raise InputError(f"{file.path}, row {row}: the label is missing (null); every image needs one")
    return to_labels(np.array(labels), str(file.path), num_classes)


def _read_writers(files: list[_File]) -> Tensor | None:
    """The writer of each image of a split, (N,), int64, numbered from 0 in the order of their names."""
    columns = {file.writer_column for file in files}
    if columns == {None}:
        return None
    if len(columns) > 1:
        raise InputError(
            f"{files[0].path.parent}: its train files name writers in different columns, or only some do "
            f"({', '.join(sorted(str(column) for column in columns))}); give all of them one column"
        )
    writers = [writer for file in files for writer in _file_writers(file)]
    if len({type(writer) for writer in writers}) > 1:
        raise InputError(
            f"{files[0].path.parent}: {files[0].writer_column} is a number in some train files and a string in others; "
            "give all of them one type"
        )
    _, numbers = np.unique(np.array(writers), return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64))


def _file_writers(file: _File) -> list[int | str]:
    column = file.writer_column or ""
    writers: list[Any] = [writer for array in file.rows(column) for writer in array.to_pylist()]
    for row, writer in enumerate(writers):
        if writer is None or not isinstance(writer, type(writers[0])) or not isinstance(writer, int | str):
            raise InputError(f"{file.path}, row {row}: {column} is {writer!r}; every image needs a number or a name")
    return writers


def _read_images(files: list[_File], count: int, input_shape: Shape) -> Tensor:
    """Images of a split, (N, C, H, W), uint8."""
    coded_images = ((file, row, coded) for file in files for row, coded in file.coded_images())
    return stack(
        (_decode(coded, f"{file.path}, row {row}", input_shape) for file, row, coded in coded_images),
        (count, *input_shape),
    )


def _decode(coded: bytes | None, where: str, input_shape: Shape) -> NDArray[np.uint8]:
    if coded is None:
        raise InputError(f"{where}: no image bytes (null); the image itself must be in the file, a path is not enough")
    return decode_image(coded, where, input_shape)


def _first_format(file: _File) -> str:
    """How the first image is coded, such as JPEG; asked once it is known to be readable."""
    _, coded = next(file.coded_images())
    return image_format(coded or b"")
