"""Updates that are not used: which, why, and what the round makes of it."""

import math

import pytest
import torch
from safetensors.torch import load_file

from slt_planner.config import Config
from slt_planner.federated.engines import local
from slt_planner.federated.refusals import Screen
from slt_planner.federated.rounds import draw_cohort, run_round
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import merge
from tests.unit import tiny_runs
from tests.unit.tiny_runs import GRAPH, network, prepared, run

CONFIG = Config(freeze_depth=1, full_depth=2, head_scale=0.5)


def trained(moved=0.01, config=CONFIG, norms="static"):
    """A client's update: every trained parameter moved by this much."""
    sub = extract(GRAPH, network(), config, norms)
    return {
        name: value.clone() + moved if value.is_floating_point() else value
        for name, value in sub.trained_state().items()
    }


def verdict(update, loss=1.0, recent=(0.01,) * 3, samples=10):
    return Screen(GRAPH, network().state_dict(), recent, max_change=10).verdict(CONFIG, update, samples, loss)


def test_an_update_that_moves_as_usual_is_used_and_measured():
    for moved in (0.0, 0.01, -0.0999):
        result = verdict(trained(moved))
        assert result.reason is None
        assert result.change == pytest.approx(abs(moved), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda update: update.pop("8.bias"), "an update lacks 8.bias"),
        (lambda update: update.update({"9.bias": torch.zeros(3)}), "holds 9.bias, which the network does not have"),
        (lambda update: update.update({"0.weight": torch.zeros(4, 3, 3, 3)}), "0.weight, which its configuration"),
        (lambda update: update.update({"8.bias": torch.zeros(4)}), r"8.bias has shape \(4,\); it must be \(3,\)"),
        (lambda update: update.update({"8.bias": torch.zeros(3, dtype=torch.int64)}), "8.bias, or has it in whole"),
        (lambda update: update["3.weight"].view(-1)[5].fill_(math.nan), "3.weight is not finite"),
        (lambda update: update["3.weight"].view(-1)[5].fill_(-math.inf), "3.weight is not finite"),
        (lambda update: update["3.weight"].fill_(1e9), "it moves the weights .* times as far as usual"),
        (lambda update: update["3.weight"].fill_(3e38), "it moves the weights further than can be measured"),
    ],
)
def test_what_is_wrong_with_an_update_is_named(change, words):
    update = trained()
    change(update)
    with pytest.raises(AssertionError, match=words):
        assert verdict(update).reason is None


def test_a_loss_that_is_not_finite_and_no_samples_are_refused():
    assert verdict(trained(), loss=math.nan).reason == "its training loss is not finite"
    assert verdict(trained(), loss=math.inf).reason == "its training loss is not finite"
    assert "0 samples" in verdict(trained(), samples=0).reason


def test_too_far_is_ten_times_the_median_and_in_the_first_round_ten_times_the_weights():
    assert verdict(trained(0.05), recent=(0.001, 0.0051, 7.0)).reason is None
    far = verdict(trained(0.05), recent=(0.001, 0.0049, 7.0))
    assert far.reason == "it moves the weights 10.2 times as far as usual"
    assert far.change == pytest.approx(0.05, rel=1e-4)
    sent = torch.cat([value.flatten() for name, value in trained(0.0).items()])
    size = float(sent.pow(2).mean().sqrt())
    for recent in ((), (0.0, 0.0)):
        assert verdict(trained(9.9 * size), recent=recent).reason is None
        assert "10.1 times" in verdict(trained(10.1 * size), recent=recent).reason


def test_a_client_with_more_images_takes_more_steps_and_may_move_further():
    screen = Screen(GRAPH, network().state_dict(), (0.01,) * 3, max_change=10, samples_a_step=4)
    few, many = (screen.verdict(CONFIG, trained(0.15), samples, 1.0) for samples in (4, 40))
    assert few.reason == "it moves the weights 15 times as far as usual"
    assert many.reason is None
    assert few.change == pytest.approx(10 * many.change)


def test_running_statistics_may_come_and_their_size_says_nothing():
    update = trained(norms="running", config=Config.full_network())
    update["1.running_var"] *= 1e6
    screen = Screen(GRAPH, network().state_dict(), (0.01,), max_change=10)
    result = screen.verdict(Config.full_network(), update, 10, 1.0)
    assert result.reason is None
    assert result.change == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vit_small", "googlenet"])
