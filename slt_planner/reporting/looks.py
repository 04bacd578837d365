"""Colours, dashes and markers, the same in pictures and on pages; runs are told apart without colour, too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from slt_planner.federated.result import StrategyName
from slt_planner.memory.profile import Category
from slt_planner.planning.plan import TierStage
from slt_planner.reporting.run_groups import RunGroup

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
# In a picture over time what hardly changes lies at the bottom.
STACK: tuple[Category, ...] = (
    "weights",
    "buffers",
    "optimizer",
    "gradients",
    "batch",
    "activations",
    "temporaries",
    "workspace",
)


@dataclass(frozen=True)
class Look:
    """How a line looks: in matplotlib's words and in plotly's."""

    colour: str
    line: str | tuple[float, tuple[float, ...]]
    dash: str
    marker: str
    symbol: str

    @property
    def band(self) -> str:
        """The colour of an area around the line, through which others are seen."""
        red, green, blue = (int(self.colour[place : place + 2], 16) for place in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.16)"


LOOKS = (
    Look("#0072b2", "-", "solid", "o", "circle"),
    Look("#d55e00", (0, (6, 2)), "dash", "s", "square"),
    Look("#7d8590", (0, (1, 1.4)), "dot", "D", "diamond"),
    Look("#009e73", (0, (6, 2, 1, 2)), "dashdot", "^", "triangle-up"),
    Look("#cc79a7", (0, (10, 3)), "longdash", "v", "triangle-down"),
    Look("#e69f00", (0, (10, 2, 1, 2)), "longdashdot", "X", "x"),
    Look("#56b4e9", (0, (3, 1.5)), "5px,3px", "P", "cross"),
    Look("#8f6bd1", (0, (4, 1.5, 1, 1.5, 1, 1.5)), "8px,3px,2px,3px,2px,3px", "*", "star"),
)
"""Colours after Okabe and Ito (2008), distinguishable with any colour vision, readable on light and on dark paper."""

_STRATEGIES = get_args(StrategyName)


def run_looks(groups: Sequence[RunGroup]) -> list[Look]:
    """A look a group: its strategy's own, the same in every report; the next free one where that is taken."""
    taken: list[int] = []
    for group in groups:
        strategy = group.runs[0].settings.strategy
        first = _STRATEGIES.index(strategy) if strategy in _STRATEGIES else 0
        places = [(first + step) % len(LOOKS) for step in range(len(LOOKS))]
        taken.append(min(places, key=lambda place: (taken.count(place), places.index(place))))
    return [LOOKS[place] for place in taken]


def stage_parts(stage: TierStage, depth: int) -> list[tuple[str, int, int]]:
    """The parts that a stage's network has, each with the number of units above it and its last unit."""
    edges = (0, stage.freeze_depth, stage.full_depth, depth)
    parts = zip(PART_COLOURS, edges[:-1], edges[1:], strict=True)
    return [(part, top, bottom) for part, top, bottom in parts if bottom > top]


def tint(colour: str, strength: float) -> str:
    """A colour mixed with white: the same on a light and on a dark page."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02x}" for part in parts)
