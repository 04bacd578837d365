import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slt_planner.data.datasets import load_dataset, normalise
from slt_planner.data.partition import partition
from tests.unit.tiny_images import SHAPE, as_tensor, assert_load_refused, random_pixels


def random_masks(count, classes=3, seed=0):
    """(count, 4, 6): every class, and pixels that do not count."""
    return np.random.default_rng(seed).choice([*range(classes), 255], size=(count, 4, 6)).astype(np.uint8)


def save(path, pixels, form="PNG"):
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path, form)


def save_palette(path, mask, bits=8):
    image = Image.fromarray(mask).convert("L")
    image.putpalette(np.random.default_rng(0).permutation(256 * 3).astype(np.uint8).tobytes())
    assert image.mode == "P"
    image.save(path, "PNG", bits=bits)


def write_split(split, pixels, masks, form="PNG", suffix=".png"):
    for name in ("images", "masks"):
        (split / name).mkdir(parents=True)
    for index, (image, mask) in enumerate(zip(pixels, masks, strict=True)):
        save(split / "images" / f"{index:02}{suffix}", image, form)
        save(split / "masks" / f"{index:02}.png", mask)


@pytest.fixture
def folder(tmp_path):
    """A sound dataset: 5 train and 3 test images of 4x6, three classes."""
    folder = tmp_path / "tiny"
    write_split(folder / "train", random_pixels(5), random_masks(5))
    write_split(folder / "test", random_pixels(3, seed=1), random_masks(3, seed=1))
    return folder


def load(folder, shape=SHAPE, num_classes=3):
    return load_dataset(f"masks:{folder}", shape, num_classes)


assert_refused = partial(assert_load_refused, load)


# sound


def test_pixels_and_classes_are_those_that_were_written(folder):
    dataset = load(folder)
    assert torch.equal(dataset.train_images, as_tensor(random_pixels(5)))
    assert torch.equal(dataset.test_images, as_tensor(random_pixels(3, seed=1)))
    assert torch.equal(dataset.train_labels, torch.from_numpy(random_masks(5)))
    assert torch.equal(dataset.test_labels, torch.from_numpy(random_masks(3, seed=1)))
    for tensor in (dataset.train_images, dataset.test_images, dataset.train_labels, dataset.test_labels):
        assert tensor.dtype == torch.uint8
        assert tensor.is_contiguous()
    assert dataset.num_classes == 3
    assert not dataset.augment
    assert dataset.title == "tiny (PNG, with masks)"


def test_statistics_are_of_the_train_pixels(folder):
    dataset = load(folder)
    pixels = random_pixels(5) / 255
    assert dataset.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist(), abs=1e-12)
    assert dataset.std == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist(), abs=1e-12)
    assert normalise(dataset.train_images, dataset).mean().abs() < 1e-5


def test_images_are_split_iid_with_their_masks(folder):
    parts = partition(load(folder).train_labels, 2, "iid", 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(5))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG"])
def test_jpeg_images_are_those_that_pillow_decodes(tmp_path, suffix):
    for split in ("train", "test"):
        write_split(tmp_path / split, random_pixels(2), random_masks(2), "JPEG", suffix)
    expected = [Image.open(tmp_path / "train" / "images" / f"{index:02}{suffix}") for index in range(2)]
    dataset = load(tmp_path)
    assert torch.equal(dataset.train_images, as_tensor(np.stack(expected)))
    assert dataset.title == f"{tmp_path.name} (JPEG, with masks)"


