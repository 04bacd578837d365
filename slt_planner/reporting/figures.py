"""Pictures of plans and runs. Every function makes its own Figure; no state is shared and nothing is displayed."""

import io
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any, ParamSpec

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from slt_planner.federated.result import RunResult
from slt_planner.memory.profile import CATEGORIES
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.reporting.looks import CATEGORY_COLOURS, LOOKS, PART_COLOURS, Look, run_looks, stage_parts, tint
from slt_planner.reporting.run_groups import Curve, RunGroup, dataset_titles, metric_title, run_groups
from slt_planner.reporting.words import brief_scale, byte_unit, count, how_known, model_title, ruler, shorten
from slt_planner.units import format_bytes

INK, MUTED, GRID, PAPER = "#1b2430", "#5c6773", "#dfe4ea", "#ffffff"
WIDTH_IN, _DPI = 10.667, 150  # 1,600 pixels
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PAPER,
    "figure.dpi": _DPI,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_Arguments = ParamSpec("_Arguments")


def styled(draw: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    """Draw in the house style whatever the caller's matplotlib settings are."""

    @wraps(draw)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        with style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return wrapper


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji in a name
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@styled
def plan_figure(plan: Plan) -> Figure:
    """The whole plan in one picture: each tier's schedule above, and its memory stage by stage below."""
    tiers = plan.feasible_tiers
    columns = min(3, len(tiers))
    rows = -(-len(tiers) // columns)
    heights = [0.75 + 1.75 * len(tiers), 0.75 + 2.7 * rows]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.85), layout="constrained")
    budgets = ", ".join(shorten(tier.name, 16) for tier in tiers[:6]) + (" …" if len(tiers) > 6 else "")
    figure.suptitle(
        f"{model_title(plan)}: {count(len(plan.stages), 'stage')} for {budgets}\n",
        fontsize=14,
        fontweight="bold",
        x=0.012,
        ha="left",
    )
    figure.text(
        0.012, 1 - 0.52 / figure.get_figheight(), f"{how_known(plan).title()}: {ruler(plan)}", color=MUTED, fontsize=10
    )
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    _draw_schedules(upper, plan)
    panels = lower.subplots(rows, columns, squeeze=False).flat
    for number, (axes, tier) in enumerate(zip(panels, tiers, strict=False)):
        _draw_memory(axes, tier, how_known(plan), wide=columns == 1)
        if number % columns:
            axes.set_ylabel("")
    for axes in list(lower.axes)[len(tiers) :]:
        axes.set_visible(False)
    _category_legend(lower, tiers)
    return figure


def _draw_schedules(figure: FigureBase, plan: Plan) -> None:
    tiers = plan.feasible_tiers
    panels = figure.subplots(len(tiers), 1, sharex=True, squeeze=False)
    for axes, tier in zip(panels.flat, tiers, strict=True):
        _draw_schedule(axes, plan, tier)
    panels[-1, 0].set_xlabel("share of the rounds (%)")
    names = {"frozen": "frozen", "trained": "trained at full width", "head": "head, trained at the width written in it"}
    used = {part for tier in tiers for stage in tier.stages for part, *_ in stage_parts(stage, plan.model.depth)}
    handles = [Patch(facecolor=PART_COLOURS[part], label=name) for part, name in names.items() if part in used]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2)


