"""The rewriting of programs: on small networks that share values in every way, what is written over was nobody's."""

import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from slt_planner.config import Config, StepSpec
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.limit import memory_limit
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.submodel import lean_operators as lean
from slt_planner.submodel.extract import extract
from slt_planner.submodel.lean_program import lean_program, trained_nodes
from slt_planner.submodel.pieces import in_pieces
from tests.unit.test_lean_steps import (
    EACH,
    LEVERS,
    assert_alike,
    assert_levers_change_nothing,
    config_of,
    in_double,
    network,
    run_twice_under,
    steady_step,
    take_steps,
    told,
)

pytestmark = pytest.mark.usefixtures("one_thread", "convolutions_in_parts")

CHANNELS, SIDE, CLASSES = 8, 6, 5


@pytest.fixture(scope="module")
def convolutions_in_parts():
    """Small convolutions run in parts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "SMALLEST_PART_BYTES", 1)
        yield


class First(Adapter):
    """The first output counts; others are auxiliary, and no part of the loss."""

    def scores(self, outputs):
        return outputs[0] if isinstance(outputs, tuple) else outputs


class Small(nn.Module):
    """A first convolution, layers to be wired in `between`, and a last convolution with the classifier."""

    norm = nn.BatchNorm2d

    def __init__(self, between, **layers):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, CHANNELS, 3, padding=1), self.norm(CHANNELS)
        for number in (1, 2, 3):
            self.add_module(f"conv{number}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=number == 3))
            self.add_module(f"norm{number}", self.norm(CHANNELS))
        self.last, self.out = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Linear(CHANNELS, CLASSES)
        self.relu = nn.ReLU(inplace=True)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.between = (between,)

    def forward(self, x):
        given = self.between[0](self, F.relu(self.stem_norm(self.stem(x))))
        x, *others = given if isinstance(given, tuple) else (given,)
        logits = self.out(F.relu(self.last(x)).mean((2, 3)))
        return (logits, *others) if others else logits


# Values that several operators take


def shortcut_used_twice(net, x):
    y = F.relu(net.norm1(net.conv1(x)) + x)
    return F.relu(net.norm2(net.conv2(y)) + x)


def norm_used_twice(net, x):
    y = net.norm1(net.conv1(x))
    return F.relu(y + x) + net.norm2(net.conv2(F.relu(y)))


def activation_used_twice(net, x):
    y = F.relu(net.norm1(net.conv1(x)))
    return net.norm2(net.conv2(y)) + net.conv3(y)


def activated_sum_used_thrice(net, x):
    y = F.relu(net.norm1(net.conv1(x)) + x)
    return net.norm2(net.conv2(y)) + net.conv3(y) + y


def both_operands_train(net, x):
    return net.norm1(net.conv1(x)) + net.norm2(net.conv2(x))


def both_operands_train_and_are_used_again(net, x):
    one, other = net.norm1(net.conv1(x)), net.norm2(net.conv2(x))
    return ((one + other) + one) * other


def sums_of_sums(net, x):
    return F.relu((net.norm1(net.conv1(x)) + net.norm2(net.conv2(x))) + net.conv3(x))


def a_value_added_to_itself(net, x):
    y = net.norm1(net.conv1(x))
    return F.relu(y + y)


def concatenated(net, x):
    y, z = net.norm1(net.conv1(x)), net.norm2(net.conv2(x))
    return (torch.cat([y, z], 1) + torch.cat([z, x], 1))[:, :CHANNELS] + y


def weighted_channels(net, x):
    y = net.norm1(net.conv1(x))
    return y * torch.sigmoid(net.conv3(y.mean((2, 3), keepdim=True))) + x


def smaller_operand(net, x):
    return F.relu(net.conv3(x.mean((2, 3), keepdim=True)) + net.norm1(net.conv1(x)))


def viewed_and_activated(net, x):
    y = net.norm1(net.conv1(x))
    turned = y.permute(0, 2, 3, 1)
    return F.relu(y) + turned.permute(0, 3, 1, 2)


# Activations and norms


def norms_without_activation(net, x):
    return net.norm2(net.norm1(net.conv1(x)))


def other_activations(net, x):
    x = F.silu(net.norm1(net.conv1(x)))
    return F.relu6(net.norm3(net.conv3(F.hardswish(net.norm2(net.conv2(x))))))


def activated_sums(net, x):
    y = F.relu6(net.norm1(net.conv1(x)) + x)
    return F.silu(F.hardswish(net.norm2(net.conv2(y)) + y) + x)


def activated_twice(net, x):
    y = F.relu(F.relu(net.norm1(net.conv1(x))))
    return F.relu6(F.relu(y + x))


def convolutions_without_norm(net, x):
    return F.relu(net.conv1(x)) + F.relu(net.conv2(x))


def in_place_modules(net, x):
    y = net.norm2(net.conv2(net.relu(net.norm1(net.conv1(x)))))
    y += x
    return net.relu(y)


def in_place_without_looking_at_what_is_given(net, x):
    y = net.norm1(net.conv1(x))
    net.relu(y)
    z = net.conv2(y)
    z.add_(x)
    return F.relu(z) * z


def in_place_function_before_a_sum(net, x):
    return F.relu_(net.conv1(x)) + x


def in_place_function_on_a_sum(net, x):
    y = torch.relu_(net.norm1(net.conv1(x)) + x)
    return y + net.conv2(y)


def scaled_in_place_and_used_twice(net, x):
    y = net.conv1(x)
    y *= 0.5
    return net.conv2(y) + y


def activated_in_place_and_used_twice(net, x):
    y = F.leaky_relu_(net.norm1(net.conv1(x)))
    z = torch.sigmoid_(net.norm2(net.conv2(y)))
    return F.elu(net.conv3(z), inplace=True) + z + y


def pooled(net, x):
    y = F.max_pool2d(F.relu(net.norm1(net.conv1(x))), 2)
    return F.avg_pool2d(net.norm2(net.conv2(y)), 2)


def mean_at_once(net, x):
    """The gradient of a mean is one number, seen everywhere."""
    y = net.norm1(net.conv1(x)) + net.norm2(net.conv2(x))
    return y.mean((2, 3), keepdim=True) + F.relu6(net.norm3(net.conv3(x))).sum((2, 3), keepdim=True)


def functional_norms(net, x):
    for number in ("1", "2"):
        norm, x = getattr(net, f"norm{number}"), getattr(net, f"conv{number}")(x)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, net.training)
        x = F.relu(x)
    return net.conv3(x)


# Values that have no part in the loss


def a_branch_without_gradient(net, x):
    one, other = net.norm1(net.conv1(x)), net.norm2(net.conv2(x))
    return (one + other) * other.detach()


def zeros_like_an_operand(net, x):
    one, other = net.norm1(net.conv1(x)), net.norm2(net.conv2(x))
    return (one + other) + other.new_zeros(1)


def an_operand_given_as_a_feature(net, x):
    one, other = net.norm1(net.conv1(x)), net.norm2(net.conv2(x))
    return one + other, other


def an_auxiliary_head_without_loss(net, x):
    one, other = net.norm1(net.conv1(x)), net.norm2(net.conv2(x))
    return one + other, net.conv3(other)


def a_norm_that_nobody_uses(net, x):
    net.norm2(net.conv2(x))
    return net.norm1(net.conv1(x))


def a_sum_that_nobody_uses(net, x):
    F.relu(net.norm1(net.conv1(x)) + x)
    return net.norm2(net.conv2(x)) + x


# What a network says itself


def cuts_of_its_own(net, x):
    return torch.cat([torch.narrow(x, 1, 0, 4), net.conv1(x).narrow(1, 4, 4)], 1)


def cuts_of_its_own_by_name(net, x):
    y = net.conv1(x)
    return torch.cat([torch.narrow(y, dim=1, start=4, length=4), torch.narrow(y, dim=1, start=0, length=4)], 1)


def positions_of_its_own(net, x):
    x = net.conv2(x)
    positions = net.conv3(net.norm2.weight.view(1, -1, 1, 1).expand(1, -1, SIDE, SIDE))
    return F.relu(x + positions)


def chained(net, x):
    return F.relu(net.norm2(net.conv2(F.relu(net.norm1(net.conv1(x))))))


WIRINGS = [
    *(shortcut_used_twice, norm_used_twice, activation_used_twice, activated_sum_used_thrice, both_operands_train),
    *(both_operands_train_and_are_used_again, sums_of_sums, a_value_added_to_itself, concatenated, weighted_channels),
    *(smaller_operand, viewed_and_activated, norms_without_activation, other_activations, activated_sums),
    *(activated_twice, convolutions_without_norm, in_place_modules, in_place_without_looking_at_what_is_given),
    *(in_place_function_before_a_sum, in_place_function_on_a_sum, pooled, mean_at_once, functional_norms),
    *(a_branch_without_gradient, zeros_like_an_operand, an_operand_given_as_a_feature, an_auxiliary_head_without_loss),
    *(a_norm_that_nobody_uses, a_sum_that_nobody_uses, cuts_of_its_own, cuts_of_its_own_by_name),
    *(positions_of_its_own, chained, scaled_in_place_and_used_twice, activated_in_place_and_used_twice),
]


class SameInEvaluation(nn.Conv2d):
    """A convolution with centred weights, whose forward is torch's own."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def conv(**settings):
    return nn.Conv2d(CHANNELS, CHANNELS, 3, **{"padding": 1, **settings})


