"""Frozen prefixes computed once a stage: the run without a cache, what is dropped when, and where there is no cache."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slt_planner.config import Config, Tier
from slt_planner.federated import prefix_cache
from slt_planner.federated.accounting import client_costs
from slt_planner.federated.engines.cached import CachingEngine
from slt_planner.federated.experiment import begin_run, continue_run
from slt_planner.federated.rounds import run_round
from slt_planner.federated.setup import load_network, prepare
from slt_planner.federated.strategies.base import ClientStep, OneStepATier
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve
from slt_planner.submodel.extract import extract
from tests.unit.tiny_runs import GRAPH, SPEC, dataset, network, prepared, run, scheduled_plan, settings_of

RUNNING = SPEC.model_copy(update={"norms": "running"})
PLENTY = 10**8


@cache
def running_plan(weak_only=True):
    """One tier that is scheduled; or beside it one that trains what it can, and so changes what the other freezes."""
    full = solve(GRAPH, ["1GB"], RUNNING).full_network.peak_bytes
    tiers = [("weak", full - 1)] if weak_only else [("weak", full - 1), ("strong", 2 * full)]
    return solve(GRAPH, [Tier(name=n, budget_bytes=b, share=1 / len(tiers)) for n, b in tiers], RUNNING)


def frozen_state(prepared_run):
    """Before the first round in which something is frozen."""
    state = prepared_run.start
    while prepared_run.strategy.tier_step(state, "weak").config.freeze_depth == 0:
        state = replace(state, round=state.round + 1)
    return state


def timeless(result):
    return [row.model_dump(exclude={"train_seconds", "evaluate_seconds", "seconds"}) for row in result.rows]


@pytest.mark.parametrize("levers", [(), ("in_place_prefix", "copied_cuts", "lean_norms", "recompute")])
@pytest.mark.parametrize(
    ("name", "depths"),
    [("resnet20", range(1, 19)), ("densenet40", (1, 7, 20)), ("mobilenet_v3_small", (1, 3, 11))],
)
def test_a_pass_in_two_is_the_whole_pass_to_the_bit(name, depths, levers):
    """Residual sums, concatenations and gates over the boundary: several tensors pass."""
    torch.manual_seed(1)
    model = load_model(name)
    graph = trace(model, (3, 32, 32))
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    most = 0
    for depth in depths:
        sub = extract(graph, model, Config(freeze_depth=depth, full_depth=depth + 1, head_scale=0.5), "running")
        sub.use_levers(levers)
        split = sub.split(depth)
        passed = split.before(sub, images)
        most = max(most, len(passed))
        assert not any(value.requires_grad for value in passed)
        trained = [parameter for parameter in sub.parameters() if parameter.requires_grad]
        gradients = []
        for outputs in (partial(sub, images), partial(sub.run_after, split, *passed)):
            torch.manual_seed(2)  # of dropout before the classifier
            gradients.append(torch.autograd.grad(F.cross_entropy(outputs(), labels), trained))
        assert all(map(torch.equal, *gradients)), depth
    assert most > 1 or name == "mobilenet_v3_small"


def test_a_run_with_a_cache_is_the_run_without_to_the_bit(tmp_path):
    """Small convolutions: a batch of other images gives the same rows. Three epochs, so that rows are used again."""
    changes = {"rounds": 12, "local_epochs": 3}
    plain = run(running_plan(), dataset(), tmp_path / "plain", **changes)
    cached = run(running_plan(), dataset(), tmp_path / "cached", **changes, prefix_cache="100MB")
    assert {row.config.freeze_depth for row in plain.rows} > {0}
    assert timeless(plain) == timeless(cached)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("plain", "cached")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("limit", ["100MB", "70kB"])
def test_a_run_with_a_cache_goes_on_to_the_same_end(tmp_path, limit):
    """What the cache has at a moment depends on what came before, the numbers do not."""
    changes = {"rounds": 9, "prefix_cache": limit}
    run(running_plan(), dataset(), tmp_path / "whole", **changes)
    begun = prepared(running_plan(), dataset(), **changes)
    begin_run(begun, tmp_path / "cut")

    def stop(row):
        if row.round % 3 == 0:
            raise KeyboardInterrupt

    while continue_run(begun, tmp_path / "cut", stop).status == "stopped":
        pass
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_rows_are_kept_for_a_stage_and_used_again(monkeypatch):
    here = prepared(running_plan(), dataset(), clients=5, cohort_size=5)
    engine, computed = CachingEngine(PLENTY), counting(monkeypatch)
    state = frozen_state(here)
    state = replace(run_round(here, state, engine)[0], round=state.round)
    assert len(computed) == 5
    run_round(here, state, engine)
    assert len(computed) == 5
    assert 0 < engine.cache.bytes < PLENTY
    run_round(here, here.start, engine)  # nothing is frozen there
    assert engine.cache.bytes == 0


def test_rows_of_weights_that_change_are_dropped(monkeypatch):
    here = prepared(running_plan(), dataset(), clients=5, cohort_size=5)
    engine, computed = CachingEngine(PLENTY), counting(monkeypatch)
    state = frozen_state(here)
    run_round(here, state, engine)
    for name in ("0.weight", "1.running_mean"):
        computed.clear()
        changed = {**state.weights, name: state.weights[name] + 0.125}
        state = replace(state, weights=changed)
        cached = run_round(here, state, engine)[0]
        assert len(computed) == 5, name
        plain = run_round(here, state)[0]
        assert all(torch.equal(cached.weights[n], plain.weights[n]) for n in plain.weights)


def test_of_tiers_that_freeze_unequally_what_all_freeze_is_kept(monkeypatch):
    """Unit 2, which a stronger tier trains, changes every round: rows reach as far as unit 1, and stay."""
    configs = {"weak": (2, 3), "strong": (1, 2)}
    steps = {n: ClientStep(Config(freeze_depth=f, full_depth=k, head_scale=1.0)) for n, (f, k) in configs.items()}
    here = prepared(running_plan(weak_only=False), dataset(), clients=6, cohort_size=6)
    costs = {step: client_costs(GRAPH, step, RUNNING) for step in steps.values()}
    peaks = dict.fromkeys(steps.values(), 1)
    here = replace(here, strategy=OneStepATier(steps), client_costs=costs, client_peaks=peaks)
    engine, computed = CachingEngine(PLENTY), counting(monkeypatch)
    cached, plain = here.start, here.start
    for _ in range(3):
        cached, plain = run_round(here, cached, engine)[0], run_round(here, plain)[0]
        assert all(torch.equal(cached.weights[n], plain.weights[n]) for n in plain.weights)
        assert len(computed) == 6
    assert not torch.equal(cached.weights["3.weight"], here.start.weights["3.weight"])


def test_no_more_bytes_are_kept_than_allowed(monkeypatch):
    here = prepared(running_plan(), dataset(), clients=5, cohort_size=5)
    state = frozen_state(here)
    whole = CachingEngine(PLENTY)
    expected = run_round(here, state, whole)[0]
    one_client = whole.cache.bytes // 5  # equal parts
    computed = counting(monkeypatch)
    for limit, kept in ((2 * one_client, 2), (3 * one_client - 1, 2), (one_client, 1), (one_client - 1, 0)):
        engine = CachingEngine(limit)
        for _ in range(2):
            after = run_round(here, state, engine)[0]
            assert engine.cache.bytes == kept * one_client <= limit
            assert all(torch.equal(after.weights[n], expected.weights[n]) for n in expected.weights)
    assert len(computed) == 2 * (5 + 4) + 2 * 5  # of those that come by turns the first stay; with room for none, none


def counting(monkeypatch):
    """Grows by one whenever a client's rows are computed."""
    computed, compute = [], prefix_cache._computed
    monkeypatch.setattr(prefix_cache, "_computed", lambda *own: (computed.append(own), compute(*own))[1])
    return computed


