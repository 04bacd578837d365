"""Predicted memory against real tensors counted by a plain loop, against measured steps, and against hand counting."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from slt_planner.config import Config, Optimizer, StepSpec
from slt_planner.errors import InputError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.flops import training_flops
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract
from tests.plain_tensors import plain_tensor_peak
from tests.reference_networks import HandCutDenseNet
from tests.reference_resnet import HandCutResNet

# Small operators are not worth two threads, and what a kernel takes differs a little with their number.
pytestmark = pytest.mark.usefixtures("one_thread")

FULL = (0, 0, 1.0)


class LastChannels(nn.Module):
    """A layer over the last dimension, used on the channels of images."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Plus(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def all_activations():
    """Layers whose gradients torch's fake tensors lay out, or number, in their own way."""
    functions = (
        *(nn.Hardswish(), nn.Hardsigmoid(), nn.ReLU6(), nn.LogSigmoid(), nn.ELU(), nn.Softplus(), nn.LeakyReLU()),
        *(nn.Mish(), nn.PReLU(), nn.SiLU(), nn.GELU(), nn.Dropout(0.5), nn.Dropout2d(0.5)),
    )
    rows = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), function) for function in functions]
    return nn.Sequential(nn.Conv2d(3, 6, 1), *rows, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


def all_norms():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.ReflectionPad2d(1), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Upsample(scale_factor=2), nn.Conv2d(8, 12, 1)),
        *(LastChannels(nn.LayerNorm(12)), nn.ConvTranspose2d(12, 8, 2, 2), nn.InstanceNorm2d(8, affine=True)),
        *(Plus(nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1, groups=4)), nn.AdaptiveMaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Sigmoid(), nn.Linear(24, 10)),
    )


OWN = {"activations": all_activations, "norms": all_norms}
SIZES = dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5"), 64)
SIZES |= dict.fromkeys(("efficientnet_b0", "squeezenet1_1", "swin_t"), 64) | dict.fromkeys(OWN, 16)

# A covering selection: every network has the values that are most likely to hurt it, and every value of a setting
# meets small and large heads, frozen prefixes, and each of the other settings.
CASES = [
    ("resnet20", FULL, {"batch_size": 4}),
    ("resnet20", (4, 5, 0.5), {"batch_size": 4, "optimizer": "adam", "memory_format": "channels_last"}),
    ("resnet20", (0, 0, 1 / 64), {"batch_size": 3, "precision": "bf16", "memory_format": "channels_last"}),
    ("resnet20", (18, 19, 1.0), {"optimizer": Optimizer(name="adamw", foreach=True), "set_to_none": False}),
    ("resnet20", (9, 12, 0.25), {"precision": "autocast", "norms": "running", "optimizer": Optimizer(momentum=0.0)}),
    ("resnet32_pad", (3, 9, 0.4375), {"precision": "bf16", "optimizer": Optimizer(weight_decay=0.0, foreach=True)}),
    ("densenet40", (7, 9, 0.5), {"precision": "bf16", "memory_format": "channels_last", "norms": "running"}),
    ("convnet", FULL, {"optimizer": "adam", "precision": "autocast", "memory_format": "channels_last"}),
    ("convnet", (0, 1, 0.4375), {"batch_size": 1, "optimizer": Optimizer(name="adamw", weight_decay=0.0)}),
    ("convnet", (2, 3, 1.0), {"batch_size": 32, "set_to_none": False}),
    ("vgg9", (0, 4, 0.25), {"precision": "bf16", "optimizer": "adamw", "set_to_none": False}),
    ("vgg9", FULL, {"batch_size": 16, "optimizer": Optimizer(foreach=True), "precision": "autocast"}),
    ("vit_cifar", (3, 5, 1 / 3), {"optimizer": "adamw"}),
    ("vit_cifar", (0, 0, 2 / 3), {"precision": "autocast", "optimizer": Optimizer(foreach=True), "set_to_none": False}),
    ("vit_cifar", FULL, {"precision": "bf16", "batch_size": 3}),
    ("mobilenet_v2", (5, 9, 0.25), {"memory_format": "channels_last", "precision": "autocast", "norms": "running"}),
    ("mobilenet_v3_small", (2, 6, 0.5), {"memory_format": "channels_last", "optimizer": "adam"}),
    ("shufflenet_v2_x0_5", FULL, {"precision": "bf16", "optimizer": Optimizer(name="adam", foreach=True)}),
    ("efficientnet_b0", (4, 7, 0.25), {"precision": "autocast", "norms": "running", "set_to_none": False}),
    ("squeezenet1_1", (8, 9, 0.125), {"batch_size": 1, "optimizer": "adamw"}),
    ("swin_t", (6, 8, 0.25), {"precision": "autocast", "batch_size": 1}),
    ("activations", FULL, {"memory_format": "channels_last"}),
    ("activations", FULL, {"precision": "bf16", "memory_format": "channels_last", "optimizer": "adam"}),
    ("activations", FULL, {"precision": "autocast"}),
    ("norms", FULL, {"memory_format": "channels_last", "optimizer": Optimizer(momentum=0.0)}),
    ("norms", (1, 2, 0.5), {"precision": "bf16", "norms": "running", "optimizer": Optimizer(foreach=True)}),
    ("norms", (0, 1, 0.5), {"precision": "autocast", "norms": "running", "memory_format": "channels_last"}),
]
EACH_CASE = pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{n}-{c}-{i}" for i, (n, c, _) in enumerate(CASES)]
)


