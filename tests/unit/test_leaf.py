"""`femnist:DIR`, the JSON files of LEAF."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from slt_planner.data.datasets import load_dataset
from slt_planner.data.partition import partition
from tests.unit.tiny_images import assert_load_refused, random_pixels

SHAPE = (1, 28, 28)


def images(count, seed=0):
    """(count, 784), uint8."""
    return random_pixels(count, 28, 28, 1, seed).reshape(count, 784)


def content_of(users):
    """What LEAF writes: `users` are names with (images, labels)."""
    data = {name: {"x": np.round(x / 255, 6).tolist(), "y": list(y)} for name, (x, y) in users.items()}
    return {"users": list(users), "num_samples": [len(y) for _, y in users.values()], "user_data": data}


def write(path, users):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content_of(users)))


@pytest.fixture
def folder(tmp_path):
    """Three writers in two files, and two of them in test."""
    write(tmp_path / "train" / "all_data_0.json", {"f2": (images(3), [1, 0, 1]), "f1": (images(2, 1), [2, 2])})
    write(tmp_path / "train" / "all_data_1.json", {"f0": (images(4, 2), [0, 1, 2, 0])})
    write(tmp_path / "test" / "all_data_0.json", {"f0": (images(1, 3), [2]), "f2": (images(1, 4), [0])})
    return tmp_path


def load(folder, shape=SHAPE, num_classes=3):
    return load_dataset(f"femnist:{folder}", shape, num_classes)


assert_refused = partial(assert_load_refused, load)


def test_images_labels_and_writers_are_those_that_were_written(folder):
    dataset = load(folder)
    expected = np.concatenate([images(3), images(2, 1), images(4, 2)]).reshape(-1, 1, 28, 28)
    assert torch.equal(dataset.train_images, torch.from_numpy(expected))
    assert dataset.train_labels.tolist() == [1, 0, 1, 2, 2, 0, 1, 2, 0]
    assert dataset.train_groups.tolist() == [2, 2, 2, 1, 1, 0, 0, 0, 0]
    assert dataset.train_groups.dtype == dataset.train_labels.dtype == torch.int64
    assert dataset.test_labels.tolist() == [2, 0]
    assert (dataset.title, dataset.augment) == ("FEMNIST (LEAF, 3 writers)", False)
    colour = load(folder, (3, 28, 28))
    assert torch.equal(colour.train_images, dataset.train_images.expand(-1, 3, -1, -1))


def test_its_writers_are_the_clients_of_a_natural_partition(folder):
    dataset = load(folder)
    parts = partition(dataset.train_labels, None, "natural", 0, groups=dataset.train_groups)
    assert [sorted(part.tolist()) for part in parts] == [[5, 6, 7, 8], [3, 4], [0, 1, 2]]


def test_users_without_images_and_files_of_other_kinds_are_passed_over(folder):
    write(folder / "train" / "all_data_2.json", {"f9": (images(0), [])})
    (folder / "train" / "notes.txt").write_text("x")
    (folder / "train" / ".x.json").write_text("x")
    assert load(folder).train_groups.max() == 2


def test_missing_files(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: no such folder", "train and test")
    (folder / "test" / "all_data_0.json").unlink()
    assert_refused(folder, f"femnist:{folder}: no .json files in {folder / 'test'}")
    (folder / "test").rmdir()
    assert_refused(folder, f"femnist:{folder}: no .json files in {folder / 'test'}")
    write(folder / "test" / "all_data_0.json", {})
    assert_refused(folder, f"{folder / 'test'}: no user in its files")


def without(name):
    return {key: value for key, value in content_of({"f": (images(1), [0])}).items() if key != name}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "[" * 100_000,
        "1" * 5000,
        "{}",
        *[json.dumps(without(name)) for name in ("users", "num_samples", "user_data")],
        json.dumps(without("users") | {"users": 3}),
        json.dumps(without("users") | {"users": ["f", "g"]}),
        json.dumps(without("users") | {"users": ["g"]}),
        json.dumps(without("user_data") | {"user_data": {"f": {"x": []}}}),
        b"\xff\xfe\x00",
    ],
)
def test_files_that_are_none_of_leaf(folder, text):
    path = folder / "train" / "all_data_1.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(folder, f"{path}: not a LEAF file, or damaged", "users, num_samples and user_data")


@pytest.mark.parametrize(
    "content",
    [
        without("user_data") | {"user_data": {"f": {"x": [], "y": []}, "g": {"x": [], "y": []}}},
        without("user_data") | {"user_data": {"f": {"x": "no", "y": []}}},
        without("user_data") | {"user_data": {"f": {"x": [], "y": 0}}},
    ],
)
def test_users_that_do_not_go_with_their_data(folder, content):
    path = folder / "train" / "all_data_1.json"
    path.write_text(json.dumps(content))
    assert_refused(folder, f"{path}: users and user_data do not go together")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[0.5] * 784], [0, 1], "1 images and 2 classes"),
        ([[0.5] * 784], [3], "row 0: label 3 is out of range; the model has 3 classes, so labels must be 0..2"),
        ([[0.5] * 784], [-1], "label -1 is out of range"),
        ([[0.5] * 784], [0.0], "labels are float64"),
        ([[0.5] * 784], ["0"], "labels are <U1"),
        ([[0.5] * 784], [[0]], "of shape (1, 1)"),
        ([[0.5] * 784], [None], "labels are object"),
        ([[0.5] * 783], [0], "images are float64 of shape (1, 783); each image must be 784 numbers in 0..1"),
        ([[0.5] * 784, [0.5] * 783], [0, 1], "images of different sizes"),
        ([[[0.5] * 28] * 28], [0], "of shape (1, 28, 28)"),
        ([["0.5"] * 784], [0], "images are <U3"),
        ([[None] * 784], [0], "images are object"),
        ([], [0], "images are float64 of shape (0,)"),
        ([[0.5] * 783 + [1.01]], [0], "a pixel is outside 0..1"),
        ([[0.5] * 783 + [-0.01]], [0], "a pixel is outside 0..1"),
        ([[0.5] * 783 + [float("nan")]], [0], "a pixel is outside 0..1"),
    ],
)
def test_images_and_classes_that_are_wrong(folder, x, y, message):
    path = folder / "test" / "all_data_0.json"
    path.write_text(json.dumps({"users": ["f"], "num_samples": [len(y)], "user_data": {"f": {"x": x, "y": y}}}))
    assert_refused(folder, f"{path}, user 'f'", message)


def test_a_count_that_is_wrong(folder):
    content = content_of({"f": (images(2), [0, 1])}) | {"num_samples": [3]}
    (folder / "test" / "all_data_0.json").write_text(json.dumps(content))
    assert_refused(folder, "user 'f': 2 classes, and num_samples says 3")


def test_a_user_in_two_files(folder):
    write(folder / "train" / "other_sampling.json", {"f1": (images(1), [0])})
    assert_refused(folder, "other_sampling.json, user 'f1': there already in all_data_0.json")


def test_models_for_other_images(folder):
    assert_refused(folder, "the images are 28x28", "takes 32x32", "--input-shape 1,28,28", shape=(1, 32, 32))
    assert_refused(folder, "1 or 3 channels", "takes 2", shape=(2, 28, 28))
