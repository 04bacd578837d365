"""Plans and runs as one self-contained HTML page each, with a PNG, and the tables of comparisons, beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.files import refuse_existing, write_bytes, write_text
from slt_planner.planning.plan import Plan
from slt_planner.reporting import figures
from slt_planner.reporting.comparison import FORMATS, plan_comparison, plan_labels, run_comparison, table_texts
from slt_planner.reporting.pages.plan import plan_page
from slt_planner.reporting.pages.plans import plans_page
from slt_planner.reporting.pages.run import run_page
from slt_planner.reporting.run_groups import run_groups

_SUFFIXES = (".html", ".htm")


def report_paths(html_path: str | Path, picture: str | Path | None = None) -> tuple[Path, Path]:
    """The page and the PNG of a report: the PNG is beside the page unless `picture` names another place.

    Raises:
        InputError: the name does not end in .html.
    """
    path = Path(html_path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"report {path}: its name must end in .html, for example {path.stem or 'report'}.html")
    return path, path.with_suffix(".png") if picture is None else Path(picture)


def table_paths(html_path: str | Path) -> tuple[Path, ...]:
    """The tables that a comparison leaves beside its page."""
    return tuple(Path(html_path).with_suffix(f".{suffix}") for suffix in FORMATS)


def plan_report(
    plan: Plan,
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write a plan as a page and a PNG; `command` is the command line to make it again, `picture` the PNG's own name.

    Raises:
        InputError: a name that does not end in .html, a file that exists without `force`, or one that cannot be
            written.
    """
    targets = _checked(report_paths(path, picture), force)
    _write(targets, plan_page(plan, command), figures.plan_figure(plan), {}, force)


def plans_report(
    plans: Sequence[Plan],
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write a page that compares plans, a PNG, and their table as CSV, Markdown and LaTeX; as `plan_report`.

    Raises:
        InputError: as `plan_report`.
    """
    targets = _checked((*report_paths(path, picture), *table_paths(path)), force)
    labelled = list(zip(plan_labels(plans), plans, strict=True))
    texts = table_texts(plan_comparison(labelled))
    _write(targets, plans_page(labelled, texts, command), figures.plans_figure(labelled), texts, force)


def run_report(
    results: Sequence[RunResult],
    path: str | Path,
    force: bool = False,
    command: str | None = None,
    picture: str | Path | None = None,
) -> None:
    """Write a page that compares runs, a PNG of their accuracy, and their table as CSV, Markdown and LaTeX.

    Raises:
        InputError: no run, a name that does not end in .html, a file that exists without `force`, or one that cannot
            be written.
    """
    if not results:
        raise InputError("no run to report; give at least one run folder")
    targets = _checked((*report_paths(path, picture), *table_paths(path)), force)
    texts = table_texts(run_comparison(run_groups(results)))
    _write(targets, run_page(results, texts, command), figures.accuracy_figure(results), texts, force)


def _checked(targets: tuple[Path, ...], force: bool) -> tuple[Path, ...]:
    if not force:
        refuse_existing(targets)
    return targets


def _write(targets: tuple[Path, ...], page: str, drawing: Figure, tables: Mapping[str, str], force: bool) -> None:
    """The page comes last: where it is, everything is."""
    html, picture, *beside = targets
    write_bytes(picture, figures.png_bytes(drawing), force=force)
    for path, text in zip(beside, tables.values(), strict=True):
        write_text(path, text, force=force)
    write_text(html, page, force=force)