@cache
def graph_of(name):
    size = SIZES.get(name, 32)
    model = OWN[name]() if name in OWN else load_model(name, 10, (3, size, size), weights=False)
    return trace(model, (3, size, size))


@cache
def subject(case):
    name, numbers, settings = CASES[case]
    config = Config(freeze_depth=numbers[0], full_depth=numbers[1], head_scale=numbers[2])
    return graph_of(name), config, StepSpec(**{"batch_size": 2, "threads": 1, **settings})


@cache
def predicted(case):
    graph, config, spec = subject(case)
    calibrate(graph, [config], spec)
    return predict(graph, config, spec)


@cache
def measured(case):
    graph, config, spec = subject(case)
    return measure(extract(graph, None, config, spec.norms), spec)


def plain(module, spec, shape=(3, 32, 32)):
    """The plain loop on the step's settings."""
    return plain_tensor_peak(
        module,
        spec.batch_size,
        shape,
        optimizer=spec.optimizer.name,
        precision=spec.precision,
        memory_format=spec.memory_format,
        set_to_none=spec.set_to_none,
        foreach=spec.optimizer.foreach,
        momentum=spec.optimizer.momentum,
        weight_decay=spec.optimizer.weight_decay,
    )


@EACH_CASE
def test_the_tensor_ruler_is_that_of_real_tensors_to_the_byte(case):
    graph, config, spec = subject(case)
    before_calibration = predict(graph, config, spec, details=False)
    real = plain(extract(graph, None, config, spec.norms), spec, graph.input_shape)
    assert before_calibration.tensor_peak_bytes == real


@EACH_CASE
def test_the_tensor_ruler_is_the_measured_one_to_the_byte(case):
    assert predicted(case).tensor_peak_bytes == measured(case).tensor_peak_bytes


@EACH_CASE
def test_the_calibrated_peak_is_the_measured_one(case):
    assert predicted(case).exact
    assert predicted(case).missing == ()
    assert abs(predicted(case).peak_bytes / measured(case).peak_bytes - 1) < 0.005


@EACH_CASE
def test_what_is_there_at_the_begin_and_each_unit_are_as_measured(case):
    assert predicted(case).resident == measured(case).resident
    assert predicted(case).units == measured(case).units


@EACH_CASE
def test_breakdown_and_timeline_say_the_same_as_the_peak(case):
    for profile in (predicted(case), measured(case)):
        assert sum(profile.breakdown.values()) == profile.peak_bytes
        assert max(point.live_bytes for point in profile.timeline) == profile.peak_bytes
        live = dict(profile.resident)
        for point in profile.timeline:
            live[point.category] += point.change_bytes
            assert sum(live.values()) == point.live_bytes
            if point.live_bytes == profile.peak_bytes:
                break
        assert live == profile.breakdown
        assert (point.operator, point.unit) == (profile.peak_operator, profile.peak_unit)


