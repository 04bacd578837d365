"""`slt flower`: a plan becomes a Flower app, and a federation on this machine runs it."""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console

from slt_planner.cli.common import chosen, command_line, consoles, validated
from slt_planner.cli.live import LiveRounds
from slt_planner.errors import InputError, SltError
from slt_planner.federated.engines.flower.app_folder import connection, write_app
from slt_planner.federated.engines.flower.options import FlowerOptions, need_flower
from slt_planner.federated.result import RunSettings, StrategyName
from slt_planner.federated.run_folder import PICTURE, REPORT, SETTINGS, load_run
from slt_planner.files import read_text, refuse_existing
from slt_planner.planning.plan import load_plan
from slt_planner.reporting.report import report as write_report
from slt_planner.reporting.terminal import run_table

if TYPE_CHECKING:
    from slt_planner.federated.engines.flower.processes import LocalFederation, RunStatus

flower = typer.Typer(
    help="Run a plan on Flower: on devices, or on several processes of this machine.", rich_markup_mode=None
)
_SECOND = 1.0


@flower.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the app is written, one pyproject.toml.")],
    plan: Annotated[Path, typer.Option(help="The plan to run, made by slt-plan.")],
    out: Annotated[Path | None, typer.Option(help="The run folder, on the machine of the SuperLink [DIR/run].")] = None,
    dataset: Annotated[
        str,
        typer.Option(help="As in slt-train; what the server evaluates on, and clients without images of their own."),
    ] = "digits",
    data_root: Annotated[Path | None, typer.Option(help="As in slt-train.")] = None,
    model: Annotated[
        str, typer.Option(help="Your own network, importable on every machine: package.module:name.")
    ] = "",
    strategy: Annotated[str, typer.Option(help="As in slt-train, one of them.")] = "slt",
    rounds: Annotated[int | None, typer.Option(min=1, help="Federated rounds [30, or one a stage].")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients in all, a SuperNode each.")] = 3,
    cohort_size: Annotated[int | None, typer.Option(min=1, help="Clients a round [all].")] = None,
    local_epochs: Annotated[int, typer.Option(min=1, help="Epochs a client trains in a round.")] = 1,
    local_batch: Annotated[int | None, typer.Option(min=2, help="Images in a client's step [the plan's].")] = None,
    learning_rate: Annotated[float, typer.Option(help="In the first round.")] = 0.1,
    partition: Annotated[str, typer.Option(help="How the data set is split, for clients without their own.")] = "iid",
    seed: Annotated[int, typer.Option(help="Of initial weights, split, cohorts and batches.")] = 0,
    enforce: Annotated[bool, typer.Option("--enforce", help="Clients train under their tier's budget.")] = False,
    deadline: Annotated[float, typer.Option(help="Seconds until a client is late.")] = 600.0,
    minimum_answers: Annotated[int, typer.Option(min=1, help="A round with fewer updates uses none of them.")] = 1,
    superlink: Annotated[str, typer.Option(help="Where the SuperLink listens, HOST:PORT.")] = "127.0.0.1:8000",
    root_certificates: Annotated[
        Path | None, typer.Option(help="The certificate (PEM) that vouches for the SuperLink's.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS: anybody on the way can read and change what travels.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing app.")] = False,
) -> None:
    """Write an app for `flwr run`, whose parts are this package's; docs/flower.md has every step."""
    if insecure == (root_certificates is not None):
        raise InputError(
            "give --root-certificates FILE, for TLS, or --insecure, for a SuperLink on this machine alone"
            if not insecure
            else "--insecure does not go with --root-certificates"
        )
    if root_certificates is not None and not root_certificates.is_file():
        raise InputError(f"--root-certificates {root_certificates}: no such file; docs/flower.md says how to make it")
    loaded = load_plan(plan)
    settings = validated(
        RunSettings,
        strategy=chosen(strategy, "--strategy", get_args(StrategyName)),
        dataset=dataset,
        data_root=None if data_root is None else str(data_root),
        rounds=rounds or max(30, len(loaded.stages)),
        clients=clients,
        cohort_size=cohort_size or clients,
        local_epochs=local_epochs,
        local_batch=local_batch or loaded.batch_size,
        learning_rate=learning_rate,
        partition=partition,
        seed=seed,
        enforce=enforce,
    )
    options = validated(FlowerOptions, deadline_s=deadline, minimum_answers=minimum_answers)
    write_app(folder, plan, out or folder / "run", settings, options, model, force)
    print(f"Written: {folder / 'pyproject.toml'}")
    if insecure:
        print(f"Try it with {clients} SuperNodes on this machine: slt flower local {folder}")
    certificate = None if root_certificates is None else root_certificates.absolute()
    print("To run it, let Flower's config.toml (flwr config list shows where) have\n")
    print(connection(superlink, certificate))
    print(f"and then: flwr run {folder} slt --stream")


