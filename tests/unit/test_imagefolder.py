"""`imagefolder:DIR` and `tiny-imagenet:DIR`."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from slt_planner.data.datasets import load_dataset
from slt_planner.data.imagefolder import _SUFFIXES
from slt_planner.errors import InputError
from tests.unit.tiny_images import SHAPE, as_tensor, assert_load_refused, random_pixels


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


TRAIN = ["bee/b.png", "bee/a.png", "ant/z.png", "cat/x.png", "cat/y.PNG"]
TEST = ["cat/0.png", "ant/0.png"]


@pytest.fixture
def folder(tmp_path):
    """A sound dataset: 5 train and 2 test images of 4x6, three classes, of which test lacks one."""
    for split, names in (("train", TRAIN), ("test", TEST)):
        for name, pixels in zip(names, random_pixels(5), strict=False):
            save(tmp_path / "tiny" / split / name, pixels)
    return tmp_path / "tiny"


def load(folder, shape=SHAPE, num_classes=3, kind="imagefolder"):
    return load_dataset(f"{kind}:{folder}", shape, num_classes)


assert_refused = partial(assert_load_refused, load)


# imagefolder, sound


def test_images_and_classes_are_those_of_torchvision(folder):
    dataset = load(folder)
    theirs = ImageFolder(folder / "train")
    assert dataset.train_labels.tolist() == [label for _, label in theirs.samples]
    for image, (expected, _) in zip(dataset.train_images, theirs, strict=True):
        assert torch.equal(image, as_tensor(np.array(expected)[None])[0])
    assert dataset.train_labels.dtype == torch.int64
    assert (dataset.title, dataset.augment, dataset.train_groups) == ("tiny (PNG)", True, None)


def test_grey_of_16_bits_counts_with_its_upper_8_and_of_32_is_refused(folder):
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2730
    Image.fromarray(values).save(folder / "train/ant/z.png")
    data = load(folder)
    grey = torch.from_numpy((values >> 8).astype(np.uint8))
    assert torch.equal(data.train_images[0], grey.expand(3, 4, 6))
    Image.fromarray(np.zeros((4, 6), dtype=np.float32)).save(folder / "train/ant/z.tif")
    with pytest.raises(InputError, match=r"z\.tif.*its pixels are of 32 bits"):
        load(folder)


def test_classes_of_test_have_the_numbers_of_train(folder):
    # torchvision alone would number ant and cat 0 and 1, though cat is class 2.
    dataset = load(folder)
    assert dataset.test_labels.tolist() == [0, 2]
    assert torch.equal(dataset.test_images, as_tensor(random_pixels(5)[[1, 0]]))


@pytest.mark.parametrize("name", ["val", "valid"])
def test_val_serves_where_there_is_no_test(folder, name):
    save(folder / name / "bee" / "0.png", random_pixels(1)[0])
    assert load(folder).test_labels.tolist() == [0, 2]
    (folder / "test").rename(folder / "other")
    assert load(folder).test_labels.tolist() == [1]


def test_hidden_files_other_suffixes_and_files_beside_the_classes_are_not_looked_at(folder):
    for name in ("train/.cache/x.png", "train/readme.txt", "train/bee/._b.png", "train/bee/list.csv", "test/.x/y.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    assert len(load(folder).train_labels) == 5


def test_suffixes_are_those_of_torchvision():
    assert set(_SUFFIXES) == set(IMG_EXTENSIONS)


def test_the_model_may_have_more_classes_and_other_channels(folder):
    dataset = load(folder, (1, 4, 6), 10)
    assert dataset.num_classes == 10
    assert dataset.train_images.shape == (5, 1, 4, 6)


# imagefolder, unsound


def test_missing_folders(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", f"imagefolder:{tmp_path / 'nowhere'}: no such folder", "for every class")
    (folder / "test").rename(folder / "tests")
    assert_refused(folder, f"imagefolder:{folder}", "has no test or val")
    (folder / "train").rename(folder / "training")
    assert_refused(folder, f"imagefolder:{folder}", "has no train;")


def test_no_classes(folder):
    (folder / "train").rename(folder / "other")
    (folder / "train").mkdir()
    save(folder / "train" / "image.png", random_pixels(1)[0])
    assert_refused(folder, f"{folder / 'train'}: no folders in it")


def test_a_class_without_images(folder):
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "image.heic").touch()
    assert_refused(folder, f"{folder / 'train' / 'dog'}: no images", ".png", num_classes=4)


def test_a_test_without_images(folder):
    for name in TEST:
        (folder / "test" / name).unlink()
    assert_refused(folder, f"{folder / 'test'}: no images in the folders of its classes")


def test_a_class_that_only_test_has(folder):
    save(folder / "test" / "dog" / "0.png", random_pixels(1)[0])
    assert_refused(folder, f"{folder / 'test' / 'dog'}: no class of that name in {folder / 'train'}")


def test_more_classes_than_the_model_has(folder):
    assert_refused(folder, "has 3 classes, the model 2; give it at least 3", num_classes=2)


def test_a_model_of_neither_one_nor_three_channels(folder):
    assert_refused(folder, "1 or 3 channels", "takes 4", shape=(4, 4, 6))


@pytest.mark.parametrize("name", ["train/bee/a.png", "test/cat/0.png"])
def test_an_image_that_is_damaged_or_has_another_size(folder, name):
    content = (folder / name).read_bytes()
    for damaged in (b"", b"no image", content[: len(content) // 2]):
        (folder / name).write_bytes(damaged)
        assert_refused(folder, f"{folder / name}: the image cannot be decoded")
    save(folder / name, random_pixels(1, height=6, width=4)[0])
    assert_refused(folder, f"{folder / name}: the image is 6x4", "takes 4x6")


def test_a_file_that_is_none(folder):
    (folder / "train" / "bee" / "c.png").symlink_to("nowhere.png")
    assert_refused(folder, f"{folder / 'train' / 'bee' / 'c.png'}: cannot be read (")


# Tiny ImageNet

WNIDS = ["n02", "n01", "n03"]  # not in order, as in the real file


@pytest.fixture
def tiny(tmp_path):
    """Two train images a class, and three of val."""
    folder = tmp_path / "tiny-imagenet-200"
    pixels = iter(random_pixels(6))
    for wnid in WNIDS:
        for index in range(2):
            save(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", next(pixels))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").touch()
    lines = []
    for index, wnid in enumerate(("n03", "n01", "n03")):
        save(folder / "val" / "images" / f"val_{index}.JPEG", random_pixels(3, seed=1)[index])
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "test" / "images").mkdir(parents=True)  # whose labels are nowhere
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    return folder


load_tiny = partial(load, kind="tiny-imagenet")
assert_tiny_refused = partial(assert_load_refused, load_tiny)


def test_tiny_imagenet(tiny):
    dataset = load_tiny(tiny)
    paths = [tiny / "train" / wnid / "images" / f"{wnid}_{index}.JPEG" for wnid in sorted(WNIDS) for index in (0, 1)]
    assert torch.equal(dataset.train_images, as_tensor(np.stack([np.asarray(Image.open(path)) for path in paths])))
    assert dataset.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    paths = [tiny / "val" / "images" / f"val_{index}.JPEG" for index in range(3)]
    assert torch.equal(dataset.test_images, as_tensor(np.stack([np.asarray(Image.open(path)) for path in paths])))
    assert dataset.test_labels.tolist() == [2, 0, 2]
    assert (dataset.title, dataset.augment) == ("tiny-imagenet-200 (JPEG)", True)


def test_tiny_imagenet_with_windows_line_ends_is_the_same(tiny):
    for name in ("wnids.txt", "val/val_annotations.txt"):
        (tiny / name).write_bytes((tiny / name).read_bytes().replace(b"\n", b"\r\n"))
    assert load_tiny(tiny).test_labels.tolist() == [2, 0, 2]


def test_missing_parts_of_tiny_imagenet(tiny, tmp_path):
    assert_tiny_refused(tmp_path / "nowhere", "nowhere: no such folder", "wnids.txt, train and val")
    (tiny / "val" / "images" / "val_1.JPEG").unlink()
    assert_tiny_refused(tiny, f"{tiny / 'val' / 'images' / 'val_1.JPEG'}: cannot be read")
    (tiny / "val" / "val_annotations.txt").unlink()
    assert_tiny_refused(tiny, f"{tiny / 'val' / 'val_annotations.txt'}: cannot be read", "the class of each image")
    (tiny / "train" / "n01").rename(tiny / "train" / "n04")
    assert_tiny_refused(tiny, f"{tiny / 'train' / 'n01' / 'images'}: the folder cannot be read")
    (tiny / "wnids.txt").unlink()
    assert_tiny_refused(tiny, f"{tiny / 'wnids.txt'}: cannot be read", "tiny-imagenet-200.zip")


def test_a_class_of_tiny_imagenet_without_images(tiny):
    for path in (tiny / "train" / "n01" / "images").iterdir():
        path.unlink()
    assert_tiny_refused(tiny, f"{tiny / 'train' / 'n01' / 'images'}: no images")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_class_in_wnids(tiny, content):
    (tiny / "wnids.txt").write_text(content)
    assert_tiny_refused(tiny, "wnids.txt: no class in it")


@pytest.mark.parametrize(
    "line", ["val_1.JPEG\tn09\t0", "val_1.JPEG", "", "../train/n01/x.JPEG\tn01", "\tn01", "x" * 500]
)
def test_a_wrong_annotation(tiny, line):
    path = tiny / "val" / "val_annotations.txt"
    path.write_text(f"val_0.JPEG\tn01\n{line}\n")
    assert_tiny_refused(tiny, f"{path}, row 1: must be FILE, a tab, and a class of wnids.txt")


def test_no_annotations(tiny):
    (tiny / "val" / "val_annotations.txt").write_text("")
    assert_tiny_refused(tiny, "val_annotations.txt: no images in it")


def test_more_classes_of_tiny_imagenet_than_the_model_has(tiny):
    assert_tiny_refused(tiny, "has 3 classes, the model 2", num_classes=2)
