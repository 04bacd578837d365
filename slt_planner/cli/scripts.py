"""What the installed commands call: a command, and then a quick end."""

import atexit
import os
import sys
from collections.abc import Callable

from slt_planner.cli import main


def slt() -> None:
    """The command `slt`."""
    _end_after(main.slt)


def slt_plan() -> None:
    """The command `slt-plan`."""
    _end_after(main.slt_plan)


def slt_train() -> None:
    """The command `slt-train`."""
    _end_after(main.slt_train)


def _end_after(command: Callable[[], None]) -> None:
    """Everything that wants to be told of the end is; torch's modules are not taken apart, which takes a second."""
    try:
        command()
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
