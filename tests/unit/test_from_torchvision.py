"""torchvision's data sets, on small files of the same formats."""

import gzip
import hashlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from slt_planner.data.datasets import default_root, load_dataset
from slt_planner.data.from_torchvision import EMNIST_SPLITS
from tests.unit.tiny_images import as_tensor, assert_load_refused, random_pixels

TRAIN, TEST = 10, 4  # images


def load(root, name="cifar10", shape=(3, 32, 32), num_classes=100, download=False):
    return load_dataset(name, shape, num_classes, root=root, download=download)


def assert_refused(root, name, *parts, **arguments):
    assert_load_refused(lambda folder, **given: load(folder, name, **given), root, *parts, **arguments)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels_of(train, side=32, channels=3):
    return random_pixels(TRAIN if train else TEST, side, side, channels, seed=int(train))


def labels_of(train, classes):
    return np.random.default_rng(int(train)).integers(classes, size=TRAIN if train else TEST)


def pickled(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, md5(path)]


def write_cifar(monkeypatch, root, kind, label_key, classes, batches):
    """The python version of CIFAR, and torchvision told the sums of these files."""
    folder = root / kind.base_folder
    names = {True: [name for name, _ in kind.train_list], False: [kind.test_list[0][0]]}
    for train, attribute in ((True, "train_list"), (False, "test_list")):
        planes = as_tensor(pixels_of(train)).reshape(-1, 3072).numpy()  # red, green, blue, row after row
        rows = np.array_split(np.arange(len(planes)), batches if train else 1)
        labels = labels_of(train, classes).tolist()
        entries = [
            pickled(folder / name, {"data": planes[own], label_key: [labels[row] for row in own]})
            for name, own in zip(names[train], rows, strict=True)
        ]
        monkeypatch.setattr(kind, attribute, entries)
    name, total = pickled(folder / kind.meta["filename"], {kind.meta["key"]: ["class"] * classes})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": name, "md5": total})


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    write_cifar(monkeypatch, tmp_path, datasets.CIFAR10, "labels", 10, batches=5)
    return tmp_path


