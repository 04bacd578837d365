"""The Flower engine against the local one, message by message, in this process."""

from dataclasses import replace
from functools import cache

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Error, RecordDict

from slt_planner.errors import InputError, SltError
from slt_planner.federated.engines.flower.client import Site, client_app
from slt_planner.federated.engines.flower.engine import FlowerEngine
from slt_planner.federated.engines.flower.messages import read_state, write_state
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.experiment import begin_run, continue_run
from slt_planner.federated.result import TIMING_FIELDS
from slt_planner.federated.run_folder import load_run
from slt_planner.planning.solve import solve
from tests.in_process_grid import InProcessGrid
from tests.unit import tiny_runs
from tests.unit.tiny_runs import GRAPH, SPEC, dataset, full_plan, prepared, scheduled_plan

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("one_thread")]

QUICK = FlowerOptions(deadline_s=0.05, wait_s=0.05)


@cache
def frozen_plan():
    """One tier, which freezes a unit in the last stage."""
    return solve(GRAPH, [f"{full_plan().full_network.peak_bytes - 1}B"], SPEC)


def find_site(brief, config):
    return Site(GRAPH, dataset(), own_images=bool(config.get("dataset")))


def grid_of(clients=5, spoil=lambda node_id, message, reply: reply, **config):
    return InProcessGrid(client_app(find_site), [{"partition-id": c, **config} for c in range(clients)], spoil)


def run_on(grid, folder, plan=None, options=QUICK, **changes):
    run = prepared(plan or scheduled_plan(), dataset(), **changes)
    begin_run(run, folder)
    return continue_run(run, folder, engine=FlowerEngine(grid, options))


def rows_of(result):
    return [row.model_dump(exclude=set(TIMING_FIELDS)) for row in result.rows]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "heterofl"},
        {"strategy": "fjord"},
        {"strategy": "federated-dropout"},
        {"strategy": "fedolf", "enforce": True},
        {"client_dropout": 0.3},
        {"rounds_policy": "plateau", "plateau_patience": 1, "cohort_size": 5},
    ],
)
def test_the_same_run_as_on_the_local_engine_to_the_bit(tmp_path, changes):
    local = tiny_runs.run(scheduled_plan(), dataset(), tmp_path / "local", **changes)
    flower = run_on(grid_of(), tmp_path / "flower", **changes)
    assert rows_of(flower) == rows_of(local)
    assert (tmp_path / "flower/weights.safetensors").read_bytes() == (
        tmp_path / "local/weights.safetensors"
    ).read_bytes()


def test_a_frozen_weight_travels_once_a_stage_to_a_client(tmp_path):
    grid = grid_of()
    result = run_on(grid, tmp_path / "run", frozen_plan(), cohort_size=5, rounds=9)
    tasks = [message.content for message in grid.sent if "weights" in message.content]
    sizes = [sum(t.nbytes for t in read_state(content.array_records["weights"]).values()) for content in tasks]
    assert sum(sizes) == sum(row.bytes_down for row in result.rows)
    assert any('"held_depth":0' not in content.config_records["record"]["json"] for content in tasks)


def test_a_client_that_comes_back_as_another_node_gets_everything_again(tmp_path):
    grid = grid_of()
    run = prepared(frozen_plan(), dataset(), cohort_size=5, rounds=9)
    begin_run(run, tmp_path / "run")
    ids = iter(range(1000, 1010))

    def restart(row):  # every node loses what it kept
        for context in list(grid.contexts.values())[:1]:
            grid.contexts.pop(context.node_id)
            context.node_id = next(ids)
            context.state.clear()
            grid.contexts[context.node_id] = context

    result = continue_run(run, tmp_path / "run", restart, FlowerEngine(grid, QUICK))
    assert [row.refused + row.dropped_out for row in result.rows] == [0] * 9
    plain = tiny_runs.run(frozen_plan(), dataset(), tmp_path / "plain", cohort_size=5, rounds=9)
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (tmp_path / "plain/weights.safetensors").read_bytes()
    assert sum(row.bytes_down for row in result.rows) > sum(row.bytes_down for row in plain.rows)


def test_a_node_that_comes_during_a_round_is_asked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("slt_planner.federated.engines.flower.engine._LOOK_S", 0)

    def comes_back(node_id, message, reply):
        if node_id == 101 and message.metadata.group_id == "2":
            grid.contexts[201] = replace(grid.contexts.pop(101), node_id=201, state=RecordDict())
            return None
        return reply

    grid = grid_of(3, comes_back)
    run = prepared(full_plan(), dataset(), clients=3, cohort_size=3, rounds=3)
    begin_run(run, tmp_path / "run")
    asked = []
    result = continue_run(
        run,
        tmp_path / "run",
        lambda row: asked.append(201 in [message.metadata.dst_node_id for message in grid.sent]),
        FlowerEngine(grid, QUICK),
    )
    assert asked == [False, True, True]
    assert [row.stragglers + row.dropped_out + row.refused for row in result.rows] == [0, 1, 0]


