"""Checking a plan where it will run: every stage and every proof of every tier measured again."""

from collections.abc import Callable, Iterator

from torch import nn

from slt_planner.config import Config, LeverSet, StepSpec
from slt_planner.environment import environment
from slt_planner.memory.measure import measure
from slt_planner.memory.step import threads
from slt_planner.planning.network import planned_network
from slt_planner.planning.plan import Plan, PlannedStep, TierPlan
from slt_planner.planning.verification import PeakKind, Verification, VerifiedPeak
from slt_planner.submodel.extract import extract


def verify(
    plan: Plan,
    model: nn.Module | str | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Verification:
    """Measure every stage of every tier and its proofs on this machine.

    Args:
        plan: the plan, made here or elsewhere.
        model: the network, or its name; needed where the plan's is the user's own code.
        device: where to measure; by default the plan's own.
        progress: told how many different steps are measured, and of how many.

    Raises:
        InputError: the network is not the plan's, or there is no such device.

    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> from slt_planner.planning.solve import solve
    >>> plan = solve(trace(load_model("convnet"), (3, 32, 32)), ["1GB"], StepSpec(batch_size=2), "convnet")
    >>> verify(plan).stages_over
    ()
    """
    _, graph = planned_network(plan, model, weights=False)
    spec = plan.spec if device is None else StepSpec.model_validate({**plan.spec.model_dump(), "device": device})
    planned = list(_planned(plan))
    different = dict.fromkeys((step.config, step.levers) for *_, step in planned)
    measured: dict[tuple[Config, LeverSet], int] = {}
    with threads(spec) as number:
        for config, levers in different:
            sub = extract(graph, None, config, spec.norms)
            measured[config, levers] = measure(sub, spec.with_levers(levers), details=False).peak_bytes
            progress(len(measured), len(different))
    peaks = tuple(
        VerifiedPeak(
            tier=tier.name,
            stage=stage,
            kind=kind,
            config=step.config,
            levers=step.levers,
            budget_bytes=tier.budget_bytes,
            planned_peak_bytes=step.peak_bytes,
            measured_peak_bytes=measured[step.config, step.levers],
        )
        for tier, stage, kind, step in planned
    )
    return Verification(plan=plan, spec=spec, environment=environment(number), peaks=peaks)


def _planned(plan: Plan) -> Iterator[tuple[TierPlan, int, PeakKind, PlannedStep]]:
    for tier in plan.feasible_tiers:
        yield from ((tier, number, "stage", stage) for number, stage in enumerate(tier.stages))
        yield from ((tier, proof.stage, proof.kind, proof) for proof in tier.proofs)