def test_what_a_network_trains_is_what_is_asked_of_it(name):
    """An update straight from a sub-model is complete, whatever the network."""
    shape = (3, 32, 32)
    if name == "vit_small":
        pytest.importorskip("timm")
        name, shape = "timm:vit_tiny_patch16_224", (3, 224, 224)
    model = load_model(name, 10, (3, 64, 64) if name in ("mobilenet_v2", "googlenet") else shape)
    graph = trace(model, (3, 64, 64) if name in ("mobilenet_v2", "googlenet") else shape)
    for config in (Config.full_network(), Config(freeze_depth=2, full_depth=3, head_scale=0.5)):
        update = extract(graph, model, config).trained_state()
        result = Screen(graph, model.state_dict(), (), 10).verdict(config, update, 1, 1.0)
        assert (result.reason, result.change) == (None, 0.0)


def spoiling(monkeypatch, spoil):
    """Clients train as ever, but for what `spoil(model, seed)` does to them."""
    train_client = local.train_client

    def train(model, dataset, indices, training, seed, budget=None):
        loss = train_client(model, dataset, indices, training, seed, budget)
        with torch.no_grad():
            return spoil(model, loss)

    monkeypatch.setattr(local, "train_client", train)


def test_a_round_goes_on_without_a_refused_client_as_if_it_had_not_been_chosen(monkeypatch):
    plan, data = tiny_runs.full_plan(), tiny_runs.dataset()
    prepared_run = prepared(plan, data, cohort_size=3)
    calls = []

    def second_is_spoilt(model, loss):
        calls.append(loss)
        if len(calls) == 2:
            model.state_dict()["3.weight"].view(-1)[0] = math.nan
        return loss

    with monkeypatch.context() as patch:
        spoiling(patch, second_is_spoilt)
        after, row = run_round(prepared_run, prepared_run.start)
    cohort = cohort_of(prepared_run)
    assert (row.clients, row.refused) == (3, 1)
    assert [(r.client, r.reason) for r in row.refusals] == [(cohort[1], "3.weight is not finite")]
    assert row.train_loss == pytest.approx((calls[0] + calls[2]) / 2)
    left_out = expected_without(prepared_run, cohort[1])
    for name, value in after.weights.items():
        assert torch.equal(value, left_out[name]), name
    assert len(after.progress.recent_changes) == 2


def cohort_of(prepared_run):
    return [assignment.client for assignment in draw_cohort(prepared_run, prepared_run.start)]


def expected_without(prepared_run, client):
    """The merge of the other clients' updates, each trained alone."""
    from slt_planner.federated.rounds import draw_cohort

    updates = []
    for own in draw_cohort(prepared_run, prepared_run.start):
        if own.client != client:
            model = extract(prepared_run.graph, prepared_run.start.weights, own.config)
            seed = local.client_seed(prepared_run.settings.seed, 1, own.client)
            local.train_client(model, prepared_run.dataset, own.indices, own.training, seed)
            updates.append((own.config, model.trained_state(), len(own.indices)))
    return merge(prepared_run.graph, prepared_run.start.weights, updates)


@pytest.mark.parametrize("how", ["not finite", "too far", "loss"])
def test_a_round_without_a_valid_update_leaves_the_model_to_the_bit(monkeypatch, tmp_path, how):
    def spoil(model, loss):
        if how == "loss":
            return math.nan
        for value in model.parameters():
            value.mul_(1e4 if how == "too far" else math.inf)
        return loss

    spoiling(monkeypatch, spoil)
    # Where all clients go far for long, that becomes usual; one round is not long.
    result = run(tiny_runs.full_plan(), tiny_runs.dataset(), tmp_path / "run", rounds=1)
    (row,) = result.rows
    assert row.refused == row.clients == len(row.refusals) == 2
    assert row.train_loss is None
    assert row.bytes_up > 0  # they did send
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    for name, value in network().named_parameters():
        assert weights[name].numpy().tobytes() == value.detach().numpy().tobytes()


def test_the_limit_follows_if_all_clients_move_further_from_now_on(monkeypatch):
    def far(model, loss):
        if started:
            for value in model.parameters():
                value.add_(0.1)
        return loss

    started = []
    spoiling(monkeypatch, far)
    prepared_run = prepared(tiny_runs.full_plan(), tiny_runs.dataset(), rounds=200, cohort_size=5)
    state, refused = prepared_run.start, []
    for number in range(16):
        if number == 4:
            started.append(True)
        state, row = run_round(prepared_run, state)
        refused.append(row.refused)
    assert refused[:4] == [0, 0, 0, 0]
    assert refused[4:8] == [5, 5, 5, 5]  # 20 near changes against fewer far ones
    assert refused[9:] == [0] * 7