def test_grey_and_transparent_images_go_to_the_channels_of_the_model(folder):
    grey = random_pixels(1, channels=1)[0]
    save(folder / "train" / "images" / "00.png", grey)
    colour_and_alpha = random_pixels(1, channels=4)[0]
    save(folder / "train" / "images" / "01.png", colour_and_alpha)
    images = load(folder).train_images
    assert torch.equal(images[0], torch.from_numpy(grey).permute(2, 0, 1).expand(3, -1, -1))
    assert torch.equal(images[1], torch.from_numpy(colour_and_alpha[..., :3]).permute(2, 0, 1))
    single = load(folder, (1, 4, 6))
    assert single.train_images.shape == (5, 1, 4, 6)
    assert torch.equal(single.train_images[0], torch.from_numpy(grey).permute(2, 0, 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_of_a_palette_the_numbers_count_and_not_the_colours(folder, bits):
    mask = random_masks(1)[0] % min(3, 2**bits)
    save_palette(folder / "train" / "masks" / "02.png", mask, bits)
    assert (folder / "train" / "masks" / "02.png").read_bytes()[24:26] == bytes([bits, 3])
    assert torch.equal(load(folder).train_labels[2], torch.from_numpy(mask))


def test_255_in_a_palette_does_not_count_either(folder):
    mask = random_masks(1)[0]
    assert 255 in mask
    save_palette(folder / "train" / "masks" / "02.png", mask)
    assert torch.equal(load(folder).train_labels[2], torch.from_numpy(mask))


def test_images_and_masks_meet_by_stem_in_the_order_of_names(tmp_path):
    pixels, masks = random_pixels(4), random_masks(4)
    for split in ("train", "test"):
        write_split(tmp_path / split, [], [])
        # Written in another order, and with suffixes by which the two folders would sort differently.
        for index, suffix in ((3, ".jpg"), (0, ".png"), (2, ".jpeg"), (1, ".PNG")):
            stem = ("a", "a.b", "a_b", "b")[index]
            save(tmp_path / split / "images" / f"{stem}{suffix}", pixels[index])
            save(tmp_path / split / "masks" / f"{stem}.png", masks[index])
    dataset = load(tmp_path)
    assert torch.equal(dataset.train_images, as_tensor(pixels))
    assert torch.equal(dataset.train_labels, torch.from_numpy(masks))


def test_val_serves_where_there_is_no_test(folder):
    write_split(folder / "val", random_pixels(2), random_masks(2))
    assert len(load(folder).test_labels) == 3  # test comes first
    (folder / "test").rename(folder / "elsewhere")
    dataset = load(folder)
    assert len(dataset.test_labels) == len(dataset.test_images) == 2


def test_hidden_files_and_other_suffixes_are_not_looked_at(folder):
    for name in ("._00.png", ".DS_Store", "Thumbs.db", "list.txt"):
        for part in ("images", "masks"):
            (folder / "train" / part / name).write_bytes(b"no image")
    (folder / "train" / "images" / "more").mkdir()
    assert len(load(folder).train_labels) == 5


def test_links_are_followed(folder, tmp_path):
    for part in ("images", "masks"):
        (folder / "train" / part / "00.png").rename(tmp_path / f"{part}.png")
        (folder / "train" / part / "00.png").symlink_to(tmp_path / f"{part}.png")
    assert torch.equal(load(folder).train_labels, torch.from_numpy(random_masks(5)))


def test_as_many_classes_as_8_bits_tell_apart(folder):
    mask = np.arange(232, 256, dtype=np.uint8).reshape(4, 6)
    save(folder / "train" / "masks" / "00.png", mask)
    assert torch.equal(load(folder, num_classes=255).train_labels[0], torch.from_numpy(mask))


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 255), min_size=24, max_size=24),
    classes=st.integers(1, 255),
    palette=st.booleans(),
)
def test_a_mask_is_taken_as_it_is_or_refused_with_a_number_that_is_wrong(tmp_path_factory, numbers, classes, palette):
    folder = tmp_path_factory.mktemp("masks")
    mask = np.array(numbers, dtype=np.uint8).reshape(4, 6)
    for split in ("train", "test"):
        write_split(folder / split, random_pixels(1), random_masks(1, classes=1))
    (save_palette if palette else save)(folder / "test" / "masks" / "00.png", mask)
    wrong = [number for number in numbers if classes <= number < 255]
    if wrong or set(numbers) == {255}:
        what = f"class {wrong[0]} " if wrong else "every pixel is 255"
        assert_refused(folder, "test/masks/00.png", what, num_classes=classes)
    else:
        assert torch.equal(load(folder, num_classes=classes).test_labels[0], torch.from_numpy(mask))


# unsound


def test_a_missing_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", f"masks:{tmp_path / 'nowhere'}", "no such folder", "train and test (or val)")


@pytest.mark.parametrize(("missing", "wanted"), [("train", "has no train"), ("test", "has no test or val")])
def test_a_missing_split(folder, missing, wanted):
    (folder / missing).rename(folder / "other")
    assert_refused(folder, f"masks:{folder}", wanted)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_a_missing_part_of_a_split(folder, split, part, instead):
    (folder / split / part).rename(folder / "other")
    if instead == "a file":
        (folder / split / part).touch()
    assert_refused(folder, str(folder / split / part), "no such folder", "images", "masks")


@pytest.mark.parametrize("masks_too", [True, False])
def test_no_images_at_all(folder, masks_too):
    for part in ("images", "masks") if masks_too else ("images",):
        for path in (folder / "test" / part).iterdir():
            path.rename(path.with_suffix(".tif"))
    assert_refused(folder, str(folder / "test" / "images"), "no images", ".png, .jpg, .jpeg")


def test_an_image_without_a_mask(folder):
    (folder / "train" / "masks" / "03.png").unlink()
    assert_refused(folder, str(folder / "train" / "images" / "03.png"), "no mask;", "train/masks/03.png")
    (folder / "train" / "masks" / "04.png").unlink()
    (folder / "train" / "masks" / "01.png").unlink()
    assert_refused(folder, str(folder / "train" / "images" / "01.png"), "no mask (as for 2 more);")


def test_a_mask_that_is_no_png_by_its_name_is_none(folder):
    (folder / "train" / "masks" / "03.png").rename(folder / "train" / "masks" / "03.jpg")
    assert_refused(folder, str(folder / "train" / "images" / "03.png"), "no mask;")


