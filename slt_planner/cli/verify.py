"""`slt verify`: measure a plan again, where it will run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slt_planner.cli.common import consoles
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.planning.plan import load_plan
from slt_planner.reporting.verify_view import verification_view


def verify(
    plan: Annotated[Path, typer.Argument(help="The plan to check, made by slt-plan, here or elsewhere.")],
    model: Annotated[
        str | None,
        typer.Option(help="Your own network, as given to slt-plan: package.module:factory or ./file.py:Class."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where steps are measured: cpu or cuda [the plan's].")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON on stdout.")] = False,
) -> None:
    """Measure every stage and proof of a plan again; exit code 3 if a stage needs more than its budget here."""
    console, progress_console = consoles(json_output)
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {device}: give cpu or cuda")
    loaded = load_plan(plan)
    # torch is imported only once the command line is known to be right
    from slt_planner.planning.verify import verify as verify_plan

    columns = (TextColumn("measuring training steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console, transient=True, disable=not progress_console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        verification = verify_plan(loaded, model, device, lambda done, of: bar.update(task, completed=done, total=of))
    if json_output:
        print(verification.model_dump_json(indent=2, exclude={"plan"}))
    console.print(verification_view(verification))
    if over := verification.stages_over:
        worst = min(over, key=lambda peak: peak.left_bytes)
        raise InfeasibleError(
            f"{len(over)} of the plan's stages need more than their tier's budget here, the worst stage {worst.stage} "
            f"of {worst.tier} by {-worst.left_bytes:,} bytes; make the plan again on this machine"
        )
