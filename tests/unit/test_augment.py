import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from slt_planner.data.augment import crop_flip, random_crop_flip


def reference(images, tops, lefts, flips, padding):
    """Image by image, with nothing but slices."""
    _, channels, height, width = images.shape
    results = []
    for image, top, left, flip in zip(images, tops.tolist(), lefts.tolist(), flips.tolist(), strict=True):
        canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=images.dtype)
        canvas[:, padding : padding + height, padding : padding + width] = image
        crop = canvas[:, top : top + height, left : left + width]
        results.append(crop.flip(2) if flip else crop)
    return torch.stack(results)


def random_images(count=6, channels=3, height=8, width=8, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, channels, height, width), generator=generator).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(0, 4),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loop_over_images(shape, padding, dtype, seed):
    images = random_images(*shape, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tops, lefts = torch.randint(2 * padding + 1, (2, shape[0]), generator=generator)
    flips = torch.randint(2, (shape[0],), generator=generator).bool()
    result = crop_flip(images, tops, lefts, flips, padding)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result, reference(images, tops, lefts, flips, padding))


def test_offsets_at_the_padding_without_flip_leave_the_images_alone():
    images = random_images()
    middle = torch.full((len(images),), 4)
    assert torch.equal(crop_flip(images, middle, middle, torch.zeros(len(images), dtype=torch.bool), 4), images)


def test_one_worked_example():
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    # Top row 0 of the padded image, left column 1: a row of padding, then the image's first row, flipped.
    result = crop_flip(image, torch.tensor([0]), torch.tensor([1]), torch.tensor([True]), padding=1)
    assert result.tolist() == [[[[0, 0], [2, 1]]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_generator_decides(dtype):
    images = random_images(32, dtype=dtype)
    before = images.clone()
    first = random_crop_flip(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, random_crop_flip(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, random_crop_flip(images, torch.Generator().manual_seed(2)))
    assert torch.equal(images, before)  # the images given stay as they are


def test_the_global_seed_is_left_alone():
    state = torch.get_rng_state()
    random_crop_flip(random_images(), torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_last_images_give_the_same_result_contiguous():
    images = random_images(16)
    expected = random_crop_flip(images, torch.Generator().manual_seed(3))
    result = random_crop_flip(images.to(memory_format=torch.channels_last), torch.Generator().manual_seed(3))
    assert result.is_contiguous()
    assert torch.equal(result, expected)


def test_all_offsets_and_flips_are_drawn_evenly():
    # One bright pixel in the middle of 9x9 shows where each image went; the flip mirrors only the column.
    count, padding = 16_200, 4
    images = torch.zeros(count, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 1
    images[:, :, 4, 3] = 2  # left of it before a flip, right of it after
    moved = random_crop_flip(images, torch.Generator().manual_seed(0), padding)
    _, _, rows, columns = (moved == 1).nonzero(as_tuple=True)
    assert len(rows) == count  # padding 4 never pushes the middle of 9 pixels out
    places = torch.bincount(rows * 9 + columns, minlength=81)
    assert len(places) == 81
    # 200 are expected at each of 81 places, standard deviation 14.
    assert places.min() > 130
    assert places.max() < 270
    # Where both pixels are in sight: 8 of 9 columns.
    _, _, _, marks = (moved == 2).nonzero(as_tuple=True)
    seen = (moved == 2).flatten(1).any(1)
    flipped = (marks > columns[seen]).float().mean().item()
    assert flipped == pytest.approx(0.5, abs=0.02)


class Operators(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_batch_takes_as_many_operators_as_one_image():
    ran = {}
    for count in (1, 500):
        with Operators() as operators:
            random_crop_flip(random_images(count), torch.Generator().manual_seed(0))
        ran[count] = operators.names
    assert ran[1] == ran[500]
    assert sum("aten.gather" in name for name in ran[500]) == 1  # pixels are moved once