def _draw_schedule(axes: Axes, plan: Plan, tier: TierPlan) -> None:
    depth = plan.model.depth
    lefts = [100 * left for left in accumulate((stage.rounds_fraction for stage in plan.stages), initial=0.0)]
    small: dict[str, Any] = {"va": "bottom", "fontsize": 8.5, "color": MUTED}
    for number, stage in enumerate(tier.stages):
        left, width = lefts[number], 100 * plan.stages[number].rounds_fraction
        for part, top, bottom in stage_parts(stage, depth):
            colour = tint(PART_COLOURS[part], 0.3 + 0.7 * stage.head_scale) if part == "head" else PART_COLOURS[part]
            box: dict[str, Any] = {"color": colour, "edgecolor": PAPER, "linewidth": 0.7 if depth <= 30 else 0.3}
            axes.bar(left, bottom - top, width, top, align="edge", **box)
        _write_head_scale(axes, left + width / 2, width, (stage.full_depth, depth), stage.head_scale)
        if width >= 0.2 + 0.85 * len(str(number)):
            axes.text(left + width / 2, -0.035 * depth, str(number), ha="center", **small)
    axes.set(xlim=(0, 100), ylim=(depth, 0), ylabel="unit")
    axes.set_title(f"{shorten(tier.name, 30)} ({tier.status})", pad=17)
    axes.text(0.0, -0.035 * depth, "stage  ", ha="right", **small)
    every = max(1, round(depth / 4))
    shown = [1, *range(max(2, every), depth - every // 2, every), depth] if depth > 1 else [1]
    axes.set_yticks([unit - 0.5 for unit in shown], [str(unit) for unit in shown])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _write_head_scale(axes: Axes, x: float, width: float, units: tuple[int, int], scale: float) -> None:
    """The width of a head inside its area, upright or turned, if there is room for either."""
    across, down = 6.9 * width, 88 * (units[1] - units[0]) / units[1]  # points, in a panel of about 690 by 88
    text = brief_scale(scale)
    turned = across < 30
    if (down < 30 or across < 8.4) if turned else down < 10:
        return
    y = (units[0] + units[1]) / 2
    axes.text(
        x, y, text, ha="center", va="center", fontsize=8 if turned else 9, rotation=90 if turned else 0, color="#3a2c00"
    )  # fmt: skip


def _draw_memory(axes: Axes, tier: TierPlan, how: str, wide: bool) -> None:
    """Stacked bars, a stage each; a budget far above them is written instead of drawn."""
    highest = max(stage.peak_bytes for stage in tier.stages)
    in_sight = tier.budget_bytes < 4 * highest
    top = 1.17 * (tier.budget_bytes if in_sight else highest)
    unit, size = byte_unit(top)
    numbers = range(len(tier.stages))
    bottoms = [0.0] * len(tier.stages)
    for category in CATEGORIES:
        heights = [stage.breakdown.get(category, 0) / size for stage in tier.stages]
        axes.bar(numbers, heights, 0.82, bottoms, color=CATEGORY_COLOURS[category], linewidth=0.3)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    budget = f"budget {format_bytes(tier.budget_bytes)}"
    if in_sight:
        axes.axhline(tier.budget_bytes / size, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
    else:
        budget += ", far above this picture ↑"
    line = tier.budget_bytes / size if in_sight else 1.02 * top / size / 1.17
    side = 0.55 + max(0.0, 3 - len(tier.stages) / 2)  # a single stage is no broad wall
    axes.annotate(budget, (0.1 - side, line), (0, 3), textcoords="offset points", va="bottom", fontsize=9.5)
    axes.set(ylim=(0, top / size), xlim=(-side, max(numbers) + side), xlabel="stage", ylabel=unit)
    axes.set_title(f"{shorten(tier.name, 20)}: {how} peak")
    axes.set_xticks(numbers[:: -(-len(numbers) // (24 if wide else 14))])
    axes.spines["left"].set_visible(False)


def _category_legend(figure: FigureBase, tiers: Sequence[TierPlan]) -> None:
    used = {
        category for tier in tiers for stage in tier.stages for category, size in stage.breakdown.items() if size > 0
    }
    handles = [Patch(facecolor=CATEGORY_COLOURS[name], label=name) for name in CATEGORIES if name in used]
    figure.legend(handles=handles, loc="outside upper left", ncols=8, handlelength=1.2, columnspacing=1.3)


@styled
def accuracy_figure(results: Sequence[RunResult]) -> Figure:
    """Test accuracy over rounds and over uploaded bytes; runs that differ in their seed alone are a mean and a range.

    Ticks mark where a schedule goes to its next stage.
    """
    figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
    over_rounds, over_bytes = figure.subplots(1, 2, sharey=True)
    every = run_groups(results)
    drawn = [(group, look, Curve.of(group)) for group, look in zip(every, run_looks(every), strict=True)]
    drawn = [(group, look, curve) for group, look, curve in drawn if curve.rows]
    for group, look, curve in drawn:
        _draw_group((over_rounds, over_bytes), group, look, curve)
    if not drawn:
        over_rounds.text(0.5, 0.5, "no round was evaluated", transform=over_rounds.transAxes, ha="center", color=MUTED)
    over_rounds.set(xlabel="round", ylabel=f"test {metric_title(results)} (%)")
    over_rounds.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    over_bytes.set(xlabel="uploaded by all clients so far (MB)")
    uploads = [curve.bytes_up[-1] for *_, curve in drawn]
    if uploads and max(uploads) > 8 * min(uploads) > 0:
        _make_logarithmic(over_bytes)
    bands = "; bands: range over seeds" if any(len(group.runs) > 1 for group in every) else ""
    title = f"Test {metric_title(results)} on {shorten(dataset_titles(results), 60)}{bands}"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    handles, labels = over_rounds.get_legend_handles_labels()
    if any(curve.stage_begins for *_, curve in drawn):
        handles.append(over_rounds.plot([], [], color=INK, linestyle="", marker="|", markersize=9)[0])
        labels.append("a stage begins")
    if handles:
        short = [shorten(label, 36) for label in labels]
        figure.legend(handles, short, loc="outside lower left", ncols=3 if len(short) > 4 else 4, handlelength=3.4)
    return figure


def _draw_group(panels: tuple[Axes, Axes], group: RunGroup, look: Look, curve: Curve) -> None:
    """A group's line over rounds, and over uploaded bytes."""
    several = len(group.runs) > 1
    style: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "linewidth": 1.8}
    marker: dict[str, Any] = {"marker": look.marker, "markersize": 5.5, "markevery": max(1, len(curve.rounds) // 6)}
    places: tuple[Sequence[float], Sequence[float]] = (curve.rounds, [sent / 1e6 for sent in curve.bytes_up])
    for axes, across in zip(panels, places, strict=True):
        axes.plot(across, _percents(curve.mean), label=group.label, **style, **marker)
        if several:
            low, high = _percents(curve.low), _percents(curve.high)
            axes.fill_between(across, low, high, color=look.colour, alpha=0.16, linewidth=0)
        begins = (
            [across[place] for place in curve.stage_begins],
            [100 * curve.mean[place] for place in curve.stage_begins],
        )
        axes.plot(*begins, color=INK, linestyle="", marker="|", markersize=9, markeredgewidth=0.9)


def _percents(fractions: Sequence[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]


def _make_logarithmic(axes: Axes) -> None:
    """For runs that upload very different amounts."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{axes.get_xlabel()}, logarithmic")


@styled
def plans_figure(labelled: Sequence[tuple[str, Plan]]) -> Figure:
    """Head scale and frozen units over the rounds, a line a tier of each plan."""
    figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
    heads, frozen = figure.subplots(1, 2)
    tiers = [(name, plan, tier) for name, plan in labelled for tier in plan.feasible_tiers]
    for number, (name, plan, tier) in enumerate(tiers):
        edges = [100 * edge for edge in accumulate((stage.rounds_fraction for stage in plan.stages), initial=0.0)]
        look = LOOKS[number % len(LOOKS)]
        style: dict[str, Any] = {
            "color": look.colour,
            "linestyle": look.line,
            "linewidth": 1.8,
            "drawstyle": "steps-post",
        }
        widths = [100 * stage.head_scale for stage in tier.stages]
        depths = [100 * stage.freeze_depth / plan.model.depth for stage in tier.stages]
        label = f"{shorten(name, 30)}, {shorten(tier.name, 16)}"
        heads.plot(edges, [*widths, widths[-1]], label=label, **style)
        frozen.plot(edges, [*depths, depths[-1]], **style)
    heads.set(xlabel="share of the rounds (%)", ylabel="head scale (%)", xlim=(0, 100), ylim=(0, 103))
    frozen.set(xlabel="share of the rounds (%)", ylabel="units frozen (%)", xlim=(0, 100), ylim=(-1, 103))
    title = f"{count(len(labelled), 'plan')} compared"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    figure.legend(loc="outside lower left", ncols=2, handlelength=2.6)
    return figure