def test_a_node_without_a_number_takes_that_of_one_that_is_gone(tmp_path):
    grid = InProcessGrid(client_app(find_site), [{} for _ in range(3)])
    run = prepared(full_plan(), dataset(), clients=3, cohort_size=3, rounds=5)
    begin_run(run, tmp_path / "run")

    def change(row):
        if row.round == 1:  # there are more nodes than clients for a while
            grid.contexts[201] = replace(grid.contexts[101], node_id=201, state=RecordDict())
        if row.round == 3:
            grid.contexts.pop(101)

    result = continue_run(run, tmp_path / "run", change, FlowerEngine(grid, QUICK))
    assert [row.dropped_out + row.refused + row.stragglers for row in result.rows] == [0] * 5
    rounds = [message.metadata.group_id for message in grid.sent if message.metadata.dst_node_id == 201]
    assert rounds == ["", "4", "5"]


def test_a_node_that_has_lost_what_it_kept_says_so_and_gets_it_again(tmp_path):
    grid = grid_of()
    run = prepared(frozen_plan(), dataset(), cohort_size=5, rounds=12)
    begin_run(run, tmp_path / "run")
    last = run.strategy.tier_step(replace(run.start, round=11), run.plan.tiers[0].name).config

    def lose(row):
        if row.config == last and not any(row.config == last for row in load_run(tmp_path / "run").rows[:-1]):
            grid.contexts[100].state.clear()

    result = continue_run(run, tmp_path / "run", lose, FlowerEngine(grid, QUICK))
    (refusal,) = [own for row in result.rows for own in row.refusals]
    assert refusal.client == 0
    assert "were to be kept here are not; they will come again" in refusal.reason
    assert result.rows[-1].refused == 0


def failing(kind, node=101, rounds=("2",)):
    """A node that fails in a way in some rounds."""

    def spoil(node_id, message, reply):
        metadata = message.metadata
        return kind(reply) if node_id == node and metadata.group_id in rounds else reply

    return spoil


def with_weights(change):
    """A reply whose weights are changed."""

    def kind(reply):
        state = read_state(reply.content.array_records["weights"])
        reply.content["weights"] = write_state(change(state))
        return reply

    return kind


