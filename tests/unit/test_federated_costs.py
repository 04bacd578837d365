"""What a round costs its clients, against counts by hand; clients that do not answer; stages that end sooner."""

from functools import cache

import numpy as np
import pytest

from slt_planner.config import Config, Tier
from slt_planner.federated.accounting import ClientCosts, Visit, client_costs, round_costs
from slt_planner.federated.availability import answer
from slt_planner.federated.progress import Holders, Plateau, Progress
from slt_planner.federated.rounds import draw_cohort, run_round
from slt_planner.federated.strategies.base import ClientStep, ServerState
from slt_planner.federated.strategies.slt import SuccessiveLayerTraining
from slt_planner.planning.costs import unchanging_bytes
from slt_planner.planning.rounds import deal_rounds
from slt_planner.planning.solve import solve
from tests.unit import tiny_runs
from tests.unit.tiny_runs import GRAPH, SPEC, prepared, run


def test_a_client_gets_and_sends_what_a_hand_count_says():
    """Units: conv 3x3x3x4 and its norm; conv 3x3x4x6; conv 3x3x6x6; then the classifier. fp32, half the head."""
    costs = client_costs(GRAPH, ClientStep(Config(freeze_depth=1, full_depth=2, head_scale=0.5)), SPEC)
    unit_1 = 4 * (4 * 3 * 9 + 4 + 4)
    unit_2 = 4 * (6 * 4 * 9 + 6)
    unit_3 = 4 * (3 * 6 * 9 + 3)
    classifier = 4 * (3 * 3 + 3)
    assert costs.download_bytes(0) == unit_1 + unit_2 + unit_3 + classifier
    assert costs.download_bytes(1) == costs.upload_bytes == unit_2 + unit_3 + classifier
    forward_1, forward_2 = 2 * 256 * 4 * 3 * 9, 2 * 256 * 6 * 4 * 9
    forward_3, forward_classifier = 2 * 64 * 3 * 6 * 9, 2 * 3 * 3
    # Backward takes the forward pass twice, but nobody asks for the gradient of what the frozen unit gives.
    assert costs.train_flops_per_sample == forward_1 + 2 * forward_2 + 3 * (forward_3 + forward_classifier)


EXACT = ("in_place_prefix", "copied_cuts", "lean_norms", "early_updates", "split_convolutions", "recompute")


@pytest.mark.parametrize("levers", [(), ("recompute",), ("in_place_prefix", "early_updates"), ("bf16",), EXACT])
def test_a_step_costs_what_the_planner_says(levers):
    from slt_planner.planning.bench import Bench

    config = Config(freeze_depth=1, full_depth=2, head_scale=0.5)
    with Bench(GRAPH, SPEC, lever_sets=[levers]) as bench:
        planned = bench.with_levers(levers).costs(config)
    own = client_costs(GRAPH, ClientStep(config), SPEC.with_levers(levers))
    assert own.train_flops_per_sample == planned.train_flops_per_sample
    assert own.upload_bytes == planned.upload_bytes
    assert own.download_bytes(0) == planned.download_bytes


def test_a_rounds_sum_by_hand():
    narrow, wide = ClientCosts({1: 100, 2: 10, 3: 1}, 11, 7), ClientCosts({1: 100, 2: 10, 3: 5}, 15, 9)
    visits = [
        Visit(client=4, answer="in_time", costs=narrow, images=2),  # has unit 1
        Visit(client=5, answer="in_time", costs=wide, images=3),  # has nothing
        Visit(client=6, answer="late", costs=wide, images=5),
        Visit(client=7, answer="never", costs=wide, images=100),
    ]
    costs = round_costs(visits, Holders(stage=2, depth=1, clients=(4, 9)))
    assert costs.bytes_down == 11 + 115 + 115
    assert costs.bytes_up == 11 + 15
    assert costs.train_flops == 7 * 2 + 9 * 3 + 9 * 5
    assert costs.holders.clients == (4, 5, 6, 9)
    assert costs.holders.of(2, 1) is costs.holders
    assert costs.holders.of(3, 1) == Holders(stage=3, depth=1)
    assert round_costs(visits, Holders(stage=2)).holders.clients == ()  # nothing is frozen: nobody is remembered


