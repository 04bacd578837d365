"""Why a budget has no schedule: what is missing, where in the step, and what would do."""

from collections.abc import Sequence
from dataclasses import dataclass

from slt_planner.config import Config, LeverSet, StepSpec
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.bench import Bench
from slt_planner.planning.search import NoSchedule, boundary, smallest_budget
from slt_planner.units import format_bytes


@dataclass(frozen=True)
class Infeasibility:
    """The reason in words, the smallest budget with a schedule, and the largest batch that has one at this budget."""

    text: str
    smallest_budget_bytes: int
    largest_batch: int | None


def explain(bench: Bench, budget: int, outcome: NoSchedule, measuring: bool) -> Infeasibility:
    """Why a budget has no schedule; with `measuring`, the peaks it states are measured."""
    enough = _smallest_budget(bench, measuring)
    floor = bench.leanest(outcome.floor).profile(outcome.floor)
    batch = largest_batch(bench.graph, bench.spec, budget, bench.lever_sets) if bench.predicts else None
    stage = f"stage {outcome.full_depth}" if outcome.full_depth else "the warm-up"
    text = (
        f"{stage} needs {format_bytes(floor.peak_bytes, round_up=True)} even with its narrowest head, "
        f"{format_bytes(floor.peak_bytes - budget, round_up=True)} more than there is{_moment(bench, outcome.floor)}; "
        f"the smallest budget with a schedule is {format_bytes(enough, round_up=True)}"
        + (f", the largest batch within this one {batch} (predicted)" if batch else "")
    )
    return Infeasibility(text, enough, batch)


def _smallest_budget(bench: Bench, measuring: bool) -> int:
    while True:
        config = smallest_budget(bench.space())
        if not (bench.measure_least(config) if measuring else bench.examine([config])):
            return bench.peak(config)


def _moment(bench: Bench, config: Config) -> str:
    """Where in the step the peak is, in words."""
    profile = bench.leanest(config).detailed(config)
    operator = profile.peak_operator.removeprefix("aten::")
    unit = f"{profile.unit_name(profile.peak_unit)}, " if profile.peak_unit else ""
    when = f"{profile.peak_phase}, " if profile.peak_phase else ""
    return f" (in {unit}{when}{operator})"


def largest_batch(graph: ModelGraph, spec: StepSpec, budget: int, lever_sets: Sequence[LeverSet] = ((),)) -> int | None:
    """The largest batch of 2 or more, below the step's own, with a schedule in this budget, as predicted.

    Needs are nearly linear in the batch, so the stage that decides at one batch is asked at the others first: a batch
    that is too large for it is too large.
    """
    batches = range(spec.batch_size - 1, 1, -1)
    benches: dict[int, Bench] = {}

    def bench(batch: int) -> Bench:
        if batch not in benches:
            benches[batch] = Bench(graph, spec.settings.with_batch(batch), measuring=False, lever_sets=lever_sets)
        return benches[batch]

    def has_schedule(batch: int) -> bool:
        with bench(batch) as own:
            space = own.space()
            begins = any(space.fits(config, budget) for config in (space.narrowest(0), own.whole))
            return begins and own.peak(smallest_budget(space)) <= budget

    if not batches or not has_schedule(2):
        return None
    decides = smallest_budget(bench(2).space())
    guess = boundary(batches, lambda batch: bench(batch).space().fits(decides, budget))
    number = boundary(batches, has_schedule, guess)
    return batches[number]