def damaged(reply):
    array = reply.content.array_records["weights"]["state"]
    array.data = array.data[: len(array.data) // 2]
    return reply


def lying(reply):
    reply.content["record"] = ConfigRecord({"json": '{"loss": 1.0, "samples": 1000000}'})
    return reply


def talking(reply):
    reply.content["record"] = ConfigRecord({"json": '{"loss": 1.0, "samples": 3, "order": 66}'})
    return reply


def empty(reply):
    reply.content["weights"] = ArrayRecord()
    return reply


def infinite(state):
    return {name: torch.full_like(tensor, torch.inf) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("kind", "field", "words"),
    [
        (lambda reply: Error(2, "MemoryError: 64 MB"), "refused", "MemoryError: 64 MB"),
        (lambda reply: Error(8), "refused", "its process was killed"),
        (lambda reply: Error(5), "dropped_out", "its node is gone"),
        (lambda reply: Error(3), "stragglers", "no answer within 0.05 s"),
        (lambda reply: None, "stragglers", "no answer within 0.05 s"),
        (damaged, "refused", "weights that cannot be read"),
        (empty, "refused", "not one safetensors array"),
        (lying, "refused", "it says 1000000 images, of its 27"),
        (talking, "refused", "outcome is not valid: order"),
        (with_weights(lambda state: {}), "refused", "lacks"),
        (with_weights(infinite), "refused", "not finite"),
    ],
)
def test_a_round_goes_on_without_a_client_and_names_it(tmp_path, kind, field, words):
    result = run_on(grid_of(spoil=failing(kind)), tmp_path / "run", full_plan(), cohort_size=3, clients=3, rounds=3)
    for row in result.rows:
        counts = {name: getattr(row, name) for name in ("refused", "dropped_out", "stragglers")}
        assert counts == dict.fromkeys(counts, 0) | ({field: 1} if row.round == 2 else {})
    row = result.rows[1]
    (named,) = row.refusals if field == "refused" else row.absent
    assert named.client == 1
    assert words in named.reason
    assert row.train_loss is not None
    one = result.rows[0].bytes_up // 3
    assert row.bytes_up == one * (3 if field == "refused" and "killed" not in words and "Memory" not in words else 2)


def test_a_client_that_fails_is_told_in_one_line(tmp_path):
    def no_memory(brief, config):
        raise MemoryError("cannot allocate 1 GB")

    grid = InProcessGrid(client_app(no_memory), [{"partition-id": 0}])
    result = run_on(grid, tmp_path / "run", full_plan(), clients=1, cohort_size=1, rounds=1)
    assert [own.reason for own in result.rows[0].refusals] == ["MemoryError: cannot allocate 1 GB"]
    assert result.rows[0].bytes_up == 0


def test_too_few_answers_leave_the_model_as_it_was(tmp_path):
    options = FlowerOptions(deadline_s=0.05, wait_s=0.05, minimum_answers=3)
    grid = grid_of(spoil=failing(lambda reply: None, rounds=("1",)))
    run = prepared(full_plan(), dataset(), clients=3, cohort_size=3, rounds=1)
    begin_run(run, tmp_path / "run")
    result = continue_run(run, tmp_path / "run", engine=FlowerEngine(grid, options))
    assert result.rows[0].train_loss is None
    assert {own.reason for own in result.rows[0].refusals} == {"2 of 3 clients answered, at least 3 must"}


def test_a_run_without_clients_stops_and_goes_on_from_its_checkpoint(tmp_path):
    changes = {"clients": 3, "cohort_size": 3, "rounds": 4}
    local = tiny_runs.run(full_plan(), dataset(), tmp_path / "local", **changes)
    grid, run = grid_of(3), prepared(full_plan(), dataset(), **changes)
    begin_run(run, tmp_path / "run")

    def all_gone(row):
        if row.round == 2:
            grid.contexts.clear()

    with pytest.raises(SltError, match="0 of 3 clients are connected after"):
        continue_run(run, tmp_path / "run", all_gone, FlowerEngine(grid, QUICK))
    assert len(load_run(tmp_path / "run").rows) == 2
    result = continue_run(run, tmp_path / "run", engine=FlowerEngine(grid_of(3), QUICK))
    assert rows_of(result) == rows_of(local)


def test_a_lost_process_of_a_simulation_stops_the_run(tmp_path):
    with pytest.raises(SltError, match="Flower lost the process of client 1 "):
        run_on(grid_of(3, spoil=failing(lambda r: Error(0, "died"))), tmp_path / "run", clients=3, cohort_size=3)


def test_tiers_are_those_that_nodes_name_or_have_memory_for(tmp_path):
    plan = scheduled_plan()
    tiny, weak, strong = plan.tiers
    run = prepared(plan, dataset(), clients=4, cohort_size=4)

    def tiers_of(*configs, free=10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slt_planner.federated.engines.flower.introduction.free_memory", lambda: free)
            engine = FlowerEngine(InProcessGrid(client_app(find_site), configs), QUICK)
            return engine, engine.meet(run).tier_of

    assert tiers_of({"tier": "weak"}, {"tier": "strong"}, {}, {"partition-id": 3})[1] == (1, 2, *run.tier_of[2:])
    for free, tier in ((strong.budget_bytes, 2), (weak.budget_bytes, 1), (tiny.budget_bytes, 0)):
        assert tiers_of({"tier": "measured"}, free=free)[1][0] == tier
    engine, _ = tiers_of({"partition-id": 0}, {"partition-id": 1, "tier": "measured"}, free=10)
    assert engine._turned_away == {1: "it has 10 B free, and the plan's least budget is 1.0 kB"}
    engine, _ = tiers_of({"partition-id": 0}, {"partition-id": 1, "tier": "huge"})
    assert engine._turned_away == {1: "its tier is huge; the plan has tiny, weak, strong"}


def test_a_device_may_train_on_images_of_its_own(tmp_path):
    grid = InProcessGrid(client_app(find_site), [{"partition-id": 0, "dataset": "its own"}])
    result = run_on(grid, tmp_path / "run", full_plan(), clients=1, cohort_size=1, rounds=1, partition="iid")
    assert result.rows[0].refused == 0
    assert all("images" not in message.content for message in grid.sent)


def test_bf16_travels(tmp_path):
    tensor = torch.randn(3, 4).bfloat16()
    assert torch.equal(read_state(write_state({"a": tensor}))["a"], tensor)
    with pytest.raises(InputError, match="not one safetensors array"):
        read_state(ArrayRecord())
