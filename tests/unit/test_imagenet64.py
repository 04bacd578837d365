"""`imagenet64:DIR`, on batches of 8x8."""

import pickle
import random
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from slt_planner.data.datasets import load_dataset
from slt_planner.errors import InputError
from tests.unit.tiny_images import as_tensor, assert_load_refused, random_pixels

SHAPE = (3, 8, 8)


def rows_of(pixels):
    """A row an image: the red plane, then green, then blue, each row after row."""
    return as_tensor(pixels).reshape(len(pixels), -1).numpy()


def write(path, pixels, labels, changed=None):
    arrays = {"data": rows_of(pixels), "labels": np.array(labels), "mean": np.zeros(192)} | (changed or {})
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.fixture
def folder(tmp_path):
    """Eleven batches, so that an order by name would be wrong, and a val; classes from 1."""
    folder = tmp_path / "Imagenet8"
    folder.mkdir()
    for number in range(1, 12):
        write(folder / f"train_data_batch_{number}.npz", random_pixels(2, 8, 8, seed=number), [number, 1])
    write(folder / "val_data.npz", random_pixels(3, 8, 8), [3, 12, 1])
    return folder


def load(folder, shape=SHAPE, num_classes=12):
    return load_dataset(f"imagenet64:{folder}", shape, num_classes)


assert_refused = partial(assert_load_refused, load)


def test_images_and_labels_are_those_that_were_written(folder):
    dataset = load(folder)
    expected = np.concatenate([random_pixels(2, 8, 8, seed=number) for number in range(1, 12)])
    assert torch.equal(dataset.train_images, as_tensor(expected))
    assert torch.equal(dataset.test_images, as_tensor(random_pixels(3, 8, 8)))
    assert dataset.train_labels.tolist() == [label for number in range(11) for label in (number, 0)]
    assert dataset.test_labels.tolist() == [2, 11, 0]
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_images.is_contiguous()
    assert (dataset.title, dataset.augment) == ("Imagenet8 (downsampled ImageNet, 8x8)", True)


def test_compressed_files_are_read_and_the_model_may_take_grey(folder):
    np.savez_compressed(folder / "val_data.npz", data=rows_of(random_pixels(3, 8, 8)), labels=[1, 2, 3])
    expected = [np.asarray(Image.fromarray(pixels).convert("L")) for pixels in random_pixels(3, 8, 8)]
    assert torch.equal(load(folder, (1, 8, 8)).test_images, torch.from_numpy(np.stack(expected))[:, None])


def test_missing_files(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: no such folder", "train_data_batch_1.npz")
    (folder / "train_data_batch_4.npz").unlink()
    assert_refused(folder, f"imagenet64:{folder}", "has no train_data_batch_4.npz, but later ones")
    for path in folder.glob("train*"):
        path.unlink()
    assert_refused(folder, "the folder has no train_data_batch_*.npz; it needs")
    write(folder / "train_data_batch_1.npz", random_pixels(2, 8, 8), [1, 2])
    (folder / "val_data.npz").unlink()
    assert_refused(folder, "the folder has no val_data.npz")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a file was run",)


def test_pickles_are_not_run(folder):
    (folder / "val_data.npz").write_bytes(pickle.dumps(Bomb()))
    assert_refused(folder, f"{folder / 'val_data.npz'}: not a .npz file")
    np.savez(folder / "val_data.npz", data=rows_of(random_pixels(1, 8, 8)), labels=np.array([Bomb()], dtype=object))
    assert_refused(folder, f"{folder / 'val_data.npz'}: labels cannot be read", "without pickles")
    for path in folder.glob("train*"):
        path.unlink()
    (folder / "train_data_batch_1").write_bytes(pickle.dumps(Bomb()))
    assert_refused(folder, "no train_data_batch_*.npz (pickled batches are code, and not read)")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no numbers", lambda content: content[:-30]])
def test_a_damaged_file(folder, damage):
    path = folder / "train_data_batch_3.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(folder, f"{path}: not a .npz file, or damaged")


def test_any_damage_is_told_in_one_line_or_does_no_harm(folder):
    path, draw = folder / "val_data.npz", random.Random(0)
    content = path.read_bytes()
    for number in range(2, 12):
        (folder / f"train_data_batch_{number}.npz").unlink()
    messages = []
    for _ in range(100):
        damaged = bytearray(content)
        for place in draw.choices([*range(200), *range(len(content) - 200, len(content))], k=draw.choice((1, 2, 5))):
            damaged[place] = draw.randrange(256)  # where the headers are
        path.write_bytes(damaged)
        try:
            load(folder)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not [message for message in messages if "\n" in message or str(path) not in message]


def test_damage_inside_an_array(folder):
    path = folder / "val_data.npz"
    content = bytearray(path.read_bytes())
    middle = content.index(rows_of(random_pixels(3, 8, 8)).tobytes()[:20])
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)  # its sum is now wrong
    assert_refused(folder, f"{path}: data cannot be read")


def test_a_single_array_in_place_of_several(folder):
    path = folder / "val_data.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert_refused(folder, f"{path}: not a .npz file")


def test_something_else_in_place_of_an_array(folder):
    path = folder / "val_data.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("labels", b"1 2 3")
    assert_refused(folder, f"{path}: no array 'labels' in it")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": None}, "no array 'labels' in it"),
        ({"data": None}, "no array 'data' in it"),
        ({"labels": np.array([], dtype=int)}, "labels is empty"),
        ({"labels": [1, 0]}, ", row 1: label 0 is out of range; the model has 12 classes, so labels must be 1..12"),
        ({"labels": [13, 1]}, ", row 0: label 13 is out of range"),
        ({"labels": [1.0, 2.0]}, "labels are float64 of shape (2,); they must be integers"),
        ({"labels": [[1], [2]]}, "labels are int64 of shape (2, 1)"),
        ({"labels": [1, 2, 3]}, "2 images and 3 labels"),
        ({"data": np.zeros((2, 192))}, "data is float64 of shape (2, 192); it must be uint8"),
        ({"data": np.zeros((2, 190), dtype=np.uint8)}, "data is uint8 of shape (2, 190)"),
        ({"data": np.zeros((2, 8, 8, 3), dtype=np.uint8)}, "data is uint8 of shape (2, 8, 8, 3)"),
        ({"data": np.zeros((2, 48), dtype=np.uint8)}, "the images are 4x4 (height x width), the model takes 8x8; plan"),
    ],
)
def test_arrays_that_are_wrong(folder, arrays, message):
    path = folder / "train_data_batch_2.npz"
    write(path, random_pixels(2, 8, 8), [1, 2], arrays)
    assert_refused(folder, f"{path}", message)


def test_a_model_of_another_size_or_number_of_channels(folder):
    assert_refused(folder, "the images are 8x8", "takes 64x64", "--input-shape 3,8,8", shape=(3, 64, 64))
    assert_refused(folder, "1 or 3 channels", "takes 2", shape=(2, 8, 8))