def write_idx(path, array):
    """The format of MNIST: 0, 0, the type, the number of sizes, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_fashion_mnist(root):
    for train, name in ((True, "train"), (False, "t10k")):
        write_idx(root / f"FashionMNIST/raw/{name}-images-idx3-ubyte", pixels_of(train, 28, 1)[..., 0])
        write_idx(root / f"FashionMNIST/raw/{name}-labels-idx1-ubyte", labels_of(train, 10))


def write_emnist(root, split, first=0):
    for train, name in ((True, "train"), (False, "test")):
        on_their_side = pixels_of(train, 28, 1)[..., 0].transpose(0, 2, 1)
        write_idx(root / f"EMNIST/raw/emnist-{split}-{name}-images-idx3-ubyte", on_their_side)
        labels = labels_of(train, EMNIST_SPLITS[split]) + first
        write_idx(root / f"EMNIST/raw/emnist-{split}-{name}-labels-idx1-ubyte", labels)


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    sums = dict(datasets.SVHN.split_list)
    for train, name in ((True, "train"), (False, "test")):
        labels = labels_of(train, 10)
        path = tmp_path / f"{name}_32x32.mat"
        content = {"X": pixels_of(train).transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]}
        scipy.io.savemat(path, content)
        sums[name] = ["http://127.0.0.1:9/" + path.name, path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    return tmp_path


def assert_as_written(dataset, classes, side=32, channels=3):
    for train, images, labels in (
        (True, dataset.train_images, dataset.train_labels),
        (False, dataset.test_images, dataset.test_labels),
    ):
        assert torch.equal(images, as_tensor(pixels_of(train, side, channels)))
        assert images.is_contiguous()
        assert labels.tolist() == labels_of(train, classes).tolist()
        assert labels.dtype == torch.int64
    assert dataset.train_groups is None


# sound


def test_cifar10(cifar10):
    dataset = load(cifar10)
    assert_as_written(dataset, 10)
    assert (dataset.title, dataset.augment, dataset.num_classes) == ("CIFAR-10", True, 100)


def test_cifar100_has_its_fine_labels(tmp_path, monkeypatch):
    write_cifar(monkeypatch, tmp_path, datasets.CIFAR100, "fine_labels", 100, batches=1)
    dataset = load(tmp_path, "cifar100")
    assert_as_written(dataset, 100)
    assert (dataset.title, dataset.augment) == ("CIFAR-100", True)


def test_svhn_counts_zero_as_class_zero(svhn):
    dataset = load(svhn, "svhn")
    assert_as_written(dataset, 10)
    assert (dataset.title, dataset.augment) == ("SVHN", False)


def test_fashion_mnist(tmp_path):
    write_fashion_mnist(tmp_path)
    dataset = load(tmp_path, "fashion-mnist", (1, 28, 28))
    assert_as_written(dataset, 10, 28, 1)
    assert (dataset.title, dataset.augment) == ("Fashion-MNIST", True)
    colour = load(tmp_path, "fashion-mnist", (3, 28, 28))
    assert torch.equal(colour.train_images, dataset.train_images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("split", EMNIST_SPLITS)
def test_emnist_stands_upright_and_counts_from_zero(tmp_path, split):
    write_emnist(tmp_path, split, first=int(split == "letters"))
    dataset = load(tmp_path, f"emnist:{split}", (1, 28, 28))
    assert_as_written(dataset, EMNIST_SPLITS[split], 28, 1)
    assert (dataset.title, dataset.augment) == (f"EMNIST {split}", False)


def test_emnist_is_balanced_if_nothing_is_said(tmp_path):
    write_emnist(tmp_path, "balanced")
    assert load(tmp_path, "emnist", (1, 28, 28)).title == "EMNIST balanced"


def test_classes_of_emnist_are_those_of_torchvision():
    for split, classes in EMNIST_SPLITS.items():
        names = datasets.EMNIST.classes_split_dict[split]
        assert classes == len([name for name in names if name != "N/A"])


def test_the_root_is_the_users_data_folder_if_none_is_given(cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "home" / name))
    assert default_root() == tmp_path / "home" / "slt_planner" / "datasets"
    assert_refused(None, "cifar10", f"in {default_root()};")
    default_root().mkdir(parents=True)
    (cifar10 / "cifar-10-batches-py").rename(default_root() / "cifar-10-batches-py")
    assert_as_written(load(None), 10)


# unsound


@pytest.mark.parametrize(
    ("name", "shape", "file"),
    [
        ("cifar10", (3, 32, 32), "cifar-10-batches-py/data_batch_1"),
        ("cifar100", (3, 32, 32), "cifar-100-python/train"),
        ("fashion-mnist", (1, 28, 28), "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("emnist:letters", (1, 28, 28), "EMNIST/raw/emnist-letters-train-images-idx3-ubyte"),
        ("svhn", (3, 32, 32), "train_32x32.mat"),
    ],
)
def test_missing_files_say_where_and_which_options_help(tmp_path, name, shape, file):
    words = (f"dataset {name}: no {file} in {tmp_path};", "--data-root", "--download")
    assert_refused(tmp_path, name, *words, shape=shape)
    assert_refused(tmp_path / "nowhere", name, f"in {tmp_path / 'nowhere'};", shape=shape)
    assert not list(tmp_path.iterdir())  # nothing is made there


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_one_missing_file_is_named(cifar10, file):
    (cifar10 / "cifar-10-batches-py" / file).unlink()
    assert_refused(cifar10, "cifar10", f"no cifar-10-batches-py/{file} in {cifar10};")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a file was run",)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_whose_sum_is_wrong_is_never_loaded(cifar10, file):
    path = cifar10 / "cifar-10-batches-py" / file
    path.write_bytes(pickle.dumps(Bomb()))
    assert_refused(cifar10, "cifar10", f"{path} is damaged (not the MD5 sum it should have)", "with --download")


def test_a_damaged_svhn_file(svhn):
    path = svhn / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(svhn, "svhn", f"{path} is damaged")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda content: b"x" * 100, lambda content: content[:-1]])
@pytest.mark.parametrize(("file", "which"), [("train-images-idx3-ubyte", "train"), ("t10k-labels-idx1-ubyte", "test")])
def test_a_damaged_idx_file(tmp_path, file, which, damage):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    words = f"dataset fashion-mnist: the {which} files in {tmp_path} cannot be read, at least one is damaged"
    assert_refused(tmp_path, "fashion-mnist", words, "--download", shape=(1, 28, 28))


@pytest.mark.parametrize("images", [np.zeros((10, 27, 28)), np.zeros((9, 28, 28))])
def test_idx_files_of_other_sizes(tmp_path, images):
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte", images)
    assert_refused(tmp_path, "fashion-mnist", "the train files", "as many of both, of 28x28", shape=(1, 28, 28))


def test_idx_files_without_images(tmp_path):
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte", np.zeros((0, 28, 28)))
    write_idx(tmp_path / "FashionMNIST/raw/train-labels-idx1-ubyte", np.zeros(0))
    assert_refused(tmp_path, "fashion-mnist", "the train files", "--download", shape=(1, 28, 28))


def test_a_file_that_may_not_be_read(cifar10, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "data_batch_1")

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", refuse)
    assert_refused(cifar10, "cifar10", "dataset cifar10: data_batch_1 cannot be read (Permission denied)")


def test_a_label_that_no_class_has(tmp_path):
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "FashionMNIST/raw/t10k-labels-idx1-ubyte", np.array([1, 2, 10, 3]))
    assert_refused(tmp_path, "fashion-mnist", "the test files", "row 2: label 10", "0..9", shape=(1, 28, 28))


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("emnist", "EMNIST")])
def test_pickles_of_old_versions_are_refused(tmp_path, name, folder):
    write_fashion_mnist(tmp_path)
    write_emnist(tmp_path, "balanced")
    old = tmp_path / folder / "processed" / "training.pt"
    old.parent.mkdir()
    old.write_bytes(pickle.dumps(Bomb()))
    assert_refused(tmp_path, name, f"{old} is a pickle of an old torchvision; remove it", shape=(1, 28, 28))


def test_models_for_other_images_are_refused_before_anything_is_read(tmp_path):
    assert_refused(tmp_path, "cifar10", "images are 32x32", "takes 32x28", "--input-shape 3,32,32", shape=(3, 32, 28))
    assert_refused(tmp_path, "emnist", "images are 28x28", "--input-shape 1,28,28", shape=(1, 32, 32))
    assert_refused(tmp_path, "svhn", "1 or 3 channels", "takes 2", shape=(2, 32, 32))
    assert_refused(tmp_path, "cifar100", "cifar100 has 100 classes, the model 99; give it", num_classes=99)
    assert_refused(tmp_path, "emnist:letters", "emnist:letters has 26 classes", shape=(1, 28, 28), num_classes=25)
    assert_refused(tmp_path, "emnist:x", "emnist has no split 'x'; known are balanced, byclass", shape=(1, 28, 28))


# downloads: from archives that are there already, since torchvision then asks no server


def test_a_download_unpacks_and_then_reads(cifar10, tmp_path, monkeypatch, capsys):
    archive = tmp_path / "elsewhere" / datasets.CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar10 / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    assert_refused(archive.parent, "cifar10", "--download")
    assert_as_written(load(archive.parent, download=True), 10)
    archive.unlink()
    assert_as_written(load(archive.parent, download=True), 10)  # what is there is not fetched again
    assert not capsys.readouterr().out  # which belongs to results


def test_emnist_is_unpacked_from_its_one_archive(tmp_path, monkeypatch):
    write_emnist(tmp_path / "made", "digits")
    root = tmp_path / "root"
    archive = root / "EMNIST" / "raw" / "gzip.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "made" / "EMNIST" / "raw").iterdir():
            file.writestr(f"gzip/{path.name}.gz", gzip.compress(path.read_bytes()))
    monkeypatch.setattr(datasets.EMNIST, "md5", md5(archive))
    dataset = load(root, "emnist:digits", (1, 28, 28), download=True)
    assert_as_written(dataset, 10, 28, 1)


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [(datasets.CIFAR10, "cifar10", (3, 32, 32)), (datasets.FashionMNIST, "fashion-mnist", (1, 28, 28))],
)
def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, kind, name, shape):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/x.tar.gz", raising=False)  # nobody listens there
    monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"], raising=False)
    words = f"could not be fetched into {tmp_path} ("
    assert_refused(tmp_path, name, f"dataset {name}: ", words, "refused", shape=shape, download=True)
