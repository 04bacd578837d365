"""What cheaper levers would do for the whole network, for a terminal of 80 columns."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slt_planner.planning.levers import Alternative, WhatIf
from slt_planner.reporting.words import NOTHING, megabytes, reason_text, shorten, step_ruler


def what_if_table(what_if: WhatIf) -> RenderableType:
    """A line a tier: whether SLT is needed; then a row a lever, and why some cannot be used."""
    plain = what_if.alternatives[0]
    refused = [row for row in what_if.alternatives if row.refused]
    note = (
        "Peak in MB. Time: of a step on this machine, next to the plain step's "
        f"{_duration(plain.step_s or 0)} (they run by turns; median ratio). Fits: from which tier on."
    )
    return Group(
        _answers(what_if),
        Text(""),
        _alternatives(what_if),
        Text(""),
        *[Text(f"{row.words} cannot be used: {shorten(row.refused or '', 200)}", style="yellow") for row in refused],
        Text(note, style="dim"),
        Text(f"Measured: the whole network, {step_ruler(what_if.spec)}.", style="dim"),
    )


def _answers(what_if: WhatIf) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for tier in what_if.tiers:
        style = "yellow" if tier.alternative is None else "green"
        table.add_row(Text(shorten(tier.tier, 14), style="bold"), Text(tier.answer, style=style))
    return table


def _alternatives(what_if: WhatIf) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("the whole network with", overflow="fold", max_width=34)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("changes", overflow="fold")
    for row in what_if.alternatives:
        if not row.refused:
            table.add_row(*_cells(row, what_if))
    return table


def _cells(row: Alternative, what_if: WhatIf) -> list[Text]:
    first = next((tier.tier for tier in what_if.tiers if row.fits(tier.budget_bytes)), None)
    fits = Text(NOTHING) if first is None else Text(shorten(first, 14), style="green")
    changes = ", ".join(reason_text(change) for change in row.changes)
    return [
        Text(row.words),
        Text(megabytes(row.peak_bytes or 0)),
        Text(f"{row.relative_time:.2f}"),
        fits,
        Text(changes),
    ]


def _duration(seconds: float) -> str:
    """Seconds of a step, or milliseconds.

    >>> _duration(0.0524), _duration(3.21)
    ('52 ms', '3.2 s')
    """
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
