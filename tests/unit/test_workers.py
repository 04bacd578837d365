"""Clients in processes of their own: the run of one thread, to the bit, and what happens to a worker that ends."""

import os
import signal
import sys
from dataclasses import replace

import pytest
import torch

from slt_planner.errors import InputError, SltError
from slt_planner.federated.engines import workers
from slt_planner.federated.result import TIMING_FIELDS
from slt_planner.federated.rounds import run_round
from tests.unit.tiny_runs import dataset, full_plan, prepared, run, scheduled_plan

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="workers are forked, on Linux and without a GPU"
)


def rows(result):
    return [row.model_dump(exclude=TIMING_FIELDS) for row in result.rows]


@pytest.mark.parametrize("strategy", ["slt", "heterofl", "fjord", "fedrolex"])
def test_workers_make_the_run_of_one_thread_to_the_bit(tmp_path, strategy):
    changes = {"strategy": strategy, "cohort_size": 5, "rounds": 6}
    alone = run(scheduled_plan(), dataset(), tmp_path / "alone", **changes)
    at_once = run(scheduled_plan(), dataset(), tmp_path / "at_once", **changes, workers=3)
    assert rows(alone) == rows(at_once)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("alone", "at_once")]
    assert weights[0] == weights[1]


def test_a_plan_of_more_threads_is_measured_and_run_on_one():
    two = full_plan().model_copy(update={"step": full_plan().step.model_copy(update={"threads": 2})})
    here = prepared(two, dataset(), workers=2)
    assert here.step_with(()).threads == 1
    assert here.client_peaks == prepared(full_plan(), dataset()).client_peaks
    assert prepared(two, dataset()).step_with(()).threads == 2


def test_an_error_in_a_worker_is_the_error_of_the_run():
    here = prepared(full_plan(), dataset(), workers=2, enforce=True)
    tight = replace(here, plan=here.plan.model_copy(update={"tiers": (_with_budget(here.plan.tiers[0], 1000),)}))
    with pytest.raises(SltError, match="over the budget of 1,000"):
        run_round(tight, tight.start, workers.WorkerEngine(2))


def _with_budget(tier, budget_bytes):
    return tier.model_copy(update={"budget_bytes": budget_bytes})


def test_a_worker_that_is_killed_ends_the_run_with_a_word_of_advice(monkeypatch):
    monkeypatch.setattr(workers, "train_assignment", lambda *own: os.kill(os.getpid(), signal.SIGKILL))
    here = prepared(full_plan(), dataset(), workers=2)
    with pytest.raises(SltError, match=r"a worker was killed.*--resume"):
        run_round(here, here.start, workers.WorkerEngine(2))


def test_no_more_updates_wait_than_twice_the_workers(monkeypatch):
    asked = []
    submit = workers.ProcessPoolExecutor.submit
    monkeypatch.setattr(
        workers.ProcessPoolExecutor, "submit", lambda pool, *own: (asked.append(own), submit(pool, *own))[1]
    )
    here = prepared(full_plan(), dataset(), workers=2, clients=8, cohort_size=8)
    engine, merged = workers.WorkerEngine(2), []
    whole = engine.run_clients

    def counted(*own):
        for update in whole(*own):
            merged.append(update)
            assert len(asked) - len(merged) <= 4
            yield update

    monkeypatch.setattr(engine, "run_clients", counted)
    run_round(here, here.start, engine)
    assert len(merged) == len(asked) == 8


def test_where_fork_does_not_do_workers_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(InputError, match="2 workers are forked"):
            prepared(full_plan(), dataset(), workers=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        prepared(full_plan(), dataset(), workers=2)
