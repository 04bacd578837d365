"""One door to the reports: whatever there is to show becomes a page and a picture."""

from collections.abc import Sequence
from pathlib import Path

from slt_planner.federated.result import RunResult
from slt_planner.planning.plan import Plan
from slt_planner.reporting.html import plan_report, run_report


def report(
    subject: Plan | RunResult | Sequence[RunResult],
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write an HTML page that needs no network, and a PNG of the same name beside it.

    Args:
        subject: a plan, a run, or several runs to compare.
        path: of the page, ending in ``.html``.
        force: overwrite existing files.
        picture: the PNG's own place, if it is to have another name.
        command: the command line that makes it again, to be shown on the page.

    Raises:
        InputError: a file exists and `force` is False, or cannot be written.
    """
    if isinstance(subject, Plan):
        plan_report(subject, path, force, command, picture)
    else:
        run_report([subject] if isinstance(subject, RunResult) else subject, path, force, command, picture)
