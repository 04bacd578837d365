"""Learning operators' scratch memory: each new signature is run once alone on this device, and kept on disk."""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import platformdirs
import torch

from slt_planner.config import Config, StepSpec
from slt_planner.environment import processor
from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory import cuda, recording
from slt_planner.memory.operators import Operator
from slt_planner.memory.recording import Event, Mark
from slt_planner.memory.simulate import simulate
from slt_planner.memory.step import device_name, threads

CACHE_VARIABLE = "SLT_CACHE"

_AT_ONCE = 64


@dataclass(frozen=True)
class Calibration:
    """What a calibration did: operators that its steps use, those that were run, and how long it took."""

    operators: int
    learned: int
    seconds: float


def calibrate(
    graph: ModelGraph,
    configs: Sequence[Config],
    spec: StepSpec,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """Learn the scratch memory of the operators of these steps that are not known on this device yet.

    Each is run once, alone, on zeros; that takes no more memory than the operator itself. What is learned is kept
    under the user's cache folder (or the folder that the variable SLT_CACHE names), by processor, torch version and
    number of threads.

    Args:
        graph: the traced network.
        configs: the configurations to predict later.
        spec: the step.
        progress: told how many operators are done, and of how many.

    Raises:
        InputError: a configuration goes beyond the network's units, no such device, or the cache cannot be written.

    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> from slt_planner.memory.predict import predict
    >>> graph, spec = trace(load_model("resnet20"), (3, 32, 32)), StepSpec(batch_size=2)
    >>> calibrate(graph, [Config.full_network()], spec).operators > 50
    True
    >>> predict(graph, Config.full_network(), spec).exact
    True
    """
    cuda.check(spec.device)
    began = time.perf_counter()
    with threads(spec) as number, torch.random.fork_rng(devices=[]):
        machine = _machine(spec, number)
        operators = {
            call.operator.signature: call.operator
            for config in configs
            for call in simulate(graph, config, spec, details=False).calls
            if not call.operator.gives_views_only
        }
        growths = _load(machine)
        new = iter([operator for signature, operator in operators.items() if signature not in growths])
        learned, total = 0, len(operators.keys() - growths.keys())
        while some := list(islice(new, _AT_ONCE)):
            _store(machine, _run_alone(some, spec.device))
            learned += len(some)
            progress(learned, total)
    return Calibration(len(operators), learned, time.perf_counter() - began)


def known_growths(spec: StepSpec, number_of_threads: int) -> Mapping[str, int]:
    """The most that live bytes rise inside each operator that is known on this device, by signature."""
    return _load(_machine(spec, number_of_threads))


def _run_alone(operators: Sequence[Operator], device: str) -> dict[str, int]:
    def work() -> None:
        for number, operator in enumerate(operators):
            call = operator.real_call()
            if device == "cuda":  # what kernels' libraries keep for ever comes with the first call
                call()
            recording.mark(f"begin {number}")
            outputs = call()
            recording.mark(f"end {number}")
            operator.check(outputs)
            del outputs, call

    with torch.no_grad():
        events = recording.record(work, device)
    growths: dict[str, int] = {}
    inside: list[Event] = []
    for event in events:
        if not isinstance(event, Mark):
            inside.append(event)
            continue
        what, number = event.name.split()
        if what == "end":
            growths[operators[int(number)].signature] = recording.peak_growth(inside)
        inside = []
    return growths


def _machine(spec: StepSpec, number_of_threads: int) -> str:
    """Everything but an operator's signature that its scratch memory depends on."""
    kernels = f"{torch.backends.cpu.get_cpu_capability()}, oneDNN {torch.backends.mkldnn.enabled}"
    own = f"{processor()}, {kernels}, " if spec.device == "cpu" else ""
    return f"torch {torch.__version__}, {own}{device_name(spec, number_of_threads)}"


def _path() -> Path:
    folder = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("slt_planner")
    return Path(folder) / "workspaces.sqlite"


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS growth "
                "(machine TEXT, signature TEXT, bytes INTEGER, PRIMARY KEY (machine, signature)) WITHOUT ROWID"
            )
            yield database
    except (OSError, sqlite3.Error) as error:
        raise InputError(
            f"what is known of operators cannot be kept in {path} ({error}); name another folder in {CACHE_VARIABLE}"
        ) from error


@cache
def _in_memory(path: Path, machine: str) -> dict[str, int]:
    with _database() as database:
        rows = database.execute("SELECT signature, bytes FROM growth WHERE machine = ?", (machine,))
        return dict(rows.fetchall())


def _load(machine: str) -> dict[str, int]:
    return _in_memory(_path(), machine)


def _store(machine: str, growths: Mapping[str, int]) -> None:
    with _database() as database:
        rows = [(machine, signature, size) for signature, size in growths.items()]
        database.executemany("INSERT OR REPLACE INTO growth VALUES (?, ?, ?)", rows)
    _load(machine).update(growths)
