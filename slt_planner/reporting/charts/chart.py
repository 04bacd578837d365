"""What all charts share: their form, their theme, and how words of others get into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from slt_planner.reporting.words import shorten

INK, MUTED, GRID, PAPER = "var(--ink)", "var(--muted)", "var(--grid)", "var(--paper)"
"""Colours that the page's script looks up in its style, so that charts follow its theme."""

Trace = dict[str, Any]
Layout = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A figure of plotly and what it shows in words; `height` in pixels of the page.

    A trace with the `meta` "wide" is left out where the page is narrow.
    """

    name: str
    caption: str
    height: int
    traces: tuple[Trace, ...]
    layout: Layout

    @property
    def figure(self) -> dict[str, Any]:
        """What plotly.js draws."""
        return {"data": self.traces, "layout": _BASE | {"height": self.height} | self.layout}


_BASE: Layout = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "var(--sans)", "size": 12.5, "color": INK},
    "margin": {"l": 50, "r": 14, "t": 16, "b": 44},
    "hoverlabel": {"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK, "size": 13}, "align": "left"},
    "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    "hovermode": "closest",
}


def label(text: str, limit: int = 24) -> str:
    """Somebody's words, fit for a chart: short, and no markup.

    >>> label("<b>64MB</b>")
    '&lt;b&gt;64MB&lt;/b&gt;'
    """
    return escape(shorten(text, limit), quote=False)


def axis(title: str = "", **own: Any) -> Layout:
    """An axis in the page's colours."""
    base = {
        "title": {"text": title, "standoff": 8, "font": {"color": MUTED, "size": 12.5}},
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "tickfont": {"color": MUTED},
        "automargin": True,
    }
    return base | own


def note(text: str, **place: Any) -> Layout:
    """Words in a chart, without an arrow."""
    return {"text": text, "showarrow": False} | place


def bars(name: str, colour: str | Sequence[str], **own: Any) -> Trace:
    """Bars that tell their `hovertext`."""
    marker = {"color": colour, "line": {"color": PAPER, "width": 0.5}}
    return {"type": "bar", "name": name, "marker": marker, "hoverinfo": "text", **own}


def line(name: str, x: Sequence[Any], y: Sequence[Any], style: Mapping[str, Any], **own: Any) -> Trace:
    """A line that tells its `hovertext`."""
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, "hoverinfo": "text", **own}
