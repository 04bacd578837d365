"""The three scripts: `slt` with its subcommands, `slt-plan` and `slt-train`."""

import typer

from slt_planner.cli.common import run
from slt_planner.cli.flower import flower
from slt_planner.cli.plan import plan
from slt_planner.cli.profile import profile
from slt_planner.cli.report import report
from slt_planner.cli.train import train
from slt_planner.cli.verify import verify

_HELP = "Plan and run successive layer training under memory budgets."


def _app(*commands: object) -> typer.Typer:
    app = typer.Typer(help=_HELP, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    for command in commands:
        app.command()(command)  # type: ignore[type-var]
    return app


def slt() -> None:
    """Entry of `slt`."""
    app = _app(profile, plan, verify, train, report)
    app.add_typer(flower, name="flower")
    run(app, "slt")


def slt_plan() -> None:
    """Entry of `slt-plan`."""
    run(_app(plan), "slt-plan")


def slt_train() -> None:
    """Entry of `slt-train`."""
    run(_app(train), "slt-train")
