"""The checks that the benchmark of the planner's promise makes, on a small network."""

import pytest

from benchmarks import promise
from slt_planner.config import StepSpec
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve

GRAPH = trace(load_model("convnet", weights=False), (3, 32, 32))
SPEC = StepSpec(batch_size=4, threads=1)


@pytest.fixture(scope="module")
def smallest():
    return promise.smallest_budget(GRAPH, SPEC)["smallest_budget_bytes"]


def test_only_the_first_stage_that_no_head_fits_is_the_reason(smallest):
    answer = promise.refused(GRAPH, SPEC, smallest)
    assert answer["holds"]
    right = "stage 3 needs"
    assert right in answer["says"]
    for wrong in ("stage 2 needs", "the warm-up needs", "too little"):
        says = answer["says"].replace(right, wrong)
        assert not promise.names_first_floor_over(GRAPH, SPEC, says, smallest - 1)


def test_a_budget_with_a_schedule_is_not_refused(smallest):
    assert not promise.refused(GRAPH, SPEC, smallest + 1)["holds"]


def test_a_proof_left_out_is_missed(smallest):
    plan = solve(GRAPH, [promise.tier(smallest)], SPEC, "convnet")
    (only,) = plan.tiers
    assert promise.missing_proofs(plan) == set()
    bare = plan.model_copy(update={"tiers": (only.model_copy(update={"proofs": ()}),)})
    assert promise.missing_proofs(bare) == {(proof.stage, proof.kind) for proof in only.proofs} != set()


def test_stages_over_and_proofs_within_are_on_the_wrong_side():
    peaks = [{"kind": kind, "budget_bytes": 10, "peak": peak} for kind in ("stage", "less_frozen") for peak in (10, 11)]
    assert [promise.wrong_side([peak], "peak") for peak in peaks] == [0, 1, 1, 0]


def test_a_stopped_run_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(promise, "planned", lambda graph, spec, name, budget: {"budget_bytes": budget})
    networks = []
    entry = promise.entry_of(networks, "convnet", GRAPH, SPEC)
    entry |= {"below": {}, "smallest_budget_bytes": 100, "plans": [{"times_smallest": 1.0}]}
    again = promise.entry_of(networks, "convnet", GRAPH, SPEC)
    assert [answer["budget_bytes"] for answer in promise.missing_answers(again, GRAPH, SPEC)] == [105, 150, 200]
    assert not list(promise.missing_answers(again, GRAPH, SPEC))