LAYERS = {
    "norms that scale nothing": lambda: {f"norm{n}": nn.BatchNorm2d(CHANNELS, affine=False) for n in (1, 2)},
    "norms that keep no statistics": lambda: {"norm1": nn.BatchNorm2d(CHANNELS, track_running_stats=False)},
    "norms of each sample": lambda: {
        "norm1": nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
        "norm2": nn.GroupNorm(2, CHANNELS),
    },
    "norms of another momentum": lambda: {"norm1": nn.BatchNorm2d(CHANNELS, momentum=0.5, eps=1e-2)},
    "no norm": lambda: {"norm1": nn.Identity(), "norm2": nn.Identity()},
    "other paddings": lambda: {
        "conv1": conv(padding_mode="circular"),
        "conv2": conv(padding="same", dilation=2, groups=2),
    },
    "groups, strides and dilations": lambda: {
        "conv1": conv(groups=CHANNELS, stride=2),
        "conv2": conv(dilation=2, padding=2, bias=False),
    },
    "convolutions of its own": lambda: {f"conv{n}": SameInEvaluation(CHANNELS, CHANNELS, 3, padding=1) for n in (1, 2)},
    "dropout": lambda: {"norm1": nn.Dropout(0.5), "norm2": nn.Dropout2d(0.2)},
    "stochastic depth": lambda: {"norm1": torchvision.ops.StochasticDepth(0.5, "row")},
}

