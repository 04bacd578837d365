"""Pictures of plans and runs. Every function makes its own Figure; no state is shared and nothing is displayed."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any, ParamSpec

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from slt_planner.federated.result import RunResult
from slt_planner.memory.profile import CATEGORIES, Category
from slt_planner.planning.plan import Plan, TierPlan, TierStage
from slt_planner.reporting.run_groups import RunGroup, dataset_titles, metric_title, run_groups
from slt_planner.reporting.words import count, how_known, megabytes, model_title, ruler, shorten
from slt_planner.units import format_bytes

INK, MUTED, GRID, PAPER = "#1b2430", "#5c6773", "#dfe4ea", "#ffffff"
PART_COLOURS = {"frozen": "#c5ced8", "trained": "#4b5fc4", "head": "#f2c14e"}
CATEGORY_COLOURS: dict[Category, str] = {
    "weights": "#0072b2",
    "buffers": "#8a8f98",
    "gradients": "#d55e00",
    "optimizer": "#e69f00",
    "activations": "#009e73",
    "temporaries": "#56b4e9",
    "workspace": "#cc79a7",
    "batch": "#f0e442",
}
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98")
LINES = ("-", "--", "-.", ":")
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
    "svg.fonttype": "none",
}
_THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
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
    return _saved(figure, "png", "")


def svg_text(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element to put in a page: no size of its own, and ids that begin with `name`.

    Ink, paper and grid are the page's CSS variables, so that a figure follows a dark theme; its text uses ``--sans``.
    The same figure and name give the same text.
    """
    drawn = _saved(figure, "svg", name).decode("utf-8")
    svg = drawn[drawn.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"<svg\1\2", svg, count=1)
    svg = re.sub(r'(\sid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _THEMED.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\g<1>: {variable}", svg)
    return re.sub(r"(font: [^\"']*?)'DejaVu Sans'", r"\g<1>var(--sans)", svg)


def _saved(figure: Figure, file_format: str, salt: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}
    with style.context(["default", {**_STYLE, "svg.hashsalt": f"slt_planner {salt}"}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji in a name
        figure.savefig(buffer, format=file_format, metadata=metadata, transparent=file_format == "svg")
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


@styled
def schedule_figure(plan: Plan) -> Figure:
    """Which units each tier freezes, trains at full width and scales, over the rounds."""
    figure = Figure(figsize=(WIDTH_IN, 0.75 + 1.75 * len(plan.feasible_tiers)), layout="constrained")
    _draw_schedules(figure, plan)
    return figure


@styled
def memory_figure(tier: TierPlan, how: str) -> Figure:
    """A feasible tier's peak in each stage, by category, against its budget; `how` it is known: measured, predicted."""
    figure = Figure(figsize=(WIDTH_IN, 3.4), layout="constrained")
    _draw_memory(figure.subplots(), tier, how, wide=True)
    _category_legend(figure, [tier])
    return figure


def _draw_schedules(figure: FigureBase, plan: Plan) -> None:
    tiers = plan.feasible_tiers
    panels = figure.subplots(len(tiers), 1, sharex=True, squeeze=False)
    for axes, tier in zip(panels.flat, tiers, strict=True):
        _draw_schedule(axes, plan, tier)
    panels[-1, 0].set_xlabel("share of the rounds (%)")
    names = {"frozen": "frozen", "trained": "trained at full width", "head": "head, trained at the width written in it"}
    used = {part for tier in tiers for stage in tier.stages for part, *_ in _parts(stage, plan.model.depth)}
    handles = [Patch(facecolor=PART_COLOURS[part], label=name) for part, name in names.items() if part in used]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2)


def _parts(stage: TierStage, depth: int) -> list[tuple[str, int, int]]:
    """The parts that a stage's network has, each with the units above it and its last unit."""
    edges = (0, stage.freeze_depth, stage.full_depth, depth)
    parts = zip(PART_COLOURS, edges[:-1], edges[1:], strict=True)
    return [(part, top, bottom) for part, top, bottom in parts if bottom > top]


def _draw_schedule(axes: Axes, plan: Plan, tier: TierPlan) -> None:
    depth = plan.model.depth
    lefts = [100 * left for left in accumulate((stage.rounds_fraction for stage in plan.stages), initial=0.0)]
    small: dict[str, Any] = {"va": "bottom", "fontsize": 8.5, "color": MUTED}
    for number, stage in enumerate(tier.stages):
        left, width = lefts[number], 100 * plan.stages[number].rounds_fraction
        for part, top, bottom in _parts(stage, depth):
            colour = _tint(PART_COLOURS[part], 0.3 + 0.7 * stage.head_scale) if part == "head" else PART_COLOURS[part]
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


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    """A colour mixed with white: the same on a light and on a dark page."""
    return tuple(1 - strength * (1 - part) for part in to_rgb(colour))


def _write_head_scale(axes: Axes, x: float, width: float, units: tuple[int, int], scale: float) -> None:
    """The width of a head inside its area, upright or turned, if there is room for either."""
    across, down = 6.9 * width, 88 * (units[1] - units[0]) / units[1]  # points, in a panel of about 690 by 88
    text = f"{100 * scale:.2g}%" if scale < 0.995 else "100%"
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
    unit, size = bytes_unit(top)
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


def bytes_unit(largest: float) -> tuple[str, float]:
    """The unit for amounts up to the largest, and its bytes.

    >>> bytes_unit(54_273_664), bytes_unit(1_200_000_000)
    (('MB', 1000000.0), ('MB', 1000000.0))
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((unit, size) for unit, size in units if largest >= 1.5 * size), ("B", 1.0))


def _category_legend(figure: FigureBase, tiers: Sequence[TierPlan]) -> None:
    used = {
        category for tier in tiers for stage in tier.stages for category, size in stage.breakdown.items() if size > 0
    }
    handles = [Patch(facecolor=CATEGORY_COLOURS[name], label=name) for name in CATEGORIES if name in used]
    figure.legend(handles=handles, loc="outside upper left", ncols=8, handlelength=1.2, columnspacing=1.3)


@styled
def accuracy_figure(results: Sequence[RunResult], titled: bool = True) -> Figure:
    """Test accuracy over rounds and over uploaded bytes; runs that differ in their seed alone are a mean and a range.

    Thin vertical lines mark where a schedule goes to its next stage. Without its title it is for a page that says which
    data it is.
    """
    figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
    over_rounds, over_bytes = figure.subplots(1, 2, sharey=True)
    groups = [(number, group) for number, group in enumerate(run_groups(results)) if group.runs[0].rows]
    for number, group in groups:
        _draw_group(over_rounds, over_bytes, group, number)
    if not any(result.rows for result in results):
        over_rounds.text(0.5, 0.5, "no round was finished", transform=over_rounds.transAxes, ha="center", color=MUTED)
    over_rounds.set(xlabel="round", ylabel=f"test {metric_title(results)} (%)")
    over_rounds.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    over_bytes.set(xlabel="uploaded by all clients so far (MB)")
    uploads = [group.runs[0].bytes_up for _, group in groups]
    if uploads and max(uploads) > 8 * min(uploads) > 0:
        _make_logarithmic(over_bytes)
    if titled:
        title = f"Test {metric_title(results)} on {shorten(dataset_titles(results), 70)}"
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    handles, labels = over_rounds.get_legend_handles_labels()
    if any(_stage_changes(result) for result in results):
        handles.append(over_rounds.plot([], [], color=MUTED, linewidth=0.7, alpha=0.7)[0])
        labels.append("next stage begins")
    if handles:
        short = [shorten(label, 30) for label in labels]
        figure.legend(handles, short, loc="outside lower left", ncols=4, handlelength=2.4)
    return figure


def _draw_group(over_rounds: Axes, over_bytes: Axes, group: RunGroup, number: int) -> None:
    colour, dashes = RUN_COLOURS[number % len(RUN_COLOURS)], LINES[number % len(LINES)]
    rounds = [row.round for row in group.runs[0].rows]
    judged = [index for index, row in enumerate(group.runs[0].rows) if row.accuracy is not None]
    by_round = [[100 * (run.rows[index].accuracy or 0) for run in group.runs] for index in judged]
    middle = [sum(values) / len(values) for values in by_round]
    uploads = [list(accumulate(row.bytes_up / 1e6 for row in run.rows)) for run in group.runs]
    sent = [sum(values) / len(values) for values in zip(*uploads, strict=True)]
    several = len(group.runs) > 1
    for axes, across in ((over_rounds, rounds), (over_bytes, sent)):
        label = f"{group.label}: mean and range" if several else group.label
        marker = "o" if len(judged) == 1 else ""
        points = [across[index] for index in judged]
        axes.plot(points, middle, color=colour, linestyle=dashes, linewidth=1.8, label=label, marker=marker)
        if several:
            lows, highs = [min(values) for values in by_round], [max(values) for values in by_round]
            axes.fill_between(points, lows, highs, color=colour, alpha=0.18, linewidth=0)
        drawn = {line.get_label() for line in axes.get_lines()}
        for change in _stage_changes(group.runs[0]):
            if (name := f"_stage at {across[change]:.6g}") not in drawn:  # not twice where plans are alike
                axes.axvline(across[change], color=colour, linewidth=0.7, alpha=0.35, zorder=0.5, label=name)


def _make_logarithmic(axes: Axes) -> None:
    """For runs that upload very different amounts."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{axes.get_xlabel()}, logarithmic")


def _stage_changes(result: RunResult) -> list[int]:
    """Which rows are the first of a stage other than the first one."""
    stages = [row.stage for row in result.rows]
    return [index for index in range(1, len(stages)) if stages[index] != stages[index - 1]]


@styled
def peak_figure(results: Sequence[RunResult]) -> Figure:
    """A client's highest measured peak in each run and tier, in percent of the tier's budget."""
    bars = [
        (f"{shorten(name, 24)} · {shorten(tier.name, 16)}", tier.measured_peak_bytes, tier.budget_bytes, number)
        for number, group in enumerate(run_groups(results))
        for name, run in group.members
        for tier in run.tiers
        if tier.measured_peak_bytes is not None
    ]
    figure = Figure(figsize=(WIDTH_IN, 0.75 + 0.3 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    for row, (_, peak, budget, number) in enumerate(bars):
        share = 100 * peak / budget
        axes.barh(row, share, 0.66, color=RUN_COLOURS[number % len(RUN_COLOURS)])
        axes.text(
            max(101, share + 1), row, f"{megabytes(peak)} of {format_bytes(budget)}", va="center_baseline", fontsize=9.5
        )
    axes.axvline(100, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], color=INK)
    highest = max((100 * peak / budget for _, peak, budget, _ in bars), default=0)
    axes.set(xlim=(0, max(122, highest * 1.25)), ylim=(max(1, len(bars)) - 0.4, -0.6))
    axes.set_xlabel("measured peak in % of the budget (dashed line: the budget)")
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    axes.spines[:].set_visible(False)
    return figure