@cache
def both_freeze():
    """A plan of two tiers that both freeze the first unit in the last stage."""
    full = tiny_runs.full_plan().full_network.peak_bytes
    tiers = [Tier(name=name, budget_bytes=size, share=0.5) for name, size in (("a", full * 19 // 20), ("b", full - 1))]
    return solve(GRAPH, tiers, SPEC)


@pytest.mark.parametrize("troubled", [False, True])
def test_a_run_costs_what_its_plan_says_client_by_client(tmp_path, troubled):
    """An independent count over the whole run, from the plan's own figures and the draws of clients."""
    plan = both_freeze()
    chances = {"client_dropout": 0.3, "stragglers": 0.3} if troubled else {}
    changes = {"rounds": 12, "clients": 10, "cohort_size": 4, "local_epochs": 2, **chances}
    prepared_run = prepared(plan, tiny_runs.dataset(), **changes)
    result = run(plan, tiny_runs.dataset(), tmp_path / "run", **changes)
    seen, lost, late, resent = set(), 0, 0, 0
    for row in result.rows:
        up = down = flops = 0
        state = ServerState(row.round - 1, prepared_run.start.weights)
        for own in draw_cohort(prepared_run, state):
            tier = next(tier for tier in plan.tiers if tier.name == own.tier)
            stage = tier.stages[row.stage]
            draws = np.random.default_rng([3, 0x616E7377, row.round, own.client]).random(2)
            if troubled and draws[0] < 0.3:
                lost += 1
                continue
            down += stage.download_bytes
            if (row.stage, own.client) in seen:
                down -= unchanging_bytes(plan, row.stage)
                resent += unchanging_bytes(plan, row.stage)
            seen.add((row.stage, own.client))
            flops += stage.train_flops_per_sample * len(prepared_run.images_of[own.client]) * 2
            if troubled and draws[1] < 0.3:
                late += 1
            else:
                up += stage.upload_bytes
        assert (row.bytes_up, row.bytes_down, row.train_flops) == (up, down, flops)
    assert sum(row.dropped_out for row in result.rows) == lost
    assert sum(row.stragglers for row in result.rows) == late
    assert (lost > 5 and late > 5) == troubled
    assert troubled or resent > 0  # something is frozen, and was not sent again


def test_how_a_client_answers_is_its_own_luck():
    answers = [answer(7, number, client, 0.2, 0.5) for number in range(40) for client in range(50)]
    assert answers == [answer(7, number, client, 0.2, 0.5) for number in range(40) for client in range(50)]
    for name, share in (("never", 0.2), ("late", 0.8 * 0.5), ("in_time", 0.8 * 0.5)):
        assert answers.count(name) / len(answers) == pytest.approx(share, abs=0.04)
    assert answers != [answer(8, number, client, 0.2, 0.5) for number in range(40) for client in range(50)]


def test_clients_that_do_not_answer_leave_the_model_as_it_was():
    prepared_run = prepared(tiny_runs.full_plan(), tiny_runs.dataset(), stragglers=0.999, client_dropout=0.3)
    after, row = run_round(prepared_run, prepared_run.start)
    assert row.dropped_out + row.stragglers == row.clients
    assert (row.bytes_up, row.refused, row.train_loss) == (0, 0, None)
    assert (row.bytes_down > 0) == (row.train_flops > 0) == (row.stragglers > 0)
    for name, value in prepared_run.start.weights.items():
        assert after.weights[name].numpy().tobytes() == value.numpy().tobytes()


def test_only_clients_that_were_chosen_are_remembered():
    prepared_run = prepared(both_freeze(), tiny_runs.dataset(), rounds=12)
    state, chosen, stage = prepared_run.start, set(), 0
    for _ in range(12):
        now = prepared_run.strategy.stage(state)
        chosen = chosen if now == stage else set()
        stage = now
        chosen |= {own.client for own in draw_cohort(prepared_run, state)}
        state, _ = run_round(prepared_run, state)
        holders = state.progress.holders
        assert set(holders.clients) == (chosen if holders.depth else set())
    assert holders.depth == 1


def test_evaluation_every_few_rounds_and_after_the_last(tmp_path):
    changes = {"rounds": 8, "checkpoint_every": 5}
    every = run(tiny_runs.full_plan(), tiny_runs.dataset(), tmp_path / "every", **changes)
    third = run(tiny_runs.full_plan(), tiny_runs.dataset(), tmp_path / "third", evaluate_every=3, **changes)
    assert [row.round for row in third.rows if row.accuracy is not None] == [3, 6, 8]
    for one, other in zip(every.rows, third.rows, strict=True):
        assert one.train_loss == other.train_loss
        assert other.accuracy in (one.accuracy, None)
    judged = [every.rows[index].accuracy for index in (2, 5, 7)]
    assert third.mean_last_accuracy == pytest.approx(sum(judged) / 3)
    assert list(third.frame()["accuracy"].notna()) == [number in (3, 6, 8) for number in range(1, 9)]


def follow(losses, patience, threshold):
    """The stages of rounds whose training losses are these."""
    plateau, stages = Plateau(), []
    for loss in losses:
        stages.append(plateau.stage)
        plateau = plateau.after(plateau.stage, loss, patience, threshold)
    return stages


def test_a_plateau_is_so_many_rounds_without_a_lower_loss():
    assert follow([9, 8, 7, 6, 5, 4], 2, 0.01) == [0] * 6
    assert follow([9, 9, 9, 9, 9, 9], 2, 0.01) == [0, 0, 0, 1, 1, 1]
    assert follow([9, 8.95, 8.92, 9, 9, 9], 2, 0.01) == [0, 0, 0, 1, 1, 1]  # each is lower, none by a hundredth
    assert follow([9, 8.95, 8.90, 9, 9, 9], 2, 0.01) == [0, 0, 0, 0, 0, 1]
    assert follow([9, None, None, None, 9, 9, 1], 2, 0.0) == [0, 0, 0, 0, 0, 0, 1]
    assert Plateau(stage=1, best_loss=0.1, waited=4).after(2, 3.0, 5, 0.01) == Plateau(stage=2, best_loss=3.0)


def test_stages_end_sooner_on_a_plateau_and_never_later_than_planned():
    plan, rounds = tiny_runs.scheduled_plan(), 40
    strategy = SuccessiveLayerTraining(plan, rounds)
    last = len(plan.stages) - 1
    for stage in range(last + 3):
        progress = Progress(plateau=Plateau(stage=stage))
        for number in range(rounds):
            planned = strategy.stage(ServerState(number, {}))
            assert strategy.stage(ServerState(number, {}, progress)) == min(max(planned, stage), last)


def test_a_run_goes_on_where_its_loss_stops_falling(tmp_path):
    plan, changes = tiny_runs.scheduled_plan(), {"rounds": 24, "rounds_policy": "plateau", "plateau_patience": 1}
    planned = run(plan, tiny_runs.dataset(), tmp_path / "planned", rounds=24)
    result = run(plan, tiny_runs.dataset(), tmp_path / "plateau", **changes)
    stages = [row.stage for row in result.rows]
    assert stages == sorted(stages)
    assert set(stages) == set(range(len(plan.stages)))
    assert stages != [row.stage for row in planned.rows]
    assert all(own >= row.stage for own, row in zip(stages, planned.rows, strict=True))
    shares = deal_rounds(24, [stage.rounds_fraction for stage in plan.stages])
    best, waited = None, 0
    for before, row in zip(result.rows, result.rows[1:], strict=False):  # the rule in plain words
        if best is None or before.train_loss < 0.99 * best:
            best, waited = before.train_loss, 0
        else:
            waited += 1
        ended = waited == 1 or before.round >= sum(shares[: before.stage + 1])
        assert row.stage == min(before.stage + ended, len(plan.stages) - 1)
        if ended:
            best, waited = None, 0
    with pytest.raises(ValueError, match="the rounds policy plateau is for stages; small has none"):
        tiny_runs.settings_of(strategy="small", rounds_policy="plateau")


def test_of_several_widths_the_arithmetic_is_the_mean_and_the_bytes_are_the_widests():
    def costs(scale, widths=()):
        return client_costs(GRAPH, ClientStep(Config(freeze_depth=0, full_depth=0, head_scale=scale), (), widths), SPEC)

    several = costs(1.0, (0.5, 1.0))
    assert several.upload_bytes == costs(1.0).upload_bytes
    assert several.train_flops_per_sample == (costs(0.5).train_flops_per_sample + costs(1.0).train_flops_per_sample) / 2