CONFIGS = [(0, 1, 0.5), (2, 3, 0.5)]  # all of these networks have three units or more


def small(between, **layers):
    torch.manual_seed(3)
    return Small(between, **layers)


def traced(between, **layers):
    model = small(between, **layers)
    return model, trace(model, (3, SIDE, SIDE), First())


def assert_each_lever_changes_nothing(model, graph, numbers, norms, change=lambda sub: None, batch=6):
    """Which of them do is told together."""
    different, spec = {}, StepSpec(batch_size=batch, norms=norms)
    plain = in_double(graph, model, config_of(*numbers), spec, change)
    losses = take_steps(plain, graph, spec)
    idle = {"early_updates"} | ({"in_place_prefix"} if numbers[0] == 0 else set())  # they rewrite nothing here
    idle |= {"copied_cuts"} if numbers[2] == 1.0 else set()
    for levers in (own for own in (*EACH, ("copied_cuts", "recompute"), LEVERS) if not idle.issuperset(own)):
        try:
            lean_spec = spec.model_copy(update={"levers": levers})
            sub = in_double(graph, model, config_of(*numbers), lean_spec, change)
            assert_alike(sub, take_steps(sub, graph, lean_spec), plain, losses)
        except Exception as error:
            different[told(levers)] = f"{type(error).__name__}: {error}"
    assert not different


@pytest.mark.parametrize(("numbers", "norms"), [*zip(CONFIGS, ("static", "running"), strict=True)], ids=str)
@pytest.mark.parametrize("between", WIRINGS, ids=lambda between: between.__name__)
def test_levers_change_nothing_however_values_are_shared(between, numbers, norms):
    assert_each_lever_changes_nothing(*traced(between), numbers, norms)