class Dropping(nn.Sequential):
    def __init__(self, *, random):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5 if random else 0.0), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


def test_a_prefix_that_is_no_function_of_an_image_alone_is_not_split():
    config = Config(freeze_depth=2, full_depth=3, head_scale=0.5)
    for random in (False, True):
        model = Dropping(random=random)
        assert (extract(trace(model, (3, 16, 16)), model, config).split(2) is None) == random
    assert extract(GRAPH, network(), config, "static").split(2) is None  # batch statistics
    assert extract(GRAPH, network(), config, "running").split(2) is not None
    assert extract(GRAPH, network(), Config.full_network(), "running").split(2) is None  # nothing is frozen
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), *network()[3:])
    assert extract(trace(own, (3, 16, 16)), own, config, "running").split(2) is None


def test_where_a_cache_cannot_be_it_is_refused_in_a_line():
    photographs = replace(dataset(), augment=True)

    def refused(words, plan=None, data=None, **changes):
        with pytest.raises(ValueError, match=words):
            prepared(plan or running_plan(), data or dataset(), prefix_cache="100MB", **changes)

    with pytest.raises(ValueError, match="no unit"):
        settings_of(prefix_cache="9")
    refused("enforced", enforce=True)
    refused("workers end with each round", workers=2)
    refused("augmented anew each time; train with --no-augmentation", data=photographs)
    refused("--norms running", plan=scheduled_plan())
    prepared(running_plan(), photographs, augment=False, prefix_cache="100MB")
    full = settings_of(strategy="full", rounds=2, prefix_cache="100MB")
    nothing_frozen = prepare(running_plan(), full, dataset(), load_network(running_plan(), 0, network()))
    engine = CachingEngine(PLENTY)
    run_round(nothing_frozen, nothing_frozen.start, engine)
    assert engine.cache.bytes == 0
