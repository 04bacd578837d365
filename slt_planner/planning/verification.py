"""A plan measured again: the records of that. No torch here."""

from typing import Literal

from slt_planner.config import Config, LeverSet, Record, StepSpec
from slt_planner.planning.plan import Plan, ProofKind

PeakKind = Literal["stage", ProofKind]


class VerifiedPeak(Record):
    """A stage of a tier, or a proof that one notch more is over its budget, as planned and as measured now."""

    tier: str
    stage: int
    kind: PeakKind
    config: Config
    levers: LeverSet = ()
    budget_bytes: int
    planned_peak_bytes: int
    measured_peak_bytes: int

    @property
    def left_bytes(self) -> int:
        """What is left of the budget; negative where it is not enough."""
        return self.budget_bytes - self.measured_peak_bytes

    @property
    def holds(self) -> bool:
        """A stage fits; a proof does not."""
        return (self.left_bytes >= 0) == (self.kind == "stage")


class Verification(Record):
    """A plan measured again: what was measured, with which step, and where."""

    plan: Plan
    spec: StepSpec
    environment: dict[str, str]
    peaks: tuple[VerifiedPeak, ...]

    @property
    def stages_over(self) -> tuple[VerifiedPeak, ...]:
        """Stages that need more than their tier's budget here: the plan must not be run so."""
        return tuple(peak for peak in self.peaks if peak.kind == "stage" and not peak.holds)

    @property
    def proofs_within(self) -> tuple[VerifiedPeak, ...]:
        """Proofs that fit here: the plan can be run, but a larger one could be, too."""
        return tuple(peak for peak in self.peaks if peak.kind != "stage" and not peak.holds)
