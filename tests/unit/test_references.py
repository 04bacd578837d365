"""extract against networks cut by hand: concatenation, depthwise convolution, attention, windows that shift."""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer, mobilenet_v2, swin_t, vit_b_16
from torchvision.ops import StochasticDepth

from slt_planner.config import Config
from slt_planner.graph.trace import trace
from slt_planner.models.densenet_cifar import CifarDenseNet
from slt_planner.submodel.extract import extract
from tests.reference_networks import HandCut, HandCutDenseNet, HandCutMobileNetV2, HandCutSwin, HandCutViT

# Depthwise convolutions in double precision are thousands of tiny ones, which more threads only slow down.
pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}  # double precision; some gradients (a key's bias) are zero but for rounding


@dataclass(frozen=True)
class Case:
    """A network, its reference, and the units that the configurations must end at."""

    build: Callable[[], nn.Module]
    reference: Callable[[int, float], HandCut]
    shape: tuple[int, int, int]
    batch: int
    boundaries: tuple[int, ...] = ()


# As deep as vit_b_16 and swin_t, with heads of 8 channels for speed; the sizes below make swin_t pad and shift windows,
# and merge an odd number of patches.
SLIM_VIT = partial(VisionTransformer, 32, 16, 12, 12, 96, 384, num_classes=10)
SLIM_SWIN = partial(SwinTransformer, [4, 4], 24, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], num_classes=10)
CASES = {
    # inside the first block, at its transition, at the first layer after it
    "densenet40": Case(partial(CifarDenseNet, 12, 12), HandCutDenseNet, (3, 16, 16), 4, (7, 14, 15)),
    # after the stem, whose unit has two convolutions; between expansion and projection, without and with an addition
    "mobilenet_v2": Case(
        partial(mobilenet_v2, num_classes=10, dropout=0.0), HandCutMobileNetV2, (3, 64, 64), 3, (1, 3, 5)
    ),
    # after the patches; between two blocks; inside a block, after its attention and inside its perceptron
    "vit": Case(SLIM_VIT, partial(HandCutViT, size=8), (3, 32, 32), 3, (1, 4, 5, 6)),
    # inside a block of shifted windows; before a merging, and after it; after the second one
    "swin": Case(SLIM_SWIN, partial(HandCutSwin, size=8), (3, 40, 40), 2, (5, 6, 7, 8, 15)),
}
RANDOM_CASES = [(name, i) for name, case in CASES.items() for i in range(len(case.boundaries) + 5)]


@functools.cache
def network(name):
    return prepared(CASES[name].build, CASES[name].shape)


def prepared(build, shape):
    """The network without chance, and its graph.

    In double precision, so that the order of a sum does not matter, and with entries that all differ.
    """
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    graph = trace(model, shape)
    return model.double(), graph


def config_of(graph, name, index):
    """The warm-up, the whole depth, the boundaries that the case names, then anything; all at legal scales."""
    random = np.random.default_rng([index, zlib.crc32(name.encode())])
    chosen = (0, graph.depth, *CASES[name].boundaries)
    full_depth = chosen[index] if index < len(chosen) else int(random.integers(1, graph.depth))
    freeze_depth = int(random.integers(0, max(1, full_depth)))
    scales = graph.head_scales(full_depth)
    head_scale = float(random.choice(scales[:-1] if len(scales) > 1 else scales))
    return Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)


def assert_equal_training(graph, model, config, case):
    """The same logits, and the same gradient or none of each parameter."""
    sub = extract(graph, model, config, norms="static")
    reference = case.reference(config.full_depth, config.head_scale).double()
    reference.load_from(model, config.freeze_depth)
    images, labels = torch.randn(case.batch, *case.shape, dtype=torch.float64), torch.arange(case.batch)

    logits, expected = sub(images), reference(images)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    own = dict(sub.named_parameters())
    assert own.keys() == {name for _, name, _, _ in reference.entries}
    for parameter, name, unit, _ in reference.entries:
        gradient = own[name].grad
        assert (gradient is None) == (unit <= config.freeze_depth), name
        if gradient is not None:
            torch.testing.assert_close(gradient, parameter.grad, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_the_reference_at_full_width_is_the_network(name):
    (model, _), case = network(name), CASES[name]
    reference = case.reference(0, 1.0).double()
    reference.load_from(model, 0)
    images = torch.randn(case.batch, *case.shape, dtype=torch.float64)
    torch.testing.assert_close(reference(images), model.train()(images), **TOLERANCE)


@pytest.mark.parametrize(("name", "index"), RANDOM_CASES)
def test_outputs_and_gradients_equal_those_of_a_network_cut_by_hand(name, index):
    model, graph = network(name)
    assert_equal_training(graph, model, config_of(graph, name, index), CASES[name])


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (
            Case(partial(vit_b_16, image_size=32, num_classes=10), HandCutViT, (3, 32, 32), 2),
            Config(freeze_depth=4, full_depth=5, head_scale=1 / 3),
        ),
        (
            Case(partial(swin_t, num_classes=10), HandCutSwin, (3, 40, 40), 2),
            Config(freeze_depth=7, full_depth=9, head_scale=5 / 12),
        ),
    ],
    ids=["vit_b_16", "swin_t"],
)
def test_torchvision_s_own_transformers(case, config):
    """Cut between a block's attention and its perceptron."""
    model, graph = prepared(case.build, case.shape)
    assert config.head_scale in graph.head_scales(config.full_depth)
    assert_equal_training(graph, model, config, case)


@pytest.mark.parametrize("name", CASES)
def test_units_are_those_counted_by_hand(name):
    """Their number, and where each parameter freezes."""
    (_, graph), case = network(name), CASES[name]
    reference = case.reference(0, 1.0)
    assert graph.depth == len(graph.units) == reference.depth
    for freeze_depth in range(graph.depth):
        sub = extract(graph, None, Config(freeze_depth=freeze_depth, full_depth=graph.depth, head_scale=1.0))
        trained = {key for key, parameter in sub.named_parameters() if parameter.requires_grad}
        assert trained == {key for _, key, unit, _ in reference.entries if unit > freeze_depth}


@pytest.mark.parametrize("name", CASES)
def test_legal_scales_are_those_that_change_a_layer_of_the_head(name):
    """A layer of n steps keeps one of them below 2/n, so 1/n changes nothing; the least scale leaves one of each."""
    (_, graph), case = network(name), CASES[name]
    for full_depth in range(graph.depth):
        steps = case.reference(full_depth, 1.0).head_steps
        expected = {1 / max(steps), *(k / n for n in steps for k in range(2, n + 1))}
        assert list(graph.head_scales(full_depth)) == sorted(expected)
