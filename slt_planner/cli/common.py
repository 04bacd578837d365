"""What all commands share: consoles, and errors told in one line with the right exit code."""

import gc
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console

from slt_planner.config import Granularity, Record
from slt_planner.errors import InputError, SltError

if TYPE_CHECKING:
    from slt_planner.graph.trace import ModelGraph

# Some versions of typer bring their own copy of click, others use the installed one; this is UsageError in both.
_UsageError: Any = typer.BadParameter.__bases__[0]

_RecordT = TypeVar("_RecordT", bound=Record)
_ChoiceT = TypeVar("_ChoiceT", bound=str)


def consoles(json_output: bool) -> tuple[Console, Console]:
    """Where results and where progress go: with --json, stdout is kept for the JSON."""
    errors = Console(stderr=True, emoji=False)  # a class called Cat makes a name with :Cat in it
    return (errors if json_output else Console(emoji=False), errors)


def run(app: typer.Typer, name: str) -> None:
    """Run a command line; an error of the user's becomes one line on stderr and its exit code."""
    gc.set_threshold(50_000)  # torch's import makes many objects and no garbage
    sys.exit(_exit_code(typer.main.get_command(app), name))


def _exit_code(command: Any, name: str) -> int:
    try:
        return command.main(prog_name=name, standalone_mode=False) or 0
    except _UsageError as error:
        return _say(name, error.format_message(), InputError.exit_code)
    except SltError as error:
        return _say(name, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say(name, "interrupted", 1)


def _say(name: str, message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"{name}: error: {line}", file=sys.stderr)
    return code


def traced_network(
    model: str, input_shape: tuple[int, ...] | None, num_classes: int | None, granularity: Granularity = "layer"
) -> "ModelGraph":
    """A network's structure by its name; without a shape, at its own.

    Raises:
        InputError: no such network, or a user's own without an input shape.
    """
    # torch is imported only once the command line is known to be right
    from slt_planner.graph.trace import trace
    from slt_planner.models.names import is_reference
    from slt_planner.models.registry import find_model, load_model

    if input_shape is None:
        if is_reference(model):
            raise InputError(f"{model}: --input-shape is needed, that of one sample, such as 3,64,64")
        input_shape = find_model(model).input_shape
    network = load_model(model, num_classes, input_shape, weights=False)
    return trace(network, input_shape, granularity=granularity)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Positive whole numbers of a comma-separated list.

    Raises:
        InputError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {text!r}: give positive whole numbers with commas, such as 3,64,64")
    return tuple(int(part) for part in parts)


def chosen(value: str, option: str, known: tuple[_ChoiceT, ...]) -> _ChoiceT:
    """One of the known values of an option.

    Raises:
        InputError: something else.
    """
    for one in known:
        if one == value:
            return one
    raise InputError(f"{option} {value!r}: known are {', '.join(known)}")


def validated(record: type[_RecordT], **values: Any) -> _RecordT:
    """A record made of options.

    Raises:
        InputError: an option has a value that the record refuses; the message names the option.
    """
    try:
        return record(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # options that contradict each other
            raise InputError(message) from error
        field = [str(part) for part in first["loc"] if part != "name"][-1]  # the optimizer's name is --optimizer
        raise InputError(f"--{field.replace('_', '-')} {first['input']}: {message}") from error


def command_line() -> str:
    """The command as it was given, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
