"""A plan measured again, for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slt_planner.config import LeverSet
from slt_planner.planning.plan import TierPlan
from slt_planner.planning.verification import Verification, VerifiedPeak
from slt_planner.reporting.plan_table import plain_table
from slt_planner.reporting.profile_view import fine_bytes
from slt_planner.reporting.words import count, lever_letters, lever_lines, megabytes, percent, ruler, shorten


def verification_view(verification: Verification) -> RenderableType:
    """A line a tier, a row a stage, and the proofs that no longer hold."""
    parts: list[RenderableType] = []
    for tier in verification.plan.feasible_tiers:
        own = [peak for peak in verification.peaks if peak.tier == tier.name]
        parts += [_headline(tier, own), _stages(own, lever_letters(verification.plan)), Text("")]
    if loose := verification.proofs_within:
        parts += [
            Text("One notch more than planned fits here; make the plan again to use it:"),
            _proofs(loose),
            Text(""),
        ]
    note = "MB as planned and as measured now; what is left of the budget."
    measured = verification.plan.model_copy(update={"step": verification.spec.settings})
    notes = [note, *lever_lines(verification.plan), f"Measured: {ruler(measured)}."]
    return Group(*parts, *[Text(line, style="dim") for line in notes])


def _headline(tier: TierPlan, peaks: Sequence[VerifiedPeak]) -> Text:
    stages = [peak for peak in peaks if peak.kind == "stage"]
    proofs = [peak for peak in peaks if peak.kind != "stage"]
    over = sum(not peak.holds for peak in stages)
    text = Text(f"{shorten(tier.name, 20)}  ", style="bold")
    if over:
        text.append(f"{over} of {count(len(stages), 'stage')} over budget", style="red")
    else:
        tightest = max(peak.measured_peak_bytes for peak in stages) / tier.budget_bytes
        text.append(
            f"{count(len(stages), 'stage')}, every one within budget, tightest {percent(tightest)}", style="green"
        )
    if proofs:
        holding = sum(peak.holds for peak in proofs)
        text.append(f"; {holding} of {count(len(proofs), 'proof')} over", style="not bold")
    return text


def _stages(peaks: Sequence[VerifiedPeak], letters: Mapping[LeverSet, str]) -> Table:
    table = plain_table("stage", "frozen", "full", "head %", "planned", "measured", "left")
    table.add_column("")
    for peak in peaks:
        if peak.kind == "stage":
            verdict = Text("fits", style="green") if peak.holds else Text("over", style="red")
            table.add_row(*_cells(peak), verdict.append(f" {letters.get(peak.levers, '')}".rstrip(), style="default"))
    return table


def _proofs(peaks: Sequence[VerifiedPeak]) -> Table:
    table = plain_table("stage", "frozen", "full", "head %", "planned", "measured", "left")
    table.add_column("tier")
    table.add_column("more")
    for peak in peaks:
        table.add_row(*_cells(peak), Text(shorten(peak.tier, 14)), peak.kind.replace("_", " "))
    return table


def _cells(peak: VerifiedPeak) -> list[Text]:
    config = peak.config
    peaks = (megabytes(peak.planned_peak_bytes), megabytes(peak.measured_peak_bytes))
    places = (str(peak.stage), str(config.freeze_depth), str(config.full_depth), f"{100 * config.head_scale:.3g}")
    return [Text(cell) for cell in (*places, *peaks, fine_bytes(peak.left_bytes))]
