"""A run whose clients are Flower's simulated nodes, in processes of Ray on this machine; nothing is left running."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from slt_planner.errors import SltError
from slt_planner.federated.engines.flower.client import Site, client_app, site_of
from slt_planner.federated.engines.flower.engine import FlowerEngine
from slt_planner.federated.engines.flower.messages import Brief
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.experiment import continue_run
from slt_planner.federated.result import RoundRow, RunResult
from slt_planner.federated.setup import Run

_AS_LONG_AS_IT_TAKES = 1e6  # seconds


def simulate(
    run: Run,
    folder: Path,
    progress: Callable[[RoundRow], None] = lambda row: None,
    options: FlowerOptions | None = None,
    model: str | None = None,
) -> RunResult:
    """As `continue_run`, on Flower: a process a processor of this machine, each of which trains one client at a time.

    Ctrl-C ends the run early, as anywhere: processes end, and what is done is kept.

    Args:
        run: the run, prepared, with its folder begun.
        folder: its folder.
        progress: called after each round.
        options: deadlines; nodes are waited for as long as it takes.
        model: the network's name, where it is the user's own code.

    Raises:
        InputError: as `continue_run`.
        SltError: a process was lost, for want of memory perhaps.
    """
    engine_options = (options or FlowerOptions()).model_copy(update={"wait_s": _AS_LONG_AS_IT_TAKES})
    stopping, results = threading.Event(), list[RunResult]()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(continue_run(run, folder, progress, FlowerEngine(grid, engine_options, stopping)))

    def find_site(brief: Brief, config: Mapping[str, object]) -> Site:
        return site_of(brief, {**config, "model": model or ""})

    threads = run.plan.step.threads or 1
    with _interrupt_sets(stopping), _only_warnings():
        run_simulation(
            server,
            client_app(find_site),
            run.settings.clients,
            backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0}},
        )
    if not results:
        raise SltError("Flower's simulation ended before the run did; go on with it")
    return results[0]


@contextmanager
def _interrupt_sets(stopping: threading.Event) -> Iterator[None]:
    """Ctrl-C ends the run in its own thread, which then ends the simulation: an exception here would wait for ever."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, before)  # whoever asks twice does not want to wait

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _only_warnings() -> Iterator[None]:
    """Flower's own log, without what it tells of every step and of the way it is called here."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