@pytest.mark.parametrize(
    ("numbers", "norms"), [((0, 1, 0.5), "running"), ((1, 2, 0.5), "static"), ((2, 3, 1.0), "running")], ids=str
)
@pytest.mark.parametrize("layers", LAYERS)
def test_levers_change_nothing_whatever_the_layers(layers, numbers, norms):
    assert_each_lever_changes_nothing(*traced(chained, **LAYERS[layers]()), numbers, norms)


@pytest.mark.parametrize("numbers", CONFIGS, ids=str)
def test_running_statistics_may_be_means_of_all_batches(numbers):
    """What the tracer does not take: the momentum is changed afterwards."""

    def change(sub):
        for norm in (sub.norm1, sub.norm2):
            norm.momentum = None

    assert_each_lever_changes_nothing(*traced(chained), numbers, "running", change)


@pytest.mark.parametrize("numbers", CONFIGS, ids=str)
def test_trained_norms_may_be_kept_in_evaluation(numbers):
    assert_each_lever_changes_nothing(
        *traced(chained), numbers, "running", lambda sub: [sub.norm1.eval(), sub.norm2.eval()]
    )


class OnTheInput(nn.Module):
    """The input goes into everything that likes to write over what it is given."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.beside = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.last, self.out = nn.Conv2d(3, 6, 1), nn.Linear(6, CLASSES)

    def forward(self, x):
        y = F.relu(self.conv(x) + x) + self.beside(F.relu(x))
        return self.out(self.last(self.norm(x) + F.hardswish(x + y)).mean((2, 3)))


@pytest.mark.parametrize("norms", ["static", "running"])
@pytest.mark.parametrize("numbers", [CONFIGS[0], (1, 3, 1.0), (2, 3, 0.5)], ids=str)
def test_the_input_stays_as_it_is(numbers, norms):
    torch.manual_seed(3)
    model = OnTheInput()
    assert_each_lever_changes_nothing(model, trace(model, (3, SIDE, SIDE)), numbers, norms)


# Random networks


class Wired(nn.Module):
    """Layers that each take values given before; what nobody takes goes into the classifier, or nowhere."""

    def __init__(self, steps, ending):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(layer(kind) for kind, _ in steps)
        self.last, self.out = nn.Conv2d(4, 4, 1), nn.Linear(4, CLASSES)
        self.steps, self.ending = steps, ending

    def forward(self, x):
        values, taken = [self.stem(x)], set()
        for own, (kind, places) in zip(self.layers, self.steps, strict=True):
            first, second = (place % len(values) for place in places)
            one, other = values[first], values[second]
            if "in place" in kind and first in taken:  # what others took must stay as it was
                one = one * 1.0
            taken |= {first, second} if kind in OF_TWO else {first}
            if kind == "add":
                values.append(one + other)
            elif kind == "add in place":
                values.append(one.add_(other))
            elif kind == "detach":
                values.append(one + other.detach())
            else:
                values.append(own(one))
        *rest, last = [value for number, value in enumerate(values) if number not in taken]
        if self.ending == "joined":
            for value in rest:
                last = last + value
        logits = self.out(self.last(last).mean((2, 3)))
        return (logits, *rest) if self.ending == "given" and rest else logits


LAYER_KINDS = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
    "biased conv": lambda: nn.Conv2d(4, 4, 1),
    "norm": lambda: nn.BatchNorm2d(4),
    "norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "norm and silu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish,
    "dropout": lambda: nn.Dropout(0.3),
}


def layer(kind):
    return LAYER_KINDS[kind]() if kind in LAYER_KINDS else nn.Identity()


OF_TWO = ("add", "add in place", "detach")
KINDS = [*LAYER_KINDS, "conv", "norm", "norm and relu", "add", "add", *OF_TWO]
STEPS = st.tuples(st.sampled_from(KINDS), st.tuples(st.integers(0, 20), st.integers(0, 20)))


@given(
    steps=st.lists(STEPS, min_size=2, max_size=12),
    ending=st.sampled_from(["joined", "joined", "given", "dropped"]),
    levers=st.sampled_from([LEVERS, ("lean_norms",), ("lean_norms", "copied_cuts"), ("in_place_prefix", "recompute")]),
    norms=st.sampled_from(["static", "running"]),
    depths=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    head_scale=st.sampled_from([0.25, 0.5, 1.0]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_levers_change_nothing_in_random_networks(steps, ending, levers, norms, depths, head_scale):
    torch.manual_seed(5)
    model = Wired(steps, ending)
    graph = trace(model, (3, 4, 4), First())
    full_depth = round(depths[0] * graph.depth)
    config = config_of(round(depths[1] * max(0, full_depth - 1)), full_depth, head_scale)
    spec = StepSpec(batch_size=5, norms=norms)
    try:
        take_steps(in_double(graph, model, config, spec), graph, spec)
    except RuntimeError:  # it writes over what its own backward pass needs
        assume(False)
    assert_levers_change_nothing(graph, model, config, spec, levers)


# Node by node


class Watched(fx.Interpreter):
    """Runs a program, and sees to it that every operator is given what was computed for it."""

    def __init__(self, module, graph):
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.written = []

    def run_node(self, node):
        for source in node.all_input_nodes:
            given = self.env[source]
            if isinstance(given, torch.Tensor) and source.op != "get_attr":
                assert torch.equal(given, source.meta["as computed"]), f"{source} is not what it was for {node}"
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            node.meta["as computed"] = result.detach().clone()
            if any(result.data_ptr() == self.env[source].data_ptr() for source in tensors_given(self, node)):
                self.written.append(node)
        return result


def tensors_given(watched, node):
    return [source for source in node.all_input_nodes if isinstance(watched.env[source], torch.Tensor)]


NETWORKS = [
    ("resnet20", (7, 9, 0.5), "static"),
    ("resnet20", (18, 19, 1.0), "running"),
    ("mobilenet_v2", (11, 12, 0.5), "running"),
    ("densenet40", (26, 27, 0.5), "static"),
    ("vit", (1, 3, 0.5), "static"),
    ("dropping vit", (0, 0, 1.0), "static"),
]


def lean_one(graph, model, config, norms, levers=LEVERS):
    """A sub-model and its rewritten program."""
    sub = in_double(graph, model, config, StepSpec(norms=norms))
    return sub, lean_program(sub._programs.by_mode[True], sub, levers)


@pytest.mark.parametrize(("name", "numbers", "norms"), NETWORKS, ids=str)
def test_no_operator_writes_over_what_another_one_takes(name, numbers, norms):
    model, graph = network(name)
    sub, program = lean_one(graph, model, config_of(*numbers), norms)
    images = torch.randn(4, *graph.input_shape, dtype=torch.float64)
    watched = Watched(sub, program)
    watched.run(images)
    (given,) = (node for node in program.nodes if node.op == "placeholder")
    assert torch.equal(images, given.meta["as computed"])
    assert "vit" in name or {lean.batch_norm_in_place, torch.relu_} & {node.target for node in watched.written}


@pytest.mark.parametrize("numbers", CONFIGS[1:], ids=str)
@pytest.mark.parametrize("between", WIRINGS, ids=lambda between: between.__name__)
def test_no_operator_of_a_small_network_writes_over_what_another_one_takes(between, numbers):
    model, graph = traced(between)
    for levers in (("in_place_prefix",), ("lean_norms",), LEVERS):
        sub, program = lean_one(graph, model, config_of(*numbers), "static", levers)
        images = torch.randn(4, *graph.input_shape, dtype=torch.float64)
        given = images.clone()
        Watched(sub, program).run(images)
        assert torch.equal(images, given)


def count(program, *functions):
    return sum(node.target in functions for node in program.nodes)


def test_each_lever_rewrites_what_it_is_for():
    model, graph = network("resnet20")
    config, frozen, trained = config_of(7, 9, 0.5), 7, 12
    sub, plain = lean_one(graph, model, config, "static", ())
    assert {node.target for node in plain.nodes if node.op == "call_function"} <= {
        *(F.relu, torch.narrow, operator.add, torch.flatten)
    }
    cuts = count(plain, torch.narrow)
    assert cuts > 0

    _, program = lean_one(graph, model, config, "static", ("in_place_prefix",))
    assert count(program, lean.batch_norm_in_place) == frozen
    assert count(program, F.relu) == trained
    _, program = lean_one(graph, model, config, "static", ("lean_norms",))
    assert count(program, lean.batch_norm) == trained + 2  # and those of two projections
    assert count(program, F.relu) == frozen
    _, program = lean_one(graph, model, config, "static", ("copied_cuts",))
    assert count(program, torch.narrow) == 0
    assert count(program, lean.with_cut, lean.copied_cut) == cuts
    _, program = lean_one(graph, model, config, "static", ("split_convolutions",))
    calls = [node for node in program.nodes if node.op == "call_module"]
    assert not any(isinstance(sub.get_submodule(node.target), nn.Conv2d) for node in calls)
    assert (
        count(program, lean.convolutions) == 1
    )  # a projection and the first of its block; the other's input is frozen
    assert count(program, lean.convolution) == frozen + trained
    for levers in (("early_updates",), ("recompute",)):
        _, program = lean_one(graph, model, config, "static", levers)
        assert [node.target for node in program.nodes] == [node.target for node in plain.nodes]
    _, program = lean_one(graph, model, config, "running", ("recompute",))
    assert count(program, lean.batch_norm) == trained + 2


def test_nodes_keep_their_units():
    model, graph = network("resnet20")
    _, program = lean_one(graph, model, config_of(7, 9, 0.5), "static")
    units = [node.meta["unit"] for node in program.nodes if node.op.startswith("call")]
    assert set(units) == set(range(1, 21))


# Pieces


@pytest.mark.parametrize("levers", [("recompute",), LEVERS], ids=told)
@pytest.mark.parametrize(("name", "numbers", "norms"), NETWORKS, ids=str)
def test_pieces_are_the_program_one_after_the_other(name, numbers, norms, levers):
    model, graph = network(name)
    sub, program = lean_one(graph, model, config_of(*numbers), norms, levers)
    pieces = in_pieces(program, sub)
    trained = {node.name for node in trained_nodes(program, sub)}

    def computed(nodes):
        return [node.name for node in nodes if node.op.startswith("call")]

    assert [name for piece in pieces for name in computed(piece.graph.nodes)] == computed(program.nodes)
    for before, after in itertools.pairwise(pieces):
        (output,) = (node for node in before.graph.nodes if node.op == "output")
        given = [node.name for node in after.graph.nodes if node.op == "placeholder"]
        assert [node.name for node in output.args[0]] == given
    for piece in pieces:
        if piece.recomputed:
            assert len(tensors_given_to(piece)) == 1
            assert trained & set(computed(piece.graph.nodes))
    assert not pieces[-1].recomputed
    if numbers[0]:
        assert not trained & set(computed(pieces[0].graph.nodes))
        assert not pieces[0].recomputed
    if "dropping" not in name and numbers[0] < 18:  # of which one layer is left to train
        assert sum(piece.recomputed for piece in pieces) > 0


def tensors_given_to(piece):
    """Numbers made of the batch size have names of their own in these networks."""
    given = [node.name for node in piece.graph.nodes if node.op == "placeholder"]
    return [name for name in given if name not in ("size", "mul", "add")]


def test_a_convolutional_network_is_cut_before_each_layer_and_what_is_frozen_is_one_piece():
    """The last layer and the classifier are one piece."""
    model, graph = traced(chained)
    for numbers, expected in (
        ((0, 0, 1.0), [True, True, True, False]),
        ((2, 3, 1.0), [False, True, False]),
        ((3, 4, 1.0), [False, False]),
    ):
        sub, program = lean_one(graph, model, config_of(*numbers), "static")
        assert [piece.recomputed for piece in in_pieces(program, sub)] == expected


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_the_first_pieces_are_the_first_to_be_recomputed(name):
    model, graph = network(name)
    sub, program = lean_one(graph, model, Config.full_network(), "static")
    every = [number for number, piece in enumerate(in_pieces(program, sub)) if piece.recomputed]
    for most in range(len(every) + 2):
        some = [number for number, piece in enumerate(in_pieces(program, sub, most)) if piece.recomputed]
        assert some == every[:most]


def test_a_larger_amount_needs_less_until_what_is_left_saves_nothing():
    _, graph = network("resnet20")
    config = config_of(9, 10, 0.625)
    peaks = []
    for amount in ((), ("recompute:1",), ("recompute:2",), ("recompute:4",), ("recompute",)):
        spec = StepSpec(batch_size=32, levers=(*LEVERS[:3], *amount))
        peaks.append(predict(graph, config, spec, details=False).tensor_peak_bytes)
    assert peaks[0] > peaks[1] > peaks[2] >= peaks[3] >= peaks[4]


def test_a_transformer_is_cut_before_the_norm_of_each_attention_and_each_mlp():
    """Its classifier's piece is the last MLP's, and the batch size goes along without being a tensor."""
    model, graph = network("vit")
    sub, program = lean_one(graph, model, Config.full_network(), "static", ("recompute",))
    pieces = in_pieces(program, sub)
    layers = [f"encoder_layers_encoder_layer_{n}_ln_{m}" for n in (0, 1) for m in (1, 2)]
    begins = [next(node.name for node in piece.graph.nodes if node.op.startswith("call")) for piece in pieces]
    assert begins == ["size", *layers]
    assert [piece.recomputed for piece in pieces] == [True, True, True, True, False]


def test_numbers_made_of_the_batch_size_pass_beside_a_single_tensor():
    class Tokens(nn.Module):
        """It says its sizes again and again."""

        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, CLASSES)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = self.embed(x.flatten(2).transpose(1, 2))
            for layer in self.layers:
                tokens = torch.tanh(layer(x.reshape(len(x) * SIDE * SIDE, 8)))
                x = x + tokens.reshape(len(tokens) // SIDE**2, SIDE**2, 8)
            return self.out(x.mean(1))

    torch.manual_seed(3)
    model = Tokens()
    graph = trace(model, (3, SIDE, SIDE))
    sub, program = lean_one(graph, model, Config.full_network(), "static", ("recompute",))
    pieces = in_pieces(program, sub)
    assert [piece.recomputed for piece in pieces] == [False, False, True, True, True, False]
    assert sum(node.op == "placeholder" for node in pieces[2].graph.nodes) > 1
    assert_levers_change_nothing(graph, model, Config.full_network(), StepSpec(batch_size=6), ("recompute",))


def test_a_layer_alone_is_not_run_again():
    """It saves nothing but what it is given."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    graph = fx.Graph()
    x = graph.placeholder("x")
    for number in range(4):
        x = graph.call_module(str(number), (x,))
    graph.output((x,))
    assert not any(piece.recomputed for piece in in_pieces(graph, model))


