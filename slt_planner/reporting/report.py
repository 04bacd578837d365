"""One door to the reports: whatever there is to show becomes a page and a picture."""

from collections.abc import Sequence
from pathlib import Path

from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.planning.plan import Plan
from slt_planner.reporting.html import plan_report, plans_report, run_report


def report(
    subject: Plan | RunResult | Sequence[Plan] | Sequence[RunResult],
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write an HTML page that needs no network, and a PNG of the same name beside it.

    Args:
        subject: a plan, a run, or several plans or several runs to compare. A comparison's table is also written as
            CSV, Markdown and LaTeX, of the same name beside the page.
        path: of the page, ending in ``.html``.
        force: overwrite existing files.
        picture: the PNG's own place, if it is to have another name.
        command: the command line that makes it again, to be shown on the page.

    Raises:
        InputError: plans and runs together, or a file that exists while `force` is False, or cannot be written.
    """
    subjects = [subject] if isinstance(subject, Plan | RunResult) else list(subject)
    plans = [one for one in subjects if isinstance(one, Plan)]
    runs = [one for one in subjects if isinstance(one, RunResult)]
    if plans and runs:
        raise InputError("plans and runs do not go into one report; give plans alone, or runs alone")
    if len(plans) == 1:
        plan_report(plans[0], path, force, command, picture)
    elif plans:
        plans_report(plans, path, force, command, picture)
    else:
        run_report(runs, path, force, command, picture)
