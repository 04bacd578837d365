"""Made-up images, and how loading what is made of them fails: for the tests of data sets."""

import numpy as np
import pytest
import torch

from slt_planner.errors import InputError

SHAPE = (3, 4, 6)  # height and width differ, so that a mix-up shows


def random_pixels(count, height=4, width=6, channels=3, seed=0):
    """(count, height, width, channels), as image files are laid out."""
    return np.random.default_rng(seed).integers(256, size=(count, height, width, channels), dtype=np.uint8)


def as_tensor(pixels):
    """(count, channels, height, width)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def assert_load_refused(load, folder, *parts, **arguments):
    """Loading fails in one line that holds all of these."""
    with pytest.raises(InputError) as error:
        load(folder, **arguments)
    message = str(error.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message