def test_a_mask_without_an_image(folder):
    (folder / "test" / "images" / "01.png").unlink()
    assert_refused(folder, str(folder / "test" / "masks" / "01.png"), "no image for this mask;", "test/images/01 with")
    (folder / "test" / "images" / "02.png").unlink()
    assert_refused(folder, str(folder / "test" / "masks" / "01.png"), "no image for this mask (as for 1 more);")


@pytest.mark.parametrize(("part", "other"), [("images", "02.jpg"), ("masks", "02.PNG")])
def test_two_files_of_the_same_stem(folder, part, other):
    save(folder / "train" / part / other, random_masks(1)[0])
    assert_refused(folder, f"train/{part}/02", "02.png", other, "same name but for the suffix")


@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("what", ["dangling", "circle", "folder"])
def test_a_file_that_is_none(folder, part, what):
    path = folder / "test" / part / "01.png"
    path.unlink()
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if what == "circle" else "nowhere.png")
    assert_refused(folder, str(path), "cannot be read (")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no image", lambda coded: coded[: len(coded) * 2 // 3]])
def test_an_image_that_cannot_be_decoded(folder, damage):
    path = folder / "test" / "images" / "01.png"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(folder, str(path), "the image cannot be decoded", "JPEG or PNG")


@pytest.mark.parametrize("damage", [lambda coded: coded[:40], lambda coded: coded[: len(coded) * 2 // 3]])
def test_a_damaged_mask(folder, damage):
    path = folder / "test" / "masks" / "01.png"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(folder, str(path), "the mask cannot be decoded", "whole PNG files")


@pytest.mark.parametrize("form", ["", "text", "header", "JPEG", "BMP"])
def test_a_mask_that_is_not_a_png_file(folder, form):
    path = folder / "train" / "masks" / "01.png"
    if form in ("JPEG", "BMP"):
        save(path, random_masks(1)[0], form)
    else:
        path.write_bytes({"": b"", "text": b"no image" * 10, "header": path.read_bytes()[:20]}[form])
    assert_refused(folder, str(path), "not a PNG file, or damaged", "8-bit greyscale or palette PNG")


@pytest.mark.parametrize(
    ("mode", "what"),
    [("RGB", "8-bit RGB"), ("RGBA", "8-bit RGBA"), ("LA", "8-bit greyscale with alpha"), ("1", "1-bit greyscale")],
)
def test_a_mask_of_another_coding(folder, mode, what):
    path = folder / "train" / "masks" / "01.png"
    Image.fromarray(random_masks(1)[0]).convert(mode).save(path)
    assert_refused(folder, str(path), f"the mask is {what};", "8-bit greyscale or palette PNG")


def test_a_mask_of_16_bits(folder):
    path = folder / "train" / "masks" / "01.png"
    Image.fromarray(random_masks(1)[0].astype(np.uint16)).save(path)
    assert_refused(folder, str(path), "the mask is 16-bit greyscale;")


def grey_png(bits, rows, width):
    """Greyscale of few bits, which Pillow does not write; `rows` are packed pixels."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [2, 4])
def test_greyscale_of_few_bits_is_refused_and_not_scaled(folder, bits):
    coded = grey_png(bits, [b"\xff" * ((6 * bits + 7) // 8)] * 4, 6)
    # A decoder gives the largest class as 255, which would then silently not count.
    assert (np.asarray(Image.open(io.BytesIO(coded))) == 255).all()
    (folder / "train" / "masks" / "01.png").write_bytes(coded)
    assert_refused(folder, "train/masks/01.png", f"the mask is {bits}-bit greyscale;")


def test_an_image_of_another_size(folder):
    save(folder / "test" / "images" / "01.png", random_pixels(1, height=6, width=4)[0])
    assert_refused(folder, "test/images/01.png", "the image is 6x4", "takes 4x6")


def test_a_mask_of_another_size(folder):
    save(folder / "test" / "masks" / "01.png", np.zeros((6, 4), dtype=np.uint8))
    assert_refused(folder, "test/masks/01.png", "the mask is 6x4", "takes 4x6")


@pytest.mark.parametrize("number", [3, 200, 254])
def test_a_class_out_of_range(folder, number):
    mask = random_masks(1)[0]
    mask[2, 5] = number
    save(folder / "train" / "masks" / "04.png", mask)
    assert_refused(
        folder, str(folder / "train" / "masks" / "04.png"), f"class {number} (at row 2, column 5)", "must be 0..2, or"
    )


def test_a_mask_of_which_nothing_counts(folder):
    save(folder / "train" / "masks" / "04.png", np.full((4, 6), 255, dtype=np.uint8))
    assert_refused(folder, "train/masks/04.png", "every pixel is 255")


def test_more_classes_than_8_bits_tell_apart(folder):
    assert_refused(folder, f"masks:{folder}", "at most 255 classes", "has 256", num_classes=256)


def test_a_model_of_neither_one_nor_three_channels(folder):
    assert_refused(folder, f"masks:{folder}", "1 or 3 channels", "takes 4", shape=(4, 4, 6))
