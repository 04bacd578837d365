"""A memory profile over time as a picture."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from slt_planner.memory.profile import Category, MemoryProfile, TimelinePoint
from slt_planner.reporting.figures import INK, MUTED, PAPER, WIDTH_IN, styled
from slt_planner.reporting.looks import CATEGORY_COLOURS, PART_COLOURS, STACK
from slt_planner.reporting.profile_view import fine_bytes, in_pieces, peak_place, profile_ruler, profile_title


@styled
def timeline_figure(profile: MemoryProfile) -> Figure:
    """Live bytes through the step by category, above which unit the step is in; the profile must have a timeline."""
    figure = Figure(figsize=(WIDTH_IN, 6.4), layout="constrained")
    title = f"{profile_title(profile)}: live memory through one training step\n"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    figure.text(0.012, 1 - 0.52 / figure.get_figheight(), profile_ruler(profile), color=MUTED, fontsize=10)
    memory, units = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    times, label = _times(profile)
    _draw_live(memory, profile, times)
    _draw_units(units, profile, times)
    for axes in (memory, units):
        _draw_phases(axes, profile, times, named=axes is units)
    memory.set_xlim(0, times[-1])
    units.set_xlabel(label)
    _legends(figure, memory, profile)
    return figure


def _times(profile: MemoryProfile) -> tuple[list[float], str]:
    """When the step begins and each change of live bytes happens, and what that is counted in."""
    measured = [point.time_us for point in profile.timeline if point.time_us is not None]
    if len(measured) == len(profile.timeline):
        return [0.0, *(time / 1000 for time in measured)], "ms since the step began, slowed down by recording it"
    return [float(number) for number in range(len(profile.timeline) + 1)], "allocations and releases, in order"


def _live(profile: MemoryProfile) -> dict[Category, np.ndarray]:
    """Live bytes of each category that there is, at the step's begin and after each change."""
    resident = profile.resident or {}
    live = {}
    for category in STACK:
        changes = [point.change_bytes if point.category == category else 0 for point in profile.timeline]
        live[category] = np.cumsum([resident.get(category, 0), *changes], dtype=float)
    return {category: sizes for category, sizes in live.items() if sizes.any()}


def _draw_live(axes: Axes, profile: MemoryProfile, times: Sequence[float]) -> None:
    live = _live(profile)
    unit, size = next(((u, n) for u, n in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if profile.peak_bytes >= n), ("B", 1))
    bottom = np.zeros(len(times))
    for category, sizes in live.items():
        top = bottom + sizes / size
        axes.fill_between(times, bottom, top, step="post", color=CATEGORY_COLOURS[category], linewidth=0)
        bottom = top
    axes.plot(times, bottom, drawstyle="steps-post", color=INK, linewidth=0.5)  # what is shorter than a pixel is seen
    worst = int(np.argmax(bottom))
    axes.plot(times[worst], bottom[worst], "o", color=INK, markersize=5)
    left = times[worst] < times[-1] / 2
    axes.annotate(
        f"peak {fine_bytes(profile.peak_bytes)}: {peak_place(profile)}",
        (times[worst], bottom[worst]),
        (0, 8),
        textcoords="offset points",
        ha="left" if left else "right",
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )
    axes.set(ylim=(0, 1.12 * max(bottom)), ylabel=unit)
    axes.spines["left"].set_visible(False)


def _units_in_turn(profile: MemoryProfile) -> list[int]:
    """The unit that the step is in at its begin and after each change; between operators it is still in the last."""
    units = [0]
    for point in profile.timeline:
        units.append(point.unit if point.operator else units[-1])
    return units


def _part(profile: MemoryProfile, unit: int) -> str:
    """How a unit is trained: the name of its colour."""
    config = profile.config
    if config is None or unit > config.freeze_depth:
        scaled = config is not None and config.head_scale < 1 and unit > config.full_depth
        return "head" if scaled else "trained"
    return "frozen"


def _draw_units(axes: Axes, profile: MemoryProfile, times: Sequence[float]) -> None:
    units = _units_in_turn(profile)
    deepest = max([row.index for row in profile.units] + units)
    starts = [0, *(i for i in range(1, len(units)) if units[i] != units[i - 1])]
    ends = [times[i] for i in starts[1:]] + [times[-1]]
    for start, end in zip(starts, ends, strict=True):
        if units[start]:
            colour = PART_COLOURS[_part(profile, units[start])]
            axes.hlines(units[start], times[start], end, colors=colour, linewidth=min(6.0, max(2.2, 90 / deepest)))
    axes.set(ylim=(0.2, max(1, deepest) + 0.5 + deepest / 30), ylabel="unit")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=2))
    axes.spines["left"].set_visible(False)


def _phases(timeline: Sequence[TimelinePoint]) -> list[int]:
    """The numbers of the changes with which the backward pass and the optimizer begin, told by operators' names.

    None of both where no operator is called backward. The optimizer's begin is that of its first allocation.
    """
    backward = [number for number, point in enumerate(timeline) if "backward" in point.operator]
    if not backward:
        return []
    gradients = [n for n, point in enumerate(timeline) if point.category == "gradients" and point.change_bytes > 0]
    last = max(backward[-1:] + gradients[-1:])
    after = (n for n in range(last, len(timeline)) if timeline[n].operator not in ("", timeline[last].operator))
    return [backward[0], *[n for n in after if timeline[n].change_bytes > 0][:1]]


def _draw_phases(axes: Axes, profile: MemoryProfile, times: Sequence[float], named: bool) -> None:
    begins = [times[number + 1] for number in _phases(profile.timeline)]
    names = ["forward", "backward", "optimizer"]
    if in_pieces(profile):
        begins, names = begins[1:], ["forward and backward, one micro-batch after another", "optimizer"]
    for begin in begins:
        axes.axvline(begin, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    if not named or not begins:
        return
    spans = pairwise([0.0, *begins, times[-1]])
    for name, (begin, end) in zip(names, spans, strict=False):
        wide = end - begin > 0.08 * times[-1]
        x, side = ((begin + end) / 2, "center") if wide else (end, "right")
        axes.text(x, 1.03, name, ha=side, va="bottom", color=MUTED, transform=axes.get_xaxis_transform())


def _legends(figure: Figure, memory: Axes, profile: MemoryProfile) -> None:
    """The categories above them, the parts of the network below."""
    handles = [Patch(facecolor=CATEGORY_COLOURS[category], label=category) for category in _live(profile)]
    memory.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=8, handlelength=1.2, columnspacing=1.3
    )
    names = {"frozen": "frozen", "trained": "trained at full width", "head": "head, trained at its scale"}
    used = {_part(profile, unit) for unit in _units_in_turn(profile) if unit}
    lines = [Line2D([], [], color=PART_COLOURS[p], linewidth=4, label=name) for p, name in names.items() if p in used]
    figure.legend(handles=lines, loc="outside lower left", ncols=3, handlelength=1.2)