@EACH_CASE
def test_the_rows_of_the_units_add_up_to_the_network(case):
    graph, config, spec = subject(case)
    rows, resident = predicted(case).units, predicted(case).resident
    sub = extract(graph, None, config, spec.norms)
    size = 2 if spec.precision == "bf16" else 4
    trained = [parameter for parameter in sub.parameters() if parameter.requires_grad]
    assert [row.index for row in rows] == list(range(1, graph.depth + 2))
    assert sum(row.parameters for row in rows) == sum(parameter.numel() for parameter in sub.parameters())
    assert sum(row.weights_bytes for row in rows) == resident["weights"]
    assert resident["weights"] == size * sum(parameter.numel() for parameter in sub.parameters())
    assert sum(row.gradients_bytes for row in rows) == resident["gradients"]
    assert resident["gradients"] == size * sum(parameter.numel() for parameter in trained)
    assert sum(row.optimizer_bytes for row in rows) == resident["optimizer"]
    assert predicted(case).breakdown["activations"] <= sum(row.activations_bytes for row in rows)
    assert all(row.gradients_bytes == row.optimizer_bytes == 0 for row in rows if row.index <= config.freeze_depth)
    assert sum(row.training_flops for row in rows) == training_flops(sub)


@pytest.mark.parametrize("numbers", [FULL, (0, 0, 0.5), (2, 3, 1 / 64), (4, 9, 0.5)], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_cut_by_hand_needs_what_is_predicted(numbers, optimizer):
    """Nothing in common but the step's description: another network, another loop, another count."""
    network = HandCutResNet.of_resnet20(load_model("resnet20"), *numbers)
    config = Config(freeze_depth=numbers[0], full_depth=numbers[1], head_scale=numbers[2])
    spec = StepSpec(batch_size=4, optimizer=optimizer)
    assert predict(graph_of("resnet20"), config, spec, details=False).tensor_peak_bytes == plain(network, spec)


def test_a_network_of_concatenations_cut_by_hand_needs_what_is_predicted():
    config = Config(freeze_depth=5, full_depth=20, head_scale=0.25)
    network = HandCutDenseNet(config.full_depth, config.head_scale)
    network.load_from(load_model("densenet40"), config.freeze_depth)
    spec = StepSpec(batch_size=2)
    assert predict(graph_of("densenet40"), config, spec, details=False).tensor_peak_bytes == plain(network, spec)


def test_details_change_no_number():
    graph, config, spec = subject(1)
    calibrate(graph, [config], spec)
    short, long = predict(graph, config, spec, details=False), predict(graph, config, spec)
    assert short == long.model_copy(update={"units": (), "timeline": (), "peak_unit": 0})


# Calibration and its cache


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """What is learned is loaded once a folder, so that another folder is another cache."""
    monkeypatch.setenv("SLT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_calibration_the_tensor_peak_is_told_and_what_is_missing(empty_cache):
    graph, spec = graph_of("resnet20"), StepSpec(batch_size=2, threads=1)
    config, other = Config.full_network(), Config(freeze_depth=4, full_depth=5, head_scale=0.5)
    before = predict(graph, config, spec)
    assert not before.exact
    assert before.peak_bytes == before.tensor_peak_bytes == sum(before.breakdown.values())
    assert before.breakdown["workspace"] == 0
    assert len(before.missing) > 50
    assert list(before.missing) == sorted(set(before.missing))
    told = []
    first = calibrate(graph, [config], spec, progress=lambda done, of: told.append((done, of)))
    assert first.learned == len(before.missing)
    assert told[-1] == (first.learned, first.learned)
    assert told == sorted(told)
    after = predict(graph, config, spec)
    assert after.exact
    assert after.peak_bytes > before.peak_bytes
    assert after.tensor_peak_bytes == before.tensor_peak_bytes
    assert after.units == before.units
    # The same again has nothing to learn; another configuration only what it does not share.
    again = calibrate(graph, [config], spec)
    assert (again.learned, again.operators) == (0, first.operators)
    missing = predict(graph, other, spec).missing
    assert calibrate(graph, [config, other], spec).learned == len(missing) > 0
    assert predict(graph, other, spec).exact
    # What kernels take depends on the number of threads.
    assert not predict(graph, config, StepSpec(batch_size=2, threads=2)).exact


PREDICTING = """
import sys
import slt_planner as slt
graph = slt.trace(slt.load_model("convnet"), (3, 32, 32))
profile = slt.predict(graph, slt.Config.full_network(), slt.StepSpec(batch_size=2, threads=1), details=False)
sys.stdout.write(f"{profile.exact} {profile.peak_bytes}")
"""


def test_another_process_finds_what_was_learned(empty_cache):
    graph, config, spec = graph_of("convnet"), Config.full_network(), StepSpec(batch_size=2, threads=1)
    calibrate(graph, [config], spec)
    assert run_alone(PREDICTING) == f"True {predict(graph, config, spec).peak_bytes}"


def run_alone(program, *arguments, **environment):
    """What a fresh process writes; it sees the same cache and one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_a_cache_that_cannot_be_used_is_told_in_one_line(tmp_path, monkeypatch):
    graph, config, spec = graph_of("convnet"), Config.full_network(), StepSpec(batch_size=2, threads=1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLT_CACHE", str(tmp_path / "file"))  # no folder can be here
    told_in_one_line(lambda: calibrate(graph, [config], spec), "SLT_CACHE")
    # A file that is no database.
    monkeypatch.setenv("SLT_CACHE", str(tmp_path / "known"))
    calibrate(graph, [config], spec)
    (written,) = (tmp_path / "known").glob("*.sqlite")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / written.name).write_bytes(b"no database at all" * 1000)
    monkeypatch.setenv("SLT_CACHE", str(tmp_path / "broken"))
    told_in_one_line(lambda: predict(graph, config, spec), "SLT_CACHE")
    told_in_one_line(lambda: calibrate(graph, [config], spec), "SLT_CACHE")


def told_in_one_line(work, about):
    with pytest.raises(InputError, match=about) as caught:
        work()
    assert "\n" not in str(caught.value)


# Invariants of the tensor ruler


def tensor_peak(graph, spec, freeze_depth, full_depth, head_scale):
    config = Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)
    return predict(graph, config, spec, details=False).tensor_peak_bytes


BLOCKS = {
    "narrow": lambda i: (nn.Conv2d(i, 4, 1, bias=False), 4),
    "wide": lambda i: (nn.Conv2d(i, 12, 3, padding=1), 12),
    "strided": lambda i: (nn.Conv2d(i, 8, 3, 2, 1), 8),
    "grouped": lambda i: (nn.Sequential(nn.Conv2d(i, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)), 6),
    "transposed": lambda i: (nn.ConvTranspose2d(i, 5, 2, 2), 5),
    "norm": lambda i: (nn.BatchNorm2d(i), i),
    "relu": lambda i: (nn.ReLU(), i),
    "relu in place": lambda i: (nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(inplace=True)), i),
    "gelu": lambda i: (nn.GELU(), i),
    "dropout": lambda i: (nn.Dropout(0.2), i),
    "pool": lambda i: (nn.MaxPool2d(3, 2, 1), i),
    "residual": lambda i: (Plus(nn.Conv2d(i, i, 3, padding=1), nn.BatchNorm2d(i)), i),
}


@cache
def small_graph(kinds):
    layers, channels = [nn.Conv2d(3, 8, 3, padding=1)], 8
    for kind in kinds:
        layer, channels = BLOCKS[kind](channels)
        layers.append(layer)
    return trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)), (3, 8, 8))


GRAPHS = st.one_of(
    st.sampled_from(["resnet20", "densenet40", "convnet"]).map(graph_of),
    st.lists(st.sampled_from(sorted(BLOCKS)), max_size=6).map(tuple).map(small_graph),
)
SPECS = st.builds(
    StepSpec,
    batch_size=st.integers(2, 9),
    optimizer=st.builds(Optimizer, name=st.sampled_from(["sgd", "adam", "adamw"]), foreach=st.booleans()),
    precision=st.sampled_from(["fp32", "bf16", "autocast"]),
    memory_format=st.sampled_from(["contiguous", "channels_last"]),
    set_to_none=st.booleans(),
    norms=st.sampled_from(["static", "running"]),
    threads=st.just(1),
)


@given(data=st.data(), graph=GRAPHS, spec=SPECS)
@settings(max_examples=10, deadline=None)
def test_below_full_width_the_peak_never_falls_with_the_head_scale(data, graph, spec):
    full_depth = data.draw(st.integers(0, graph.depth - 1), label="full depth")
    freeze_depth = data.draw(st.integers(0, max(0, full_depth - 1)), label="freeze depth")
    scales = [scale for scale in graph.head_scales(full_depth) if scale < 1]
    assume(len(scales) > 1)
    chosen = data.draw(st.lists(st.sampled_from(scales), min_size=2, max_size=2, unique=True), label="scales")
    peaks = [tensor_peak(graph, spec, freeze_depth, full_depth, scale) for scale in sorted(chosen)]
    assert peaks == sorted(peaks)


@given(data=st.data(), graph=GRAPHS, spec=SPECS)
@settings(max_examples=10, deadline=None)
def test_at_full_width_the_peak_never_rises_with_the_freeze_depth(data, graph, spec):
    assume(graph.depth > 1)
    depths = st.lists(st.integers(0, graph.depth - 1), min_size=2, max_size=2, unique=True)
    chosen = data.draw(depths, label="freeze depths")
    peaks = [tensor_peak(graph, spec, depth, depth + 1, 1.0) for depth in sorted(chosen, reverse=True)]
    assert peaks == sorted(peaks)


# Memory that predicting and calibrating take themselves

GROWING = """
import sys
import slt_planner as slt
from slt_planner.memory.process import peak_resident_bytes
from slt_planner.models.registry import Weightless
from torch import nn

full, spec = slt.Config.full_network(), slt.StepSpec(batch_size=2, threads=1)
"""

PREDICTING_A_LARGE_ONE = """
slt.predict(slt.trace(slt.load_model("resnet20"), (3, 32, 32)), full, spec)
before = peak_resident_bytes()
graph = slt.trace(slt.load_model("regnet_y_128gf", weights=False), (3, 224, 224))
profile = slt.predict(graph, full, spec)
sys.stdout.write(f"{peak_resident_bytes() - before} {profile.resident['weights']} {profile.tensor_peak_bytes}")
"""


def test_predicting_allocates_nothing_of_the_networks_size():
    grown, weights, peak = map(int, run_alone(GROWING + PREDICTING_A_LARGE_ONE).split())
    assert weights > 2.5e9
    assert peak > 8e9
    assert grown < 0.1e9


CALIBRATING_LARGE_LAYERS = """
def graph_of(widths):
    pairs = zip([12, *widths], [*widths, 10])
    with Weightless():
        layers = [nn.Linear(incoming, out) for incoming, out in pairs]
    return slt.trace(nn.Sequential(nn.Flatten(), *layers), (3, 2, 2))

slt.calibrate(graph_of([8, 9]), [full], spec)
before = peak_resident_bytes()
graph = graph_of([int(width) for width in sys.argv[1:]])
slt.calibrate(graph, [full], spec)
sys.stdout.write(f"{peak_resident_bytes() - before} {slt.predict(graph, full, spec).peak_bytes}")
"""


def test_calibrating_takes_no_more_than_the_largest_operator(empty_cache):
    widths = [str(width) for width in range(2000, 2200, 20)]  # no two layers alike: each has operators of its own
    # glibc would keep freed blocks of up to 32 MB in a heap full of holes; larger ones than this it gives back at once.
    written = run_alone(GROWING + CALIBRATING_LARGE_LAYERS, *widths, MALLOC_MMAP_THRESHOLD_="65536")
    grown, peak = map(int, written.split())
    # Weight decay: a gradient and a weight go in, another gradient comes out.
    largest = 3 * 4 * int(widths[-1]) * int(widths[-2])
    assert peak > 8 * largest
    assert grown < 1.2 * largest


# What cannot be predicted is refused


class Choosing(Adapter):
    """A loss that looks at values."""

    def __init__(self, look):
        self.look = look

    def loss(self, outputs, labels):
        return F.cross_entropy(outputs, labels) * self.look(outputs, labels)


LOOKS = {
    "item": lambda outputs, labels: outputs.max().item(),
    "condition": lambda outputs, labels: 2 if (labels == 3).any() else 1,
    "mask": lambda outputs, labels: outputs[labels == 3].sum(),
    "nonzero": lambda outputs, labels: len(labels.nonzero()),
    "numpy": lambda outputs, labels: float(outputs.detach().numpy().sum()),
    "list": lambda outputs, labels: sum(labels.tolist()),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_step_that_looks_at_values_is_refused(look):
    """An answer would be a guess: what comes next may depend on the value."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    graph = trace(network, (3, 8, 8), adapter=Choosing(LOOKS[look]))
    config, spec = Config.full_network(), StepSpec(batch_size=2, threads=1)
    assert measure(extract(graph, None, config), spec, details=False).peak_bytes > 0
    told_in_one_line(lambda: predict(graph, config, spec), "measure")


class Detached(torch.autograd.Function):
    """A gradient that looks at values."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient.abs().max() < 10)


class Clipping(Adapter):
    def loss(self, outputs, labels):
        return F.cross_entropy(Detached.apply(outputs), labels)


def test_a_backward_pass_that_looks_at_values_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    graph = trace(network, (3, 8, 8), adapter=Clipping())
    spec = StepSpec(batch_size=2, threads=1)
    assert measure(extract(graph, None, Config.full_network()), spec, details=False).peak_bytes > 0
    told_in_one_line(lambda: predict(graph, Config.full_network(), spec), "measure")


def test_shapes_that_come_of_real_numbers_are_told_apart():
    """Two calls of one operator that differ in nothing but a float, which decides how much memory it gives."""

    class Ramp(Adapter):
        def __init__(self, end):
            self.end = end

        def loss(self, outputs, labels):
            return F.cross_entropy(outputs, labels) + torch.arange(0.0, self.end, 0.5).sum()

    for end in (8.0, 100_000.0):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        graph = trace(network, (3, 8, 8), adapter=Ramp(end))
        spec = StepSpec(batch_size=2, threads=1)
        predicted = predict(graph, Config.full_network(), spec)
        assert predicted.tensor_peak_bytes == measure(extract(graph, None, predicted.config), spec).tensor_peak_bytes, (
            end
        )


def test_detectors_are_refused():
    graph = trace(load_model("ssdlite320_mobilenet_v3_large", weights=False), (3, 320, 320))
    spec = StepSpec(batch_size=2)
    told_in_one_line(lambda: predict(graph, Config.full_network(), spec), "depend on data.*measured, not predicted")
    told_in_one_line(lambda: calibrate(graph, [Config.full_network()], spec), "depend on data")


@pytest.mark.parametrize("name", ["swin_t", "efficientnet_b0"])
def test_networks_that_make_fp32_tensors_of_their_own_take_no_bf16(name):
    graph, spec = graph_of(name), StepSpec(batch_size=2, precision="bf16")
    calls = {node.name for node in graph.programs[True].graph.nodes if node.op.startswith("call_")}
    for work in (
        lambda: predict(graph, Config.full_network(), spec),
        lambda: measure(extract(graph, None, Config.full_network()), spec),
    ):
        with pytest.raises(InputError, match=r"makes tensors of fp32.*use autocast") as caught:
            work()
        assert str(caught.value).partition(":")[0] in calls


def test_batch_norm_over_one_value_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 6, 8), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 5))
    graph, config = trace(network, (3, 8, 8)), Config.full_network()
    for work in (predict, lambda graph, config, spec: measure(extract(graph, None, config), spec)):
        told_in_one_line(lambda work=work: work(graph, config, StepSpec(batch_size=1)), "batch 1: batch norm")
        assert work(graph, config, StepSpec(batch_size=2)).peak_bytes > 0


def test_configurations_beyond_the_network_are_refused():
    graph, spec = graph_of("convnet"), StepSpec(batch_size=2)
    beyond = Config(freeze_depth=0, full_depth=graph.depth + 1, head_scale=0.5)
    told_in_one_line(lambda: predict(graph, beyond, spec), "full_depth")
    told_in_one_line(lambda: calibrate(graph, [beyond], spec), "full_depth")


# Arithmetic


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("resnet20", FULL),
        ("resnet20", (18, 19, 1.0)),
        ("resnet20", (0, 4, 0.25)),
        ("vgg9", (2, 3, 0.5)),
        ("mobilenet_v2", (6, 8, 0.5)),
    ],
    ids=str,
)
def test_arithmetic_is_what_hand_counting_says(name, numbers):
    graph = graph_of(name)
    config = Config(freeze_depth=numbers[0], full_depth=numbers[1], head_scale=numbers[2])
    images = 3
    sub = extract(graph, None, config)
    forward, training, hooks = 0, 0, []

    def count(layer, inputs, output):
        # A weight meets each position of the output once; both gradients do as many products again.
        nonlocal forward, training
        positions = output.numel() // output.shape[1] // images
        products = layer.weight.numel() * positions
        forward += products
        training += 2 * products * (1 + layer.weight.requires_grad + inputs[0].requires_grad)

    for layer in sub.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(count))
    sub(torch.randn(images, *graph.input_shape))
    for hook in hooks:
        hook.remove()
    rows = predict(graph, config, StepSpec(batch_size=images)).units
    assert sum(row.forward_multiply_adds for row in rows) == forward
    assert sum(row.training_flops for row in rows) == training
    assert training_flops(sub) == training
