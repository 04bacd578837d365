"""`slt report`: make the page of a plan or of runs again, later."""

from pathlib import Path
from typing import Annotated

import typer

from slt_planner.cli.common import command_line
from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult
from slt_planner.federated.run_folder import SETTINGS, load_run
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.reporting.html import report_paths
from slt_planner.reporting.report import report as write_report


def report(
    subjects: Annotated[list[Path], typer.Argument(help="A plan.json, or one or several run folders to compare.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the HTML page (and its PNG) is written.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write the report of a plan, or of runs compared."""
    write_report(_load(subjects), out, force=force, command=command_line())
    typer.echo(f"Written: {', '.join(str(path) for path in report_paths(out))}")


def _load(subjects: list[Path]) -> Plan | list[RunResult]:
    if len(subjects) == 1 and subjects[0].is_file():
        return load_plan(subjects[0])
    runs: list[RunResult] = []
    for folder in subjects:
        if folder.is_file():
            raise InputError(f"{folder} is not a run folder; give one plan, or run folders alone")
        inside = sorted(path.parent for path in folder.glob(f"*/{SETTINGS}"))
        runs += [load_run(path) for path in ([folder] if (folder / SETTINGS).exists() or not inside else inside)]
    return runs
