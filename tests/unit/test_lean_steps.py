"""Levers: a step that is run in less memory trains as the plain one does, and needs what is predicted.

Equality is asked for in double precision. In single precision sums in another order differ by some 1e-7, and a ReLU
whose input is that near to zero then lets a gradient through, or not: no tolerance would be right.
"""

import copy
import random
from functools import cache, lru_cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

import slt_planner as slt
from slt_planner.config import Config, Optimizer, StepSettings, StepSpec
from slt_planner.errors import InputError
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.memory.step import SteadyStep, as_trained, make_optimizer, training_step
from slt_planner.submodel.extract import extract
from tests.plain_tensors import _Ruler, plain_tensor_peak
from tests.unit.test_submodel import configs

pytestmark = pytest.mark.usefixtures("one_thread")

LEVERS = ("in_place_prefix", "copied_cuts", "lean_norms", "early_updates", "split_convolutions", "recompute")
PARTLY = (*LEVERS[:-1], "recompute:2")
EACH = [(lever,) for lever in LEVERS]
NORMS = ("static", "running")
FULL = (0, 0, 1.0)


def told(levers):
    names = {LEVERS: "all", PARTLY: "all but the later pieces"}
    return names.get(levers, "+".join(levers) or "none")


def small_vit(dropout):
    return torchvision.models.VisionTransformer(
        32, 8, 2, 4, 32, 64, num_classes=10, dropout=dropout, attention_dropout=dropout
    )


@cache
def network(name):
    torch.manual_seed(0)
    if "vit" in name and name != "vit_b_16":
        model = small_vit(0.1 if name == "dropping vit" else 0.0)
    else:
        model = slt.load_model(name, 10, (3, 32, 32))
    return model, slt.trace(model, (3, 32, 32))


def config_of(freeze_depth, full_depth, head_scale):
    return Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)


def in_double(graph, model, config, spec, change=lambda sub: None):
    """A sub-model whose levers are in use, in double precision."""
    sub = as_trained(extract(graph, model, config, spec.norms), spec).double()
    change(sub)
    return sub


def data(graph, batch):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, *graph.input_shape, generator=generator, dtype=torch.float64)
    return images, torch.randint(graph.num_classes, (batch,), generator=generator)


def take_steps(sub, graph, spec, steps=2):
    """Some training steps; gives their losses, and sees to it that the batch stays as it is."""
    images, labels = data(graph, spec.batch_size)
    given = images.clone()
    optimizer = make_optimizer(sub.parameters(), spec.optimizer, learning_rate=0.1)
    losses = []
    for number in range(steps):
        torch.manual_seed(number)
        losses.append(training_step(sub, optimizer, images, labels, spec, graph.adapter))
    assert torch.equal(images, given)
    return losses


