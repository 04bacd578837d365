import io
import subprocess
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from slt_planner.data import images as images_module
from slt_planner.data.datasets import load_dataset, normalise
from slt_planner.data.images import channel_statistics, to_channels
from slt_planner.errors import InputError
from tests.unit.tiny_images import SHAPE, as_tensor, assert_load_refused, random_pixels


def code(pixels, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, form)
    return file.getvalue()


def write(path, images, labels, image_column="img", label_column="label", **options):
    """A file in the layout of Hugging Face datasets; `images` are coded bytes or None."""
    structs = pa.array(
        [{"bytes": image, "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    pq.write_table(pa.table({image_column: structs, label_column: labels}), path, **options)


def write_split(folder, name, pixels, labels, form="PNG", **columns):
    write(folder / name, [code(image, form) for image in pixels], labels, **columns)


@pytest.fixture
def folder(tmp_path):
    """A sound dataset: 5 train and 3 test images of 4x6."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_split(folder, "train.parquet", random_pixels(5), [0, 1, 2, 1, 0])
    write_split(folder, "test.parquet", random_pixels(3, seed=1), [2, 1, 0])
    return folder


def load(folder, shape=SHAPE, num_classes=3):
    return load_dataset(f"parquet:{folder}", shape, num_classes)


assert_refused = partial(assert_load_refused, load)


# digits


def test_digits_at_their_own_size_are_the_ones_of_scikit_learn():
    dataset = load_dataset("digits", (1, 8, 8), 10)
    assert dataset.train_images.shape == (1437, 1, 8, 8)
    assert dataset.test_images.shape == (360, 1, 8, 8)
    images = torch.cat([dataset.train_images, dataset.test_images])
    labels = torch.cat([dataset.train_labels, dataset.test_labels])
    source = load_digits()
    expected = np.round(source.images * 255 / 16).astype(np.uint8)
    ours = sorted((image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))
    theirs = sorted((image.tobytes(), label) for image, label in zip(expected, source.target.tolist(), strict=True))
    assert ours == theirs  # each image once, with its own label


def test_digits_are_brought_to_the_input_shape():
    small, large = load_dataset("digits", (1, 8, 8), 10), load_dataset("digits", (3, 16, 16), 10)
    assert large.train_images.shape == (1437, 3, 16, 16)
    assert large.train_images.is_contiguous()
    assert torch.equal(large.train_images[:, 0], large.train_images[:, 2])
    assert torch.equal(large.train_labels, small.train_labels)
    # Bilinear at twice the size: the second and third pixel of a row lie 1/4 and 3/4 between the first two.
    row = small.train_images[:, 0, 0, :2].float()
    between = large.train_images[:, 0, 0, 1:3].float()
    assert (
        between - torch.stack([row @ torch.tensor([0.75, 0.25]), row @ torch.tensor([0.25, 0.75])], 1)
    ).abs().max() < 1
    assert large.title == "handwritten digits (scikit-learn, 1,797 images of 8x8, resized to 16x16)"
    assert not large.augment


def test_digits_are_always_split_the_same_way_with_all_classes_on_both_sides():
    first, second = load_dataset("digits", (1, 8, 8), 10), load_dataset("digits", (1, 8, 8), 12)
    assert torch.equal(first.test_images, second.test_images)
    assert second.num_classes == 12
    assert first.train_labels.bincount().min() > 120
    assert first.test_labels.bincount(minlength=10).min() > 20


def test_digits_need_ten_classes():
    with pytest.raises(InputError, match="digits has 10 classes, the model 9"):
        load_dataset("digits", (1, 8, 8), 9)


# parquet, sound


def test_parquet_gives_the_pixels_and_labels_that_were_written(folder):
    dataset = load(folder)
    assert torch.equal(dataset.train_images, as_tensor(random_pixels(5)))
    assert torch.equal(dataset.test_images, as_tensor(random_pixels(3, seed=1)))
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_images.is_contiguous()
    assert dataset.train_labels.tolist() == [0, 1, 2, 1, 0]
    assert dataset.test_labels.tolist() == [2, 1, 0]
    assert dataset.train_labels.dtype == torch.int64
    assert dataset.num_classes == 3
    assert dataset.augment


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_title_names_the_folder_and_the_coding(folder, form):
    write_split(folder, "train.parquet", random_pixels(2), [0, 1], form=form)
    assert load(folder).title == f"tiny ({form})"
    assert load(f"{folder}/").title == f"tiny ({form})"


def test_jpeg_images_are_those_that_pillow_decodes(folder):
    write_split(folder, "train.parquet", random_pixels(2), [0, 1], form="JPEG")
    expected = np.stack([np.asarray(Image.open(io.BytesIO(code(p, "JPEG")))) for p in random_pixels(2)])
    assert torch.equal(load(folder).train_images, as_tensor(expected))


def test_statistics_are_of_the_train_pixels_and_normalise_applies_them(folder):
    dataset = load(folder)
    pixels = random_pixels(5) / 255
    assert dataset.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist(), abs=1e-12)
    assert dataset.std == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist(), abs=1e-12)
    before = dataset.train_images.clone()
    result = normalise(dataset.train_images, dataset)
    assert result.dtype == torch.float32
    assert torch.equal(dataset.train_images, before)
    expected = (pixels - pixels.mean(axis=(0, 1, 2))) / pixels.std(axis=(0, 1, 2))
    torch.testing.assert_close(result, torch.from_numpy(expected).permute(0, 3, 1, 2).float(), atol=1e-5, rtol=0)


def test_a_constant_channel_is_not_blown_up(folder):
    pixels = random_pixels(4)
    pixels[..., 1] = 77
    write_split(folder, "train.parquet", pixels, [0, 1, 2, 0])
    dataset = load(folder)
    assert dataset.std[1] == 1.0
    assert normalise(dataset.train_images, dataset)[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize("image_column", ["img", "image"])
@pytest.mark.parametrize("label_column", ["label", "labels", "fine_label"])
def test_the_usual_column_names_are_known(folder, image_column, label_column):
    columns = {"image_column": image_column, "label_column": label_column}
    write_split(folder, "train.parquet", random_pixels(2), [0, 1], **columns)
    assert load(folder).train_labels.tolist() == [0, 1]


def test_shards_are_read_in_their_order(folder):
    (folder / "train.parquet").unlink()
    pixels = random_pixels(5)
    write_split(folder, "train-00001-of-00002.parquet", pixels[2:], [2, 1, 0])
    write_split(folder, "train-00000-of-00002.parquet", pixels[:2], [0, 1])
    dataset = load(folder)
    assert torch.equal(dataset.train_images, as_tensor(pixels))
    assert dataset.train_labels.tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("name", ["validation.parquet", "valid.parquet", "validation-00000-of-00001.parquet"])
def test_validation_serves_where_there_is_no_test(folder, name):
    write_split(folder, name, random_pixels(1), [1])
    assert len(load(folder).test_labels) == 3  # test comes first
    (folder / "test.parquet").unlink()
    assert load(folder).test_labels.tolist() == [1]


def test_grey_images_and_colour_images_go_to_the_channels_of_the_model(folder):
    grey = random_pixels(2, channels=1)
    write_split(folder, "train.parquet", grey, [0, 1])
    dataset = load(folder, (3, 4, 6))
    assert torch.equal(dataset.train_images, as_tensor(grey).expand(-1, 3, -1, -1))
    single = load(folder, (1, 4, 6))
    assert torch.equal(single.train_images, as_tensor(grey))
    assert single.test_images.shape == (3, 1, 4, 6)  # in colour on disk
    assert len(single.mean) == 1


def test_files_of_more_rows_than_are_read_at_once(folder):
    pixels, count = random_pixels(7), 2500
    coded = [code(image) for image in pixels]
    write(
        folder / "train.parquet",
        [coded[row % 7] for row in range(count)],
        [row % 3 for row in range(count)],
        row_group_size=900,
    )
    dataset = load(folder)
    assert torch.equal(dataset.train_images, as_tensor(pixels)[torch.arange(count) % 7])
    assert torch.equal(dataset.train_labels, torch.arange(count) % 3)


# parquet, unsound


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("", None),
        ("cats", None),
        ("mnist", "emnist"),
        ("parquet", "parquet:DIR"),
        ("masks:", "masks:DIR"),
        ("digits:8", "digits"),
        ("cifar10:x", "cifar10"),
        ("CIFAR-10", "cifar10"),
        ("fashionmnist", "fashion-mnist"),
        ("fashion_mnist", "fashion-mnist"),
        ("tinyimagenet:x", "tiny-imagenet:DIR"),
        ("image-folder:x", "imagefolder:DIR"),
        ("emnist:", "emnist"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(name, meant):
    with pytest.raises(InputError) as error:
        load_dataset(name, SHAPE, 3)
    message = str(error.value)
    assert message.startswith(f"unknown dataset {name!r}")
    assert (f"did you mean {meant}?" in message) if meant else "did you mean" not in message
    for known in ("digits", "cifar10", "cifar100", "fashion-mnist", "emnist", "svhn", "parquet:DIR", "imagefolder:DIR"):
        assert known in message.split("known are")[1]
    for known in ("masks:DIR", "femnist:DIR", "tiny-imagenet:DIR", "imagenet64:DIR"):
        assert known in message.split("known are")[1]


@pytest.mark.parametrize("name", ["digits", "parquet:x", "femnist:x"])
def test_what_is_never_downloaded_says_so(name):
    with pytest.raises(InputError, match=f"^dataset '{name}' is not for --download; cifar10, .* are$"):
        load_dataset(name, SHAPE, 10, download=True)


def test_a_missing_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere", "no such folder")


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [("train.parquet", "train*.parquet"), ("test.parquet", "test*.parquet or validation")],
)
def test_a_missing_split(folder, missing, wanted):
    (folder / missing).unlink()
    assert_refused(folder, str(folder), "has no", wanted)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet"],
        ["train.parquet", "train-00000-of-00001.parquet"],
        ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    ],
)
def test_shards_that_are_not_the_whole_split_once(folder, names):
    (folder / "train.parquet").unlink()
    for name in names:
        write_split(folder, name, random_pixels(1), [0])
    assert_refused(folder, *names, "not one whole set")


@pytest.mark.parametrize(("column", "wanted"), [("image_column", "img or image"), ("label_column", "label or labels")])
def test_a_missing_column_names_the_columns_there_are(folder, column, wanted):
    write_split(folder, "train.parquet", random_pixels(1), [0], **{column: "other"})
    there = {"image_column": "other, label", "label_column": "img, other"}[column]
    assert_refused(folder, "train.parquet", wanted, f"the columns there are: {there}")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x"]),
        pa.array([{"path": "x.png"}]),
        pa.array([{"bytes": "text"}]),
    ],
)
def test_an_image_column_without_bytes(folder, column):
    pq.write_table(pa.table({"img": column, "label": [0]}), folder / "train.parquet")
    assert_refused(folder, "train.parquet", "'img'", str(column.type), "struct {bytes: binary, path: string}")


@pytest.mark.parametrize("labels", [pa.array(["cat"]), pa.array([0.5]), pa.array([None])])
def test_labels_that_are_not_integers(folder, labels):
    write(folder / "train.parquet", [code(random_pixels(1)[0])], labels)
    assert_refused(folder, "train.parquet", "'label'", str(labels.type), "must be integers")


def test_a_file_without_rows(folder):
    write(folder / "test.parquet", [], [])
    assert_refused(folder, "test.parquet", "no rows")


@pytest.mark.parametrize("content", [b"", b"not parquet at all, but long enough to be read as one"])
def test_a_file_that_is_not_parquet(folder, content):
    (folder / "test.parquet").write_bytes(content)
    assert_refused(folder, "test.parquet", "not a parquet file")


@pytest.mark.parametrize("column", ["img", "label"])
def test_a_damaged_column(folder, column):
    path = folder / "train.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    chunk = next(chunk for chunk in columns if chunk.path_in_schema.startswith(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    assert_refused(folder, "train.parquet", repr(column), "damaged")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no image", lambda coded: coded[: len(coded) * 2 // 3]])
def test_an_image_that_cannot_be_decoded(folder, form, damage):
    coded = [code(image, form) for image in random_pixels(3)]
    write(folder / "test.parquet", [*coded[:2], damage(coded[2])], [0, 1, 2])
    assert_refused(folder, "test.parquet, row 2", "cannot be decoded")


def test_an_image_that_is_not_there(folder):
    write(folder / "test.parquet", [code(random_pixels(1)[0]), None], [0, 1])
    assert_refused(folder, "test.parquet, row 1", "no image bytes")


def test_a_row_without_image_struct(folder):
    structs = pa.array([{"bytes": code(random_pixels(1)[0])}, None], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"img": structs, "label": [0, 1]}), folder / "test.parquet")
    assert_refused(folder, "test.parquet, row 1", "no image bytes")


def test_an_image_of_another_size(folder):
    images = [code(random_pixels(1)[0]), code(random_pixels(1, height=6, width=4)[0])]
    write(folder / "train.parquet", images, [0, 1])
    assert_refused(folder, "train.parquet, row 1", "6x4", "takes 4x6")


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range(folder, label):
    write_split(folder, "test.parquet", random_pixels(3), [0, label, 1])
    assert_refused(folder, "test.parquet, row 1", f"label {label}", "must be 0..2")


def test_a_null_label(folder):
    write_split(folder, "train.parquet", random_pixels(3), [0, 1, None])
    assert_refused(folder, "train.parquet, row 2", "null")


# parquet with a column of writers


def write_with(path, column, values):
    """Two images a value, labels 0 and 1."""
    structs = pa.array([{"bytes": code(image)} for image in random_pixels(len(values))])
    pq.write_table(pa.table({"image": structs, "character": [0, 1, 2][: len(values)], column: values}), path)


@pytest.mark.parametrize("column", ["writer_id", "client_id", "user_id"])
@pytest.mark.parametrize("values", [["b", "a", "b"], [70, -3, 70], pa.array(["b", "a", "b"]).dictionary_encode()])
def test_images_of_a_writer_are_a_group(folder, column, values):
    write_with(folder / "train.parquet", column, values)
    dataset = load(folder)
    assert dataset.train_groups.tolist() == [1, 0, 1]
    assert dataset.train_groups.dtype == torch.int64
    assert dataset.train_labels.tolist() == [0, 1, 2]
    assert dataset.augment == (column != "writer_id")  # mirrored handwriting is none


def test_a_writer_may_have_images_in_several_files(folder):
    (folder / "train.parquet").unlink()
    write_with(folder / "train-00000-of-00002.parquet", "writer_id", ["b", "a"])
    write_with(folder / "train-00001-of-00002.parquet", "writer_id", ["c", "b"])
    assert load(folder).train_groups.tolist() == [1, 0, 2, 1]


def test_without_such_a_column_there_are_no_groups(folder):
    assert load(folder).train_groups is None


@pytest.mark.parametrize("other", ["user_id", "unknown"])
def test_train_files_with_different_writer_columns(folder, other):
    (folder / "train.parquet").unlink()
    write_with(folder / "train-00000-of-00002.parquet", "writer_id", ["b", "a"])
    write_with(folder / "train-00001-of-00002.parquet", other, ["c", "b"])
    assert_refused(folder, str(folder), "name writers in different columns", "writer_id")


def test_train_files_with_different_types_of_writers(folder):
    (folder / "train.parquet").unlink()
    write_with(folder / "train-00000-of-00002.parquet", "writer_id", ["70", "a"])
    write_with(folder / "train-00001-of-00002.parquet", "writer_id", [70, 71])
    assert_refused(folder, str(folder), "writer_id is a number in some train files and a string in others")


@pytest.mark.parametrize("values", [["a", None], [1, None], [0.5, 1.5], [["a"], ["b"]]])
def test_a_writer_that_is_none(folder, values):
    write_with(folder / "train.parquet", "writer_id", values)
    assert_refused(folder, "train.parquet, row ", "writer_id is ", "a number or a name")


def test_a_model_of_neither_one_nor_three_channels(folder):
    assert_refused(folder, "1 or 3 channels", "takes 4", shape=(4, 4, 6))


def test_importing_the_module_loads_none_of_the_readers():
    script = (
        "import sys, slt_planner.data.datasets\n"
        "print([name for name in ('pyarrow', 'sklearn', 'PIL', 'torchvision', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# what all formats share


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 4, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_that_are_tensors_are_converted_as_pillow_converts_files(channels, shape, monkeypatch):
    monkeypatch.setattr(images_module, "_IMAGES_AT_ONCE", 5)  # so that there are several pieces
    pixels = random_pixels(23, channels=channels)
    mode = {1: "L", 3: "RGB"}
    expected = [Image.fromarray(p.squeeze(-1) if channels == 1 else p).convert(mode[shape[0]]) for p in pixels]
    expected = torch.from_numpy(np.stack([np.asarray(image).reshape(4, 6, shape[0]) for image in expected]))
    result = to_channels(as_tensor(pixels), shape[0])
    assert torch.equal(result, expected.permute(0, 3, 1, 2))
    assert result.is_contiguous()


def test_statistics_do_not_depend_on_pieces(monkeypatch):
    images = as_tensor(random_pixels(23))
    whole = channel_statistics(images)
    monkeypatch.setattr(images_module, "_IMAGES_AT_ONCE", 5)
    assert channel_statistics(images) == whole