# Random numbers

DROPPING = {
    "modules": lambda net, x: net.conv2(net.norm1(net.conv1(x))),
    "functions": lambda net, x: net.conv2(F.dropout(net.conv1(x), 0.5, net.training)),
    "of channels": lambda net, x: net.conv2(F.dropout2d(net.conv1(x), training=net.training)),
    "in place": lambda net, x: net.conv2(F.dropout(net.conv1(x), 0.5, net.training, inplace=True)),
}


@pytest.mark.parametrize("between", DROPPING)
def test_what_is_dropped_is_not_drawn_again(between):
    model, graph = traced(DROPPING[between], norm1=nn.Dropout(0.5))
    sub, program = lean_one(graph, model, Config.full_network(), "static", ("recompute",))
    again = [n for piece in in_pieces(program, sub) if piece.recomputed for n in piece.graph.nodes]
    assert not any("drop" in str(node) and node.op != "placeholder" for node in again)
    for levers in (("recompute",), LEVERS):
        assert_levers_change_nothing(graph, model, Config.full_network(), StepSpec(batch_size=6), levers)


@pytest.mark.parametrize(
    "random",
    [
        lambda graph, x: graph.call_function(F.dropout, (x, 0.5, True)),
        lambda graph, x: graph.call_function(F.alpha_dropout, (x, 0.5, True)),
        lambda graph, x: graph.call_function(F.scaled_dot_product_attention, (x, x, x), {"dropout_p": 0.5}),
        lambda graph, x: graph.call_function(F.scaled_dot_product_attention, (x, x, x, None, 0.5)),
        lambda graph, x: graph.call_function(F.rrelu, (x, 0.1, 0.3, True)),
        lambda graph, x: graph.call_function(F.gumbel_softmax, (x,)),
        lambda graph, x: graph.call_method("bernoulli", (x, 0.5)),
        lambda graph, x: graph.call_method("normal_", (graph.call_function(torch.empty_like, (x,)),)),
        lambda graph, x: graph.call_method("uniform_", (graph.call_function(torch.empty_like, (x,)),)),
        lambda graph, x: graph.call_function(torch.normal, (x, 1.0)),
        lambda graph, x: graph.call_module("rrelu", (x,)),
        lambda graph, x: graph.call_module("dropout", (x,)),
        lambda graph, x: graph.call_module("attention", (x, x, x)),
    ],
    ids=[
        *("dropout", "alpha dropout", "attention", "positional attention", "rrelu", "gumbel", "bernoulli", "normal_"),
        *("uniform_", "normal", "rrelu module", "dropout module", "attention module"),
    ],
)
def test_a_piece_with_a_random_operator_is_not_recomputed(random):
    """A network's owner may teach widths of the less common ones."""
    module = nn.Module()
    module.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    module.rrelu, module.dropout = nn.RReLU(), nn.FeatureAlphaDropout()
    module.attention = nn.MultiheadAttention(4, 2, dropout=0.5)
    graph = fx.Graph()
    x = graph.call_module("linears.0", (graph.placeholder("x"),))
    x = graph.call_module("linears.1", (x,))
    given = random(graph, x)
    if given.target == "attention":
        given = graph.call_function(operator.getitem, (given, 0))
    x = graph.call_module("linears.2", (given,))
    graph.output((graph.call_module("linears.3", (x,)),))
    assert not any(piece.recomputed for piece in in_pieces(graph, module))


