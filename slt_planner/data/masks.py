"""Images with a mask each, the class of every pixel: folders of image files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.data.folders import list_folder, read_file, read_images, split_folders, stack
from slt_planner.data.images import Dataset, Shape, Split, check_channels, decode_mask, image_format, make_dataset
from slt_planner.errors import InputError

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_MASK_SUFFIXES = (".png",)
_UNCOUNTED = 255  # a pixel of this number does not count


@dataclass(frozen=True)
class _Pair:
    """An image and its mask."""

    image: Path
    mask: Path


def load_masks(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    """Load ``masks:DIR``, see `load_dataset`.

    Raises:
        InputError: anything missing, unreadable, of another size or out of range; the message names the file.
    """
    name = f"masks:{folder}"
    check_channels(name, input_shape[0])
    if num_classes > _UNCOUNTED:
        raise InputError(
            f"dataset {name}: masks of 8 bits tell at most {_UNCOUNTED} classes apart, the model has {num_classes}; "
            "use a model of fewer classes"
        )
    train, test = _find_splits(folder)
    # Masks of both splits first: whatever is wrong with them shows before the larger images are decoded.
    train_labels, test_labels = (_read_masks(pairs, input_shape, num_classes) for pairs in (train, test))
    train_images = read_images([pair.image for pair in train], input_shape)
    test_images = read_images([pair.image for pair in test], input_shape)
    return make_dataset(
        f"{folder.resolve().name} ({image_format(read_file(train[0].image))}, with masks)",
        Split(train_images, train_labels),
        Split(test_images, test_labels),
        num_classes,
        augment=False,
    )


def _find_splits(folder: Path) -> tuple[list[_Pair], list[_Pair]]:
    """Images and masks of train and test, in the order of their names."""
    train, test = split_folders(f"masks:{folder}", folder, "each with the folders images and masks")
    return _find_pairs(train), _find_pairs(test)


def _find_pairs(split: Path) -> list[_Pair]:
    images = _files_by_stem(split / "images", _IMAGE_SUFFIXES)
    masks = _files_by_stem(split / "masks", _MASK_SUFFIXES)
    if not images:
        raise InputError(f"{split / 'images'}: no images; give at least one {', '.join(_IMAGE_SUFFIXES)} file")
    alone = sorted(images.keys() - masks.keys())
    if alone:
        raise InputError(
            f"{images[alone[0]]}: no mask{_and_more(alone)}; it must be {split / 'masks' / alone[0]}.png, "
            "or leave the image out"
        )
    alone = sorted(masks.keys() - images.keys())
    if alone:
        suffixes = " or ".join(_IMAGE_SUFFIXES)
        raise InputError(
            f"{masks[alone[0]]}: no image for this mask{_and_more(alone)}; it must be "
            f"{split / 'images' / alone[0]} with {suffixes}, or leave the mask out"
        )
    return [_Pair(images[stem], masks[stem]) for stem in sorted(images)]


def _and_more(alone: list[str]) -> str:
    return f" (as for {len(alone) - 1} more)" if len(alone) > 1 else ""


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files there by name without suffix; hidden files and those of other suffixes are not looked at.

    Whatever has such a name is listed, dangling links and folders too: they are refused when they are read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a split is a folder images and a folder masks, same names in both")
    files: dict[str, Path] = {}
    for path in list_folder(folder):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if path.stem in files:
            raise InputError(f"{path}: {files[path.stem].name} has the same name but for the suffix; keep one of them")
        files[path.stem] = path
    return files


def _read_masks(pairs: list[_Pair], input_shape: Shape, num_classes: int) -> Tensor:
    """Masks of a split, (N, H, W), uint8."""
    _, height, width = input_shape
    masks = (_read_mask(pair.mask, (height, width), num_classes) for pair in pairs)
    return stack(masks, (len(pairs), height, width))


def _read_mask(path: Path, size: tuple[int, int], num_classes: int) -> NDArray[np.uint8]:
    """A mask's class numbers, (H, W), checked."""
    mask = decode_mask(read_file(path), str(path), size)
    wrong = np.argwhere((mask >= num_classes) & (mask != _UNCOUNTED))
    if len(wrong):
        row, column = wrong[0]
        raise InputError(
            f"{path}: class {mask[row, column]} (at row {row}, column {column}) is out of range; the model has "
            f"{num_classes} classes, so numbers must be 0..{num_classes - 1}, or {_UNCOUNTED} for what does not count"
        )
    if (mask == _UNCOUNTED).all():  # the loss of a batch of such masks would be 0/0
        raise InputError(f"{path}: every pixel is {_UNCOUNTED}, so none counts; leave the mask and its image out")
    return mask