def assert_alike(sub, losses, plain, plain_losses, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(losses, plain_losses, rtol=rtol, atol=atol)
    torch.testing.assert_close(sub.state_dict(), plain.state_dict(), rtol=rtol, atol=atol)


def assert_levers_change_nothing(graph, model, config, spec, levers, change=lambda sub: None):
    """Two steps with levers against two plain ones, and the gradients that the last of them leaves."""
    plain = in_double(graph, model, config, spec, change)
    lean_spec = spec.model_copy(update={"levers": levers})
    sub = in_double(graph, model, config, lean_spec, change)
    plain_losses = take_steps(plain, graph, spec)
    assert_alike(sub, take_steps(sub, graph, lean_spec), plain, plain_losses)
    if "early_updates" not in levers:
        torch.testing.assert_close(gradients(sub), gradients(plain), rtol=1e-8, atol=1e-12)


def gradients(sub):
    return {name: parameter.grad for name, parameter in sub.named_parameters() if parameter.grad is not None}


@lru_cache(maxsize=2)  # large networks are large
def plain_steps(name, numbers, norms, batch, optimizer):
    model, graph = network(name)
    spec = StepSpec(batch_size=batch, norms=norms, optimizer=optimizer)
    sub = in_double(graph, model, config_of(*numbers), spec)
    return sub, take_steps(sub, graph, spec)


def assert_steps_are_the_plain_ones(name, numbers, norms, levers, batch, optimizer="sgd", **tolerance):
    model, graph = network(name)
    spec = StepSpec(batch_size=batch, norms=norms, levers=levers, optimizer=optimizer)
    sub = in_double(graph, model, config_of(*numbers), spec)
    assert_alike(sub, take_steps(sub, graph, spec), *plain_steps(name, numbers, norms, batch, optimizer), **tolerance)


# The same training

# Batch norm at the end of mobilenet_v2 has one position a sample: with few of those small differences grow.
SUBJECTS = [
    ("resnet20", FULL, 4),
    ("resnet20", (7, 9, 0.5), 4),
    ("resnet20", (0, 2, 0.25), 4),
    ("resnet20", (18, 19, 1.0), 4),
    ("mobilenet_v2", FULL, 12),
    ("mobilenet_v2", (11, 12, 0.5), 12),
    ("densenet40", (26, 27, 0.5), 2),
    ("densenet40", (0, 2, 0.25), 2),
    ("vit", FULL, 4),
    ("vit", (2, 3, 0.5), 4),
    ("vit", (0, 4, 0.25), 4),
    ("dropping vit", FULL, 4),
    ("dropping vit", (2, 3, 0.5), 4),
]


class ScaledInPlace(nn.Module):
    """What a layer gives is scaled in place, and used by the next one and by the sum after that."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.a(x)
        x *= 0.5
        return self.fc(F.relu(self.c(self.b(x) + x)).mean((2, 3)))


@pytest.mark.parametrize("levers", [("copied_cuts", "recompute"), LEVERS, PARTLY], ids=told)
def test_no_piece_begins_by_writing_over_what_is_kept_to_run_it_again(levers):
    assert_steps_are_the_plain_ones("resnet18", (0, 8, 0.501953125), "static", levers, 4)
    model = ScaledInPlace()
    graph = slt.trace(model, (3, 32, 32))
    assert_levers_change_nothing(graph, model, config_of(0, 1, 0.5), StepSpec(batch_size=4), levers)


# Each lever alone where all of them have something to do; elsewhere those that depend most on the rest.
EVERY_LEVER_WORKS = [("resnet20", (7, 9, 0.5)), ("vit", (2, 3, 0.5))]
ALONE = [
    *[("static", levers) for levers in (*EACH, PARTLY, LEVERS)],
    *[("running", levers) for levers in (("in_place_prefix",), ("lean_norms",), ("recompute",), LEVERS)],
]
TOGETHER = [("static", ("recompute",)), ("static", LEVERS), ("running", LEVERS)]


def cases():
    """Vision transformers have layer norms alone."""
    for name, numbers, batch in SUBJECTS:
        for norms, levers in ALONE if (name, numbers) in EVERY_LEVER_WORKS else TOGETHER:
            if norms == "static" or "vit" not in name:
                yield pytest.param(name, numbers, batch, norms, levers, id=f"{name} {numbers} {norms} {told(levers)}")


@pytest.mark.parametrize(("name", "numbers", "batch", "norms", "levers"), list(cases()))
def test_two_steps_with_levers_are_the_two_plain_steps(name, numbers, batch, norms, levers):
    assert_steps_are_the_plain_ones(name, numbers, norms, levers, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers", "batch", "norms"),
    [
        ("mobilenet_v2", (0, 2, 0.25), 12, "running"),
        ("mobilenet_v2", (34, 35, 1.0), 12, "static"),
        ("densenet40", FULL, 4, "static"),
        ("densenet40", (38, 39, 1.0), 4, "running"),
        ("vit_b_16", FULL, 2, "static"),
        ("vit_b_16", (10, 12, 0.5), 2, "static"),
    ],
    ids=str,
)
def test_two_steps_of_large_networks_are_the_plain_ones(name, numbers, batch, norms):
    assert_steps_are_the_plain_ones(name, numbers, norms, LEVERS, batch)


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(name="sgd", weight_decay=1e-2),
        Optimizer(name="sgd", momentum=0.0, weight_decay=0.0),
        Optimizer(name="sgd", foreach=True),
        Optimizer(name="adam", weight_decay=1e-2),
        Optimizer(name="adamw", weight_decay=1e-2, foreach=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "numbers"), [("resnet20", (7, 9, 0.5)), ("vit", FULL)], ids=str)
def test_early_updates_are_the_optimizers_own_to_the_bit(name, numbers, optimizer):
    exact = {"rtol": 0, "atol": 0}
    assert_steps_are_the_plain_ones(name, numbers, "static", ("early_updates",), 4, optimizer, **exact)


def test_after_early_updates_the_optimizer_is_as_it_was_and_no_gradient_is_left():
    model, graph = network("resnet20")
    states = []
    for levers in (("early_updates",), ()):
        spec = StepSpec(batch_size=4, optimizer="adam", levers=levers)
        sub = in_double(graph, model, config_of(7, 9, 0.5), spec)
        optimizer = make_optimizer(sub.parameters(), spec.optimizer, learning_rate=0.1)
        training_step(sub, optimizer, *data(graph, 4), spec, graph.adapter)
        assert all(parameter.grad is None for parameter in sub.parameters()) == bool(levers)
        assert all(not parameter._post_accumulate_grad_hooks for parameter in sub.parameters() if levers)
        states.append(optimizer.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@given(
    config=configs(),
    levers=st.sets(st.sampled_from([*LEVERS, "recompute:1", "recompute:2", "recompute:4"]), min_size=1),
    norms=st.sampled_from(["static", "running"]),
    batch=st.integers(2, 9),
    layout=st.sampled_from(["contiguous", "channels_last"]),
)
@example(config_of(0, 0, 1 / 64), set(LEVERS), "running", 2, "channels_last")
@example(config_of(1, 2, 1.0), {"in_place_prefix", "recompute"}, "running", 3, "contiguous")
@settings(max_examples=12, deadline=None)
def test_any_levers_change_nothing_at_any_configuration(config, levers, norms, batch, layout):
    model, graph = network("resnet20")
    spec = StepSpec(batch_size=batch, norms=norms, memory_format=layout)
    assert_levers_change_nothing(graph, model, config, spec, tuple(levers))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_a_lean_step_in_another_number_format_is_off_by_no_more_than_rounding(precision):
    """The loss of one sample differs in its last digits; gradients point the same way."""
    model, graph = network("resnet20")
    found = []
    for levers in (tuple(lever for lever in LEVERS if lever != "early_updates"), ()):
        spec = StepSpec(batch_size=8, precision=precision, levers=levers)
        sub = as_trained(extract(graph, model, config_of(7, 9, 0.5)), spec)
        images, labels = data(graph, 8)
        images = images.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        optimizer = make_optimizer(sub.parameters(), spec.optimizer, learning_rate=0.1)
        loss = training_step(sub, optimizer, images, labels, spec, graph.adapter)
        assert all(parameter.grad.dtype == parameter.dtype for parameter in sub.parameters() if parameter.requires_grad)
        found.append((float(loss), torch.cat([own.flatten().double() for own in gradients(sub).values()])))
    (loss, lean), (plain_loss, plain) = found
    small = 1e-5 if precision == "fp32" else 2e-2
    assert loss == pytest.approx(plain_loss, rel=small)
    assert torch.cosine_similarity(lean, plain, dim=0) > 1 - small


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_evaluation_knows_of_no_levers(name):
    model, graph = network(name)
    images, _ = data(graph, 3)
    for norms in ("static", "running"):
        lean, plain = (
            in_double(graph, model, config_of(2, 3, 0.5), StepSpec(norms=norms, levers=levers)).eval()
            for levers in (LEVERS, ())
        )
        assert torch.equal(lean(images), plain(images))


def test_a_sub_model_with_levers_can_be_copied_before_and_after_its_first_step():
    model, graph = network("resnet20")
    spec = StepSpec(batch_size=4, norms="running", levers=LEVERS)
    sub = in_double(graph, model, config_of(7, 9, 0.5), spec)
    early = copy.deepcopy(sub)
    losses = take_steps(sub, graph, spec)
    late = copy.deepcopy(sub)
    assert_alike(early, take_steps(early, graph, spec), sub, losses, rtol=0, atol=0)
    before = copy.deepcopy(sub.state_dict())
    take_steps(late, graph, spec)
    torch.testing.assert_close(sub.state_dict(), before, rtol=0, atol=0)
    take_steps(sub, graph, spec)
    torch.testing.assert_close(late.state_dict(), sub.state_dict(), rtol=0, atol=0)


def test_levers_can_be_put_down_again():
    model, graph = network("resnet20")
    spec = StepSpec(batch_size=4)
    sub = in_double(graph, model, config_of(7, 9, 0.5), spec.model_copy(update={"levers": LEVERS}))
    take_steps(copy.deepcopy(sub), graph, spec.model_copy(update={"levers": LEVERS}))
    sub.use_levers(())
    assert_alike(sub, take_steps(sub, graph, spec), *plain_steps("resnet20", (7, 9, 0.5), "static", 4, "sgd"), 0, 0)


def test_levers_are_for_sub_models_but_early_updates_for_any_module():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="lean_norms, recompute: these levers are for sub-models"):
        as_trained(model, StepSettings(levers=("recompute", "lean_norms")))
    assert as_trained(model, StepSettings(levers=("early_updates",))) is model
    assert StepSettings(levers=("recompute", "lean_norms")).levers == ("lean_norms", "recompute")
    with pytest.raises(ValidationError, match="gradients are added up first"):
        StepSettings(levers=("early_updates",), micro_batch=2)


def test_micro_batches_with_levers_are_plain_micro_batches():
    model, graph = network("resnet20")
    levers = tuple(lever for lever in LEVERS if lever != "early_updates")
    for norms in ("static", "running"):
        spec = StepSpec(batch_size=7, micro_batch=3, norms=norms)
        assert_levers_change_nothing(graph, model, config_of(7, 9, 0.5), spec, levers)


# Memory

# Every network has all levers, and meets every optimizer, layout and format; more is marked slow.
MEMORY = [
    ("resnet20", FULL, LEVERS, {}),
    ("resnet20", (6, 7, 0.5), PARTLY, {"optimizer": "adam", "memory_format": "channels_last"}),
    ("resnet20", (0, 2, 0.25), ("recompute",), {"precision": "autocast", "norms": "running"}),
    ("resnet20", FULL, tuple(lever for lever in LEVERS if lever != "early_updates"), {"micro_batch": 3}),
    ("mobilenet_v2", FULL, LEVERS, {"precision": "bf16", "norms": "running", "memory_format": "channels_last"}),
    ("densenet40", (26, 27, 0.5), LEVERS, {"optimizer": "adam", "norms": "running", "precision": "autocast"}),
    ("vit", FULL, LEVERS, {"optimizer": "adam"}),
]


def assert_prediction_is_measurement(name, numbers, levers, **settings):
    _, graph = network(name)
    config, spec = config_of(*numbers), StepSpec(threads=1, levers=levers, **settings)
    slt.calibrate(graph, [config], spec)
    predicted, measured = predict(graph, config, spec), measure(extract(graph, None, config, spec.norms), spec)
    assert predicted.exact
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.tensor_peak_bytes == measured.tensor_peak_bytes
    assert predicted.units == measured.units


@pytest.mark.parametrize(
    ("name", "numbers", "levers", "settings"), MEMORY, ids=lambda value: told(value) if value == LEVERS else str(value)
)
def test_predicted_memory_is_measured_memory(name, numbers, levers, settings):
    assert_prediction_is_measurement(name, numbers, levers, **{"batch_size": 8, **settings})


EVERYTHING = product(
    ["resnet20", "mobilenet_v2", "densenet40"],
    [FULL, (13, 14, 0.5), (0, 2, 0.25)],
    [LEVERS, ("lean_norms",), ("recompute",), ("split_convolutions",)],
    ["sgd", "adam"],
    ["contiguous", "channels_last"],
    [("fp32", "static"), ("bf16", "running"), ("autocast", "running")],
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers", "levers", "optimizer", "memory_format", "format_and_norms"),
    random.Random(0).sample(list(EVERYTHING), 12),
    ids=str,
)
def test_predicted_memory_is_measured_memory_everywhere(
    name, numbers, levers, optimizer, memory_format, format_and_norms
):
    """A sample of all that can be combined."""
    precision, norms = format_and_norms
    settings = {"optimizer": optimizer, "memory_format": memory_format, "precision": precision, "norms": norms}
    assert_prediction_is_measurement(name, numbers, levers, batch_size=8, **settings)


@pytest.mark.parametrize(
    ("name", "numbers", "precision"),
    [
        ("resnet20", FULL, "bf16"),
        ("resnet20", (6, 7, 0.5), "fp32"),
        ("mobilenet_v2", (11, 12, 0.5), "autocast"),
    ],
    ids=str,
)
def test_live_tensors_are_those_of_a_plain_loop_around_the_lean_sub_model(name, numbers, precision):
    _, graph = network(name)
    config, levers = config_of(*numbers), tuple(lever for lever in LEVERS if lever != "early_updates")
    spec = StepSpec(batch_size=4, precision=precision, levers=levers, threads=1)
    sub = as_trained(extract(graph, None, config), spec)
    expected = plain_tensor_peak(sub, spec.batch_size, precision=precision)
    assert predict(graph, config, spec, details=False).tensor_peak_bytes == expected


def peak_with_an_optimizer_a_parameter(module, batch, make):
    """The most bytes of live storages; each parameter is updated by an optimizer of its own, in its hook."""
    own = {parameter: make([parameter]) for parameter in module.parameters() if parameter.requires_grad}

    def update(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    def step():
        images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        nn.functional.cross_entropy(module(images), labels).backward()

    handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in own]
    step()
    states = [value for optimizer in own.values() for state in optimizer.state.values() for value in state.values()]
    ruler = _Ruler([*module.parameters(), *module.buffers(), *states])
    with ruler:
        step()
    for handle in handles:
        handle.remove()
    return ruler.peak


@pytest.mark.parametrize(
    ("name", "numbers", "optimizer", "levers"),
    [
        ("resnet20", (6, 7, 0.5), "adam", ("early_updates",)),
        ("resnet20", (6, 7, 0.5), "sgd", LEVERS),
        ("densenet40", (26, 27, 0.5), "adam", LEVERS),
    ],
    ids=str,
)
def test_early_updates_need_what_a_loop_with_an_optimizer_a_parameter_needs(name, numbers, optimizer, levers):
    _, graph = network(name)
    config = config_of(*numbers)
    spec = StepSpec(batch_size=4, optimizer=optimizer, levers=levers, threads=1)
    sub = as_trained(extract(graph, None, config), spec)
    expected = peak_with_an_optimizer_a_parameter(
        sub, spec.batch_size, lambda parameters: make_optimizer(parameters, spec.optimizer, learning_rate=0.1)
    )
    assert predict(graph, config, spec, details=False).tensor_peak_bytes == expected


@pytest.mark.parametrize(
    ("name", "numbers", "levers", "share"),
    [
        ("resnet20", FULL, ("recompute",), 0.6),
        ("resnet20", FULL, LEVERS, 0.5),
        ("mobilenet_v2", FULL, ("lean_norms",), 0.9),
        ("mobilenet_v2", (30, 31, 1.0), ("early_updates",), 0.92),
        ("vit", FULL, ("recompute",), 0.75),
    ],
    ids=str,
)
def test_levers_buy_memory(name, numbers, levers, share):
    _, graph = network(name)
    peaks = [
        predict(graph, config_of(*numbers), StepSpec(batch_size=16, levers=own), details=False).tensor_peak_bytes
        for own in (levers, ())
    ]
    assert peaks[0] < share * peaks[1]


def steady_step(graph, config, spec):
    module = as_trained(extract(graph, None, config, spec.norms), spec)
    step = SteadyStep(module, spec, graph.input_shape, graph.num_classes, graph.adapter)
    step.prepare()
    return step


def run_twice_under(limit, step):
    for _ in range(2):
        with limit:
            step.run(lambda tensors: None)


@pytest.mark.parametrize(
    ("name", "numbers", "settings"),
    [
        ("resnet20", (6, 7, 0.5), {"precision": "bf16", "optimizer": "adam", "memory_format": "channels_last"}),
        ("mobilenet_v2", (0, 2, 0.25), {"norms": "running"}),
    ],
    ids=str,
)
def test_a_lean_step_runs_at_its_measured_peak_and_fails_one_byte_below(name, numbers, settings):
    _, graph = network(name)
    config, spec = config_of(*numbers), StepSpec(batch_size=4, threads=1, levers=LEVERS, **settings)
    slt.calibrate(graph, [config], spec)
    peak = measure(extract(graph, None, config, spec.norms), spec, details=False).peak_bytes

    step = steady_step(graph, config, spec)
    limit = slt.memory_limit(peak, step.module, step.optimizer)
    run_twice_under(limit, step)
    assert limit.exact
    assert limit.peak_bytes == peak

    step = steady_step(graph, config, spec)
    with pytest.raises(slt.BudgetExceeded, match="1 over the budget") as stopped:
        run_twice_under(slt.memory_limit(peak - 1, step.module, step.optimizer), step)
    assert stopped.value.live_bytes + stopped.value.asked_bytes == peak
