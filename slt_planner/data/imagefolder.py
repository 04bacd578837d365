"""A folder a class, an image a file: `imagefolder:DIR` and the layout of Tiny ImageNet."""

from pathlib import Path

import torch

from slt_planner.data.folders import check_folder, list_folder, read_file, read_images, split_folders
from slt_planner.data.images import Dataset, Shape, Split, check_channels, check_classes, image_format, make_dataset
from slt_planner.errors import InputError
from slt_planner.files import read_text

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision

_Samples = list[tuple[Path, int]]  # an image file and its class


def load_imagefolder(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    """Load ``imagefolder:DIR``, see `load_dataset`."""
    name = f"imagefolder:{folder}"
    check_channels(name, input_shape[0])
    train, test = split_folders(name, folder, "each with a folder of images for every class")
    classes = [path.name for path in list_folder(train) if path.is_dir()]
    if not classes:
        raise InputError(f"{train}: no folders in it; give one for every class, with its images")
    check_classes(name, len(classes), num_classes)
    unknown = [path for path in list_folder(test) if path.is_dir() and path.name not in classes]
    if unknown:
        raise InputError(f"{unknown[0]}: no class of that name in {train}; test needs the classes of train")
    train_samples = _samples([(train / name, label) for label, name in enumerate(classes)])
    there = [(test / name, label) for label, name in enumerate(classes) if (test / name).is_dir()]
    test_samples = _samples(there, required=False)
    if not test_samples:
        raise InputError(f"{test}: no images in the folders of its classes; give {', '.join(_SUFFIXES)} files")
    return _make(folder, train_samples, test_samples, input_shape, num_classes)


def load_tiny_imagenet(folder: Path, input_shape: Shape, num_classes: int) -> Dataset:
    """Load ``tiny-imagenet:DIR``, see `load_dataset`."""
    name = f"tiny-imagenet:{folder}"
    check_channels(name, input_shape[0])
    check_folder(name, folder, "wnids.txt, train and val, as tiny-imagenet-200.zip has them")
    lines = read_text(folder / "wnids.txt", "classes", "give the folder that tiny-imagenet-200.zip unpacks").split("\n")
    classes = sorted({line.strip() for line in lines} - {""})  # as `imagefolder` numbers them
    if not classes:
        raise InputError(f"{folder / 'wnids.txt'}: no class in it; it must name one a line")
    check_classes(name, len(classes), num_classes)
    train = _samples([(folder / "train" / wnid / "images", label) for label, wnid in enumerate(classes)])
    return _make(folder, train, _annotated(folder / "val", classes), input_shape, num_classes)


def _annotated(split: Path, classes: list[str]) -> _Samples:
    """The images of Tiny ImageNet's val, whose classes stand in a file: name, class and a box, with tabs between."""
    path = split / "val_annotations.txt"
    number = {wnid: label for label, wnid in enumerate(classes)}
    samples = []
    for row, line in enumerate(read_text(path, "annotations", "it gives the class of each image").splitlines()):
        image, wnid, *_ = [*line.split("\t"), "", ""]
        if not image or Path(image).name != image or wnid not in number:
            raise InputError(f"{path}, row {row}: must be FILE, a tab, and a class of wnids.txt, not {line[:60]!r}")
        samples.append((split / "images" / image, number[wnid]))
    if not samples:
        raise InputError(f"{path}: no images in it; it must name one a line, and its class")
    return samples


def _samples(folders: list[tuple[Path, int]], required: bool = True) -> _Samples:
    """The images of folders of one class each; a folder without any is a mistake where they are `required`."""
    samples = []
    for folder, label in folders:
        images = [path for path in list_folder(folder) if path.suffix.lower() in _SUFFIXES]
        if required and not images:
            raise InputError(f"{folder}: no images; give at least one {', '.join(_SUFFIXES)} file")
        samples += [(path, label) for path in images]
    return samples


def _make(folder: Path, train: _Samples, test: _Samples, input_shape: Shape, num_classes: int) -> Dataset:
    splits = _read(train, input_shape), _read(test, input_shape)
    title = f"{folder.resolve().name} ({image_format(read_file(train[0][0]))})"
    return make_dataset(title, *splits, num_classes, augment=True)


def _read(samples: _Samples, input_shape: Shape) -> Split:
    paths, labels = zip(*samples, strict=True)
    return Split(read_images(paths, input_shape), torch.tensor(labels))