@flower.command()
def local(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The app, made by slt flower init.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in its folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Run an app on a SuperLink and as many SuperNodes as it has clients, all on this machine, and end them all.

    They talk over loopback without TLS. They end with this command however it ends: at Ctrl-C, at SIGTERM, and on Linux
    at kill -9, too.
    """
    console, progress_console = consoles(json_output)
    config = _app_config(folder)
    out, clients = Path(str(config["out"])), int(config["clients"])
    if not resume:
        refuse_existing([out])
    need_flower()
    from slt_planner.federated.engines.flower.processes import LocalFederation

    with (
        _terminated_in_order(),
        tempfile.TemporaryDirectory() as scratch,
        LocalFederation(Path(scratch), clients) as federation,
    ):
        line = f"a SuperLink on {federation.address} and {clients} SuperNodes are starting"
        progress_console.print(line, soft_wrap=True, markup=False, highlight=False)
        try:
            status = _follow(
                federation, federation.submit(folder, "resume=true" if resume else ""), out, progress_console
            )
            if status.ended != "completed":
                raise SltError(f"the run {status.ended}: {status.details}")
        except SltError as error:
            if isinstance(error, InputError) or not out.exists():
                raise
            raise SltError(f"{error}; go on with slt flower local {folder} --resume") from error
    result = load_run(out)
    write_report([result], out / REPORT, force=True, command=command_line(), picture=out / PICTURE)
    if json_output:
        print(result.model_dump_json(indent=2))
    console.print(run_table([result]))
    console.print(f"Written: {out}/", soft_wrap=True, markup=False, highlight=False)


def _follow(federation: "LocalFederation", run_id: int, out: Path, console: Console) -> "RunStatus":
    """Show the rounds of a run as they come; gives how it ended."""
    while not (out / SETTINGS).exists():
        if (status := federation.status(run_id)).ended is not None:
            return status
        time.sleep(_SECOND)
    result = load_run(out)
    shown = len(result.rows)
    with LiveRounds(result.settings.strategy, result.settings.rounds, result.metric, console) as live:
        while True:
            status = federation.status(run_id)
            rows = load_run(out).rows
            for row in rows[shown:]:
                live.show(row)
            shown = max(shown, len(rows))
            if status.ended is not None:
                return status
            time.sleep(_SECOND)


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """A SIGTERM (of a service manager, or timeout) ends the federation as Ctrl-C does, not this process alone."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _app_config(folder: Path) -> dict[str, Any]:
    """What the app's pyproject.toml says of the run.

    Raises:
        InputError: it is not an app of slt flower init.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    path = folder / "pyproject.toml"
    text = read_text(path, "app", "make one with slt flower init")
    try:
        config: dict[str, Any] = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
        if not isinstance(config["clients"], int) or not isinstance(config["out"], str):
            raise InputError(f"{path}: clients must be a number and out a path")
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an app of slt flower init ({error})") from error
    return config