@pytest.mark.parametrize(
    "nothing_dropped",
    [
        lambda graph, x: graph.call_function(F.scaled_dot_product_attention, (x, x, x), {"dropout_p": 0.0}),
        lambda graph, x: graph.call_function(F.dropout, (x, 0.0, True)),
        lambda graph, x: graph.call_function(F.dropout, (x,), {"p": 0.0}),
        lambda graph, x: graph.call_module("dropout", (x,)),
    ],
    ids=["attention", "function", "function by name", "module"],
)
def test_a_piece_that_drops_nothing_is_recomputed(nothing_dropped):
    module = nn.Module()
    module.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    module.dropout = nn.Dropout(0.0)
    graph = fx.Graph()
    x = graph.call_module("linears.0", (graph.placeholder("x"),))
    x = graph.call_module("linears.1", (x,))
    x = nothing_dropped(graph, x)
    x = graph.call_module("linears.2", (x,))
    graph.output((graph.call_module("linears.3", (x,)),))
    assert [piece.recomputed for piece in in_pieces(graph, module)] == [False, True, False]


def dropping_network():
    """Traced; it keeps little: the state of random numbers would be seen."""
    layers = [nn.Conv2d(3, 4, 1)]
    for _ in range(6):
        layers += [nn.Dropout(0.5), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    graph, spec = trace(model, (3, SIDE, SIDE)), StepSpec(batch_size=8, levers=("recompute",), threads=1)
    calibrate(graph, [Config.full_network()], spec)
    return graph, Config.full_network(), spec, measure(extract(graph, None, Config.full_network()), spec)


def test_a_network_with_dropout_is_predicted_to_the_byte():
    graph, config, spec, measured = dropping_network()
    predicted = predict(graph, config, spec)
    assert predicted.exact
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.tensor_peak_bytes == measured.tensor_peak_bytes


def test_a_network_with_dropout_runs_at_its_measured_peak():
    graph, config, spec, measured = dropping_network()
    step = steady_step(graph, config, spec)
    limit = memory_limit(measured.peak_bytes, step.module, step.optimizer)
    run_twice_under(limit, step)
    assert limit.exact
    assert limit.peak_bytes == measured.peak_bytes
