"""Plans as tables for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slt_planner.config import LeverSet
from slt_planner.planning.plan import Plan, TierPlan, TierStage
from slt_planner.reporting.left_over import left_over
from slt_planner.reporting.words import (
    DATA_DEPENDENT,
    how_known,
    lever_letters,
    lever_lines,
    megabytes,
    reason_text,
    ruler,
    short_scale,
    shorten,
    tier_headline,
)

_STATUS_STYLE = {"full": "green", "scheduled": "cyan", "infeasible": "red"}
_WIDTH = 80
_TIERS_ABREAST = 3


def plan_table(plan: Plan) -> RenderableType:
    """A plan for a terminal of 80 columns: a line a tier, then a row a stage."""
    headlines = Table.grid(padding=(0, 2, 0, 0))
    headlines.add_column(no_wrap=True)
    headlines.add_column(no_wrap=True)
    headlines.add_column(overflow="fold")
    for tier in plan.tiers:
        headlines.add_row(
            Text(shorten(tier.name, 20), style="bold"),
            Text(tier.status, style=_STATUS_STYLE[tier.status]),
            Text(tier_headline(tier, plan)),
        )
    abreast = _Columns.of(plan).abreast
    tiers, alike = _worth_a_column(plan, abreast)
    blocks = [tiers[first : first + abreast] for first in range(0, len(tiers), abreast)]
    own_head = ", head scale in %" if plan.policy == "per-tier" else ""
    own_levers = ", levers" if lever_letters(plan) else ""
    note = (
        f"Per tier: units frozen{own_head}, a client's {how_known(plan)} peak in MB and in % of the budget{own_levers}."
    )
    return Group(
        headlines,
        Text(""),
        *(part for block in blocks for part in (_stage_table(plan, block), Text(""))),
        *([Text(f"{', '.join(alike)}: as {tiers[-1].name}, nothing frozen.", style="dim")] if alike else []),
        Text(f"{shorten(plan.binding_tier.name, 20)}: {left_over(plan.binding_tier)}", style="dim"),
        Text(note, style="dim"),
        *[Text(line, style="dim") for line in lever_lines(plan)],
        Text(f"{how_known(plan).title()}: {ruler(plan)}.", style="dim"),
        *([Text(DATA_DEPENDENT, style="yellow")] if plan.model.data_dependent else []),
    )


def _worth_a_column(plan: Plan, abreast: int) -> tuple[tuple[TierPlan, ...], list[str]]:
    """The tiers to show stage by stage, and the names of those that do in every stage what the last of these does."""
    tiers = plan.feasible_tiers
    own = {tuple(stage.config for stage in tier.stages): tier for tier in reversed(tiers)}
    if len(tiers) <= abreast or tiers[-1].status != "full":
        return tiers, []
    last = own[tuple(stage.config for stage in tiers[-1].stages)]
    shown = tiers[: tiers.index(last) + 1]
    return shown, [shorten(tier.name, 20) for tier in tiers[len(shown) :]]


def plain_table(*titles: str) -> Table:
    """A table without lines, of columns of numbers under these titles."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for title in titles:
        table.add_column(Text(title), justify="right", no_wrap=True, vertical="bottom")
    return table


@dataclass(frozen=True)
class _Columns:
    """How wide the parts of a table of stages are: what all tiers share, and what each has of its own."""

    depth_digits: int
    own_head: bool

    @classmethod
    def of(cls, plan: Plan) -> "_Columns":
        return cls(len(str(plan.model.depth)), plan.policy == "per-tier")

    @property
    def shared(self) -> int:
        return len("stage rounds width ") + (0 if self.own_head else len("head limited by  "))

    @property
    def tier(self) -> int:
        return self.depth_digits + len("  123.4 100%") + (len(" 12.3") if self.own_head else 0)

    @property
    def abreast(self) -> int:
        """How many tiers fit beside one another."""
        return min(_TIERS_ABREAST, (_WIDTH - self.shared + 1) // (self.tier + 1))


def _stage_table(plan: Plan, tiers: Sequence[TierPlan]) -> Table:
    columns = _Columns.of(plan)
    table = plain_table("\nstage", "rounds\n%", "full\nwidth", *([] if columns.own_head else ["head\n%"]))
    if not columns.own_head:
        table.add_column(Text("limited\nby"), no_wrap=True, min_width=11)
    letters = lever_letters(plan)
    bar_width = min(12, (_WIDTH - columns.shared) // len(tiers) - columns.tier - 3)
    for tier in tiers:
        title = f"{shorten(tier.name, columns.tier)}\nfrozen, {'head, ' if columns.own_head else ''}peak"
        # Cells are of one width, and a blank at the end of one would be lost on the right.
        table.add_column(Text(title, justify="right"), justify="left" if letters else "right", no_wrap=True)
        if bar_width >= 4:
            table.add_column("")
    for number, stage in enumerate(plan.stages):
        shared = [str(number), f"{100 * stage.rounds_fraction:.1f}", str(stage.full_depth)]
        if not columns.own_head:
            shared += [short_scale(stage.head_scale), reason_text(stage.limited_by)]
        cells: list[RenderableType] = [*shared]
        for tier in tiers:
            own = tier.stages[number]
            cells.append(_tier_cell(own, tier, columns, letters))
            if bar_width >= 4:
                cells.append(_budget_bar(own, tier, bar_width))
        table.add_row(*cells)
    return table


def _tier_cell(stage: TierStage, tier: TierPlan, columns: _Columns, letters: Mapping[LeverSet, str]) -> Text:
    fraction = stage.peak_bytes / tier.budget_bytes
    head = f" {short_scale(stage.head_scale):>4}" if columns.own_head else ""
    text = Text(f"{stage.freeze_depth:>{columns.depth_digits}}{head} {megabytes(stage.peak_bytes):>5} ")
    text.append(f"{100 * fraction:>3.0f}%", style="yellow" if fraction > 0.95 else "green")
    return text.append(letters.get(stage.levers, " ") if letters else "")


def _budget_bar(stage: TierStage, tier: TierPlan, width: int) -> ProgressBar:
    return ProgressBar(total=tier.budget_bytes, completed=stage.peak_bytes, width=width, pulse=False)
