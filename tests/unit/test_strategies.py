"""Every federated method against a plain reference: weights cut, trained and averaged entry by entry."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slt_planner.config import Config, StepSpec, Tier
from slt_planner.data.datasets import Dataset
from slt_planner.errors import InfeasibleError, UnsupportedLayerError
from slt_planner.federated.client import LocalTraining, client_seed, local_batches
from slt_planner.federated.nested_widths import calibrate_nested, nested_peak, nested_widths
from slt_planner.federated.result import RunSettings
from slt_planner.federated.rounds import draw_cohort, run_round
from slt_planner.federated.setup import prepare
from slt_planner.graph.trace import trace
from slt_planner.memory.limit import memory_limit
from slt_planner.memory.measure import measure
from slt_planner.memory.step import SteadyStep, threads
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve
from slt_planner.submodel.extract import extract, tensor_indices

SPEC = StepSpec(batch_size=8, threads=1)
STREAM, HIDDEN = 6, 4
ROUNDS = 3


class TwoWidths(nn.Module):
    """A stream of six channels, a hidden layer of four beside it, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, STREAM, 3, padding=1)
        self.norm = nn.BatchNorm2d(STREAM)
        self.down = nn.Conv2d(STREAM, HIDDEN, 3, padding=1)
        self.up = nn.Conv2d(HIDDEN, STREAM, 3, padding=1)
        self.classifier = nn.Linear(STREAM, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.up(torch.relu(self.down(x)))
        return self.classifier(x.mean((2, 3)))


AXES = {  # which channels each dimension of a weight counts
    "stem.weight": "s-",
    "stem.bias": "s",
    "norm.weight": "s",
    "norm.bias": "s",
    "down.weight": "hs",
    "down.bias": "h",
    "up.weight": "sh",
    "up.bias": "s",
    "classifier.weight": "-s",
    "classifier.bias": "-",
}


def plain_forward(w, x):
    x = F.conv2d(x, w["stem.weight"], w["stem.bias"], padding=1)
    x = torch.relu(F.batch_norm(x, None, None, w["norm.weight"], w["norm.bias"], training=True))
    hidden = torch.relu(F.conv2d(x, w["down.weight"], w["down.bias"], padding=1))
    x = x + F.conv2d(hidden, w["up.weight"], w["up.bias"], padding=1)
    return F.linear(x.mean((2, 3)), w["classifier.weight"], w["classifier.bias"])


def entries(name, shape, kept):
    """The places of a weight that a client has, as index tuples of the full weight and of its own."""
    axes = AXES[name].ljust(len(shape), "-")
    sides = [kept[axis] if axis != "-" else range(size) for axis, size in zip(axes, shape, strict=True)]
    return zip(product(*sides), product(*(range(len(side)) for side in sides)), strict=True)


def cut(weights, kept):
    own = {}
    for name, full in weights.items():
        axes = AXES[name].ljust(full.dim(), "-")
        shape = [len(kept[axis]) if axis != "-" else size for axis, size in zip(axes, full.shape, strict=True)]
        own[name] = torch.empty(shape)
        for place, own_place in entries(name, full.shape, kept):
            own[name][own_place] = full[place]
    return own


def plain_client(weights, widths, run, training, indices, seed):
    """Local training by hand: SGD with momentum and weight decay, at one of the widths a batch; all of the full size.

    `widths` are the channels kept (by axis) at each width, the widest last.
    """
    weights = {name: value.clone() for name, value in weights.items()}
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for batch, labels in local_batches(run.dataset, indices, training, generator):
        number = int(torch.randint(len(widths), (), generator=generator)) if len(widths) > 1 else 0
        own = {name: value.requires_grad_() for name, value in cut(weights, widths[number]).items()}
        F.cross_entropy(plain_forward(own, batch), labels).backward()
        for name, full in weights.items():
            for place, own_place in entries(name, full.shape, widths[number]):
                gradient = own[name].grad[own_place] + 1e-3 * full[place]
                momentum[name][place] = 0.9 * momentum[name][place] + gradient
                full[place] -= training.learning_rate * momentum[name][place]
    return weights


def plain_average(weights, clients):
    """Entry by entry over the clients that have it: (weights after training, channels kept, number of samples)."""
    averaged = {name: value.clone() for name, value in weights.items()}
    for name, old in weights.items():
        total, count = torch.zeros_like(old), torch.zeros_like(old)
        for trained, kept, samples in clients:
            for place, _ in entries(name, old.shape, kept):
                total[place] += samples * trained[name][place]
                count[place] += samples
        for place in product(*map(range, old.shape)):
            if count[place]:
                averaged[name][place] = total[place] / count[place]
    return averaged


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = TwoWidths()
    return model, trace(model, (3, 8, 8))


@pytest.fixture(scope="module")
def plan(network):
    """Two tiers: one that holds a narrow network, one that holds a wider one, but not all."""
    _, graph = network

    def needed(scale):
        config = Config(freeze_depth=0, full_depth=0, head_scale=scale)
        return measure(extract(graph, None, config), SPEC, details=False).peak_bytes

    tiers = [
        Tier(name="weak", budget_bytes=needed(0.5), share=0.5),
        Tier(name="strong", budget_bytes=needed(1.0) - 1, share=0.5),
    ]
    return solve(graph, tiers, SPEC, verify=False)


@pytest.fixture(scope="module")
def dataset():
    random = torch.Generator().manual_seed(5)
    images = torch.randint(256, (60, 3, 8, 8), generator=random, dtype=torch.uint8)
    labels = torch.randint(3, (60,), generator=random)
    return Dataset("made up", images[:48], labels[:48], images[48:], labels[48:], 3, (0.5,) * 3, (0.3,) * 3, False)


def prepared(strategy, network, plan, dataset, **changes):
    settings = RunSettings(
        strategy=strategy, dataset="made", rounds=ROUNDS, clients=4, cohort_size=3, local_batch=4, seed=3, **changes
    )
    return prepare(plan, settings, dataset, network)


def first_channels(scale):
    return {axis: range(max(1, int(scale * size + 1e-9))) for axis, size in (("s", STREAM), ("h", HIDDEN))}


def window(scale, begin):
    kept = first_channels(scale)
    sizes = {"s": STREAM, "h": HIDDEN}
    return {axis: sorted((begin + i) % sizes[axis] for i in kept[axis]) for axis in kept}


def drawn(graph, config):
    """The channels that a client drew, as its own weights say."""
    indices = tensor_indices(graph, config)
    assert list(indices["stem.weight"][0].indices) == list(indices["up.weight"][0].indices)  # they are added up
    return {"s": list(indices["stem.weight"][0].indices), "h": list(indices["down.weight"][0].indices)}


def kept_by(strategy, graph, step, round_number):
    """The channels of each width that a client may train, the widest last."""
    config = step.config
    if strategy == "fedrolex":
        return [window(config.head_scale, round_number - 1)]
    if strategy == "federated-dropout":
        return [drawn(graph, config)]
    return [first_channels(scale) for scale in step.widths or (config.head_scale,)]


@pytest.mark.parametrize("strategy", ["small", "full", "heterofl", "fedrolex", "federated-dropout", "fjord"])
def test_rounds_equal_the_plain_reference_entry_by_entry(strategy, network, plan, dataset):
    run = prepared(strategy, network, plan, dataset)
    _, graph = network
    state = run.start
    weights = {name: state.weights[name].clone() for name in AXES}
    with threads(run.plan.step):
        for number in range(1, ROUNDS + 1):
            clients = []
            for assignment in draw_cohort(run, state):
                tier = plan.tiers[run.tier_of[assignment.client]].name
                step = run.strategy.client_step(state, tier, assignment.client)
                widths = kept_by(strategy, graph, step, number)
                seed = client_seed(run.settings.seed, number, assignment.client)
                training, indices = assignment.training, assignment.indices
                trained = plain_client(weights, widths, run, training, indices, seed)
                clients.append((trained, widths[-1], len(indices)))
            weights = plain_average(weights, clients)
            state, _ = run_round(run, state)
            for name, expected in weights.items():
                torch.testing.assert_close(state.weights[name], expected, rtol=1e-4, atol=1e-6)


def test_widths_are_the_largest_that_fit_each_tier(network, plan, dataset):
    _, graph = network
    for strategy in ("heterofl", "fedrolex", "federated-dropout", "fjord"):
        run = prepared(strategy, network, plan, dataset)
        for tier in plan.tiers:
            (step,) = run.strategy.tier_steps(tier.name)
            scale = step.config.head_scale
            wider = min(s for s in graph.head_scales(0) if s > scale)
            for own, fits in ((scale, True), (wider, False)):
                config = Config(freeze_depth=0, full_depth=0, head_scale=own)
                peak = measure(extract(graph, None, config), SPEC, details=False).peak_bytes
                assert (peak <= tier.budget_bytes) == fits


def test_small_is_the_widest_network_of_the_weakest_tier_and_full_keeps_no_budget(network, plan, dataset):
    small, heterofl, full = (prepared(name, network, plan, dataset).strategy for name in ("small", "heterofl", "full"))
    assert {small.tier_steps(tier.name) for tier in plan.tiers} == {heterofl.tier_steps("weak")}
    assert full.tier_steps("weak")[0].config == Config.full_network()
    assert not full.keeps_budgets


def test_layer_freezing_trains_the_fewest_units_frozen_that_fit(network, dataset):
    _, graph = network
    spec = SPEC.model_copy(update={"batch_size": 64})
    choices = [Config(freeze_depth=f, full_depth=graph.depth, head_scale=1.0) for f in range(graph.depth)]
    peaks = [measure(extract(graph, None, config), spec, details=False).peak_bytes for config in choices]
    assert sorted(peaks, reverse=True) == peaks
    tiers = [Tier(name=str(f), budget_bytes=peak, share=1 / len(peaks)) for f, peak in enumerate(peaks)]
    run = prepared("fedolf", network, solve(graph, tiers, spec, verify=False), dataset)
    for frozen in range(graph.depth):
        (step,) = run.strategy.tier_steps(str(frozen))
        assert step.config.freeze_depth == frozen
        assert step.config.head_scale == 1.0
    before = run.start
    after, _ = run_round(run, before)
    assert run.strategy.evaluation_config(after) == Config.full_network()


def test_a_tier_that_holds_nothing_sits_out_and_if_all_do_it_is_an_error(network, plan, dataset):
    tiny, *others = plan.tiers
    with_tiny = plan.model_copy(update={"tiers": (tiny.model_copy(update={"budget_bytes": 1000}), *others)})
    strategy = prepared("heterofl", network, with_tiny, dataset).strategy
    assert strategy.tier_steps("weak") == ()
    assert strategy.tier_steps("strong")
    alone = plan.model_copy(update={"tiers": (tiny.model_copy(update={"budget_bytes": 1000}),)})
    with pytest.raises(
        InfeasibleError, match=r"fedrolex: no tier holds its smallest step, which needs \S+ kB of 1.0 kB"
    ):
        prepared("fedrolex", network, alone, dataset)


def test_dropout_draws_anew_for_each_round_and_client_and_the_same_again(network, plan, dataset):
    run = prepared("federated-dropout", network, plan, dataset)
    channels = {run.strategy.channels(run.start.__class__(r, {}), c) for r in range(5) for c in range(5)}
    assert len(channels) == 25
    again = prepared("federated-dropout", network, plan, dataset)
    assert again.strategy.channels(run.start, 1) == run.strategy.channels(run.start, 1)


def test_a_window_covers_all_channels_evenly(network):
    _, graph = network
    counts = np.zeros(STREAM, dtype=int)
    for number in range(STREAM):
        config = Config(freeze_depth=0, full_depth=0, head_scale=0.5, channels=f"rolling:{number}")
        counts[list(tensor_indices(graph, config)["stem.weight"][0].indices)] += 1
    assert set(counts) == {STREAM // 2}


def test_nested_widths_share_one_set_of_weights_and_of_momentum(network):
    model, graph = network
    widest = extract(graph, model, Config(freeze_depth=0, full_depth=0, head_scale=0.9))
    steps = nested_widths(widest, (0.2, 0.5, 0.9), SPEC, 0.1)
    tensors = [t for own in steps for t in own.model.parameters()]
    tensors += [t for own in steps for state in own.optimizer.state.values() for t in state.values()]
    alone = [*widest.parameters(), *(t for s in steps[-1].optimizer.state.values() for t in s.values())]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(alone)


def test_widths_after_a_concatenation_are_refused_by_name():
    class Concatenated(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.classifier = nn.Linear(8, 3)

        def forward(self, x):
            return self.classifier(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))

    graph = trace(Concatenated(), (3, 8, 8))
    widest = extract(graph, None, Config(freeze_depth=0, full_depth=0, head_scale=0.75))
    with pytest.raises(UnsupportedLayerError, match=r"classifier\.weight: its entries at head scale 0\.5 are not"):
        nested_widths(widest, (0.5, 0.75), SPEC, 0.1)


def test_widths_that_are_no_views_are_refused_before_anything_is_trained(dataset):
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 10, 4, 4)
            self.attention = nn.MultiheadAttention(10, 5, batch_first=True)
            self.classifier = nn.Linear(10, 3)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.classifier((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))

    model = Attentive()
    graph = trace(model, (3, 8, 8))
    roomy = solve(graph, ["1GB"], SPEC, verify=False)
    with pytest.raises(UnsupportedLayerError, match=r"attention\.in_proj_weight: .* use heterofl"):
        prepared("fjord", (model, graph), roomy, dataset)
    assert prepared("heterofl", (model, graph), roomy, dataset)


def test_the_training_of_a_client_with_one_width_is_that_of_its_sub_model(network, plan, dataset):
    run = prepared("fjord", network, plan, dataset)
    assert all(
        step.widths[-1] == step.config.head_scale for t in plan.tiers for step in run.strategy.tier_steps(t.name)
    )
    assert LocalTraining(SPEC.settings, 4, 1, 0.1).widths == ()


def test_all_widths_of_a_client_fit_its_budget_as_they_run():
    """A narrower width can need more than the widest; the memory limit, which follows each operator, says how much."""
    model = load_model("resnet20")
    graph, spec = trace(model, (3, 32, 32)), StepSpec(batch_size=8, threads=1)
    scale, widths = 0.609375, (0.2, 0.4, 0.6, 0.609375)
    config = Config(freeze_depth=0, full_depth=0, head_scale=scale)
    alone = measure(extract(graph, None, config), spec, details=False).peak_bytes
    needed = nested_peak(graph, config, widths, spec)
    assert alone < needed
    calibrate_nested(graph, config, widths, spec)
    widest, limits = extract(graph, model, config), []
    with threads(spec):
        for own in nested_widths(widest, widths, spec, 0.1):
            step = SteadyStep(own.model, spec, graph.input_shape, graph.num_classes, graph.adapter, own.optimizer)
            step.prepare()
            step.optimizer.zero_grad()
            limits.append(memory_limit(needed, own.model, own.optimizer, *([] if own.model is widest else [widest])))
            batch = step.example_batch()
            with limits[-1]:
                step.train(*batch)
    assert all(limit.exact for limit in limits)
    assert max(limit.peak_bytes for limit in limits) == needed
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    data = Dataset(
        "made up", images, torch.arange(40) % 10, images[:4], torch.arange(4), 10, (0.5,) * 3, (0.3,) * 3, False
    )
    plan = solve(graph, [Tier(name="tier", budget_bytes=(alone + needed) // 2, share=1)], spec, verify=False)
    settings = RunSettings(
        strategy="fjord", dataset="made", rounds=13, clients=2, cohort_size=2, local_batch=8, enforce=True
    )
    run = prepare(plan, settings, data, (model, graph))
    (step,) = run.strategy.tier_steps(plan.tiers[0].name)
    assert step.config.head_scale < scale
    assert max(run.client_peaks.values()) <= plan.tiers[0].budget_bytes
    run_round(run, run.start)
