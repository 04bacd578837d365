"""`slt report`: make the page of plans or of runs again, later."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from slt_planner.cli.common import command_line
from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.federated.run_folder import SETTINGS, load_run
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.reporting.html import report_paths, table_paths
from slt_planner.reporting.report import report as write_report


def report(
    subjects: Annotated[
        list[Path],
        typer.Argument(help="One or several plan.json, or one or several run folders (also a folder of run folders)."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the HTML page (and its PNG) is written.")],
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write the report of a plan or a run, or of several compared.

    A comparison's table is also written as CSV, Markdown and LaTeX.
    """
    loaded = _load(subjects)
    write_report(loaded, out, force=force, command=command_line())
    alone = len(loaded) == 1 and isinstance(loaded[0], Plan)
    written = [*report_paths(out), *([] if alone else table_paths(out))]
    typer.echo(f"Written: {', '.join(map(str, written))}")
    if open_it and not webbrowser.open(out.resolve().as_uri()):
        typer.echo(f"No browser was found; open {out} yourself.", err=True)


def _load(subjects: list[Path]) -> list[Plan] | list[RunResult]:
    files = [path for path in subjects if path.is_file()]
    if len(files) == len(subjects):
        return [load_plan(path) for path in files]
    if files:
        raise InputError(f"{files[0]} is not a run folder; give plans alone, or run folders alone")
    return [run for folder in subjects for run in _runs_of(folder)]


def _runs_of(folder: Path) -> list[RunResult]:
    """The run in a folder, or those in its subfolders."""
    inside = sorted(path.parent for path in folder.glob(f"*/{SETTINGS}"))
    return [load_run(path) for path in ([folder] if (folder / SETTINGS).exists() or not inside else inside)]
