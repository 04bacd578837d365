"""What is known on this device, kept on disk between processes: operators' scratch memory, layouts of their outputs,
and forecasts of whole steps.

One SQLite file under the user's cache folder, or under the folder that the variable SLT_CACHE names. What it holds is
told apart by processor, torch version and number of threads, so that it can be shared by unlike machines.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TypeAlias

import platformdirs
import torch

from slt_planner.environment import digest, processor, source_digest
from slt_planner.errors import InputError

CACHE_VARIABLE = "SLT_CACHE"

Layout: TypeAlias = list[list[int] | None]
"""The strides of each output of an operator; None for one that is no tensor."""


def growths(device: str, threads: int) -> Mapping[str, int]:
    """The most that live bytes rise while an operator runs, its outputs included, by signature."""
    return _table(_path(), _machine(device, threads))


def keep_growths(device: str, threads: int, learned: Mapping[str, int]) -> None:
    """Add to `growths`, on disk too.

    Raises:
        InputError: the file cannot be written.
    """
    _keep(_machine(device, threads), learned)


def layouts(device: str) -> Mapping[str, str]:
    """How kernels lay out outputs, as JSON of a `Layout`, by signature; only where torch's fake tensors differ."""
    return _table(_path(), _machine(device, None))


def keep_layouts(device: str, learned: Mapping[str, Layout]) -> None:
    """Add to `layouts`, on disk too; raises InputError as `keep_growths`."""
    _keep(_machine(device, None), {signature: json.dumps(layout) for signature, layout in learned.items()})


def forecasts(device: str, threads: int, step: str) -> Mapping[str, str]:
    """What was foreseen of a network's step, as JSON, by configuration."""
    return _table(_path(), _forecast_key(device, threads, step))


def keep_forecasts(device: str, threads: int, step: str, made: Mapping[str, str]) -> None:
    """Add to `forecasts`, on disk too; raises InputError as `keep_growths`."""
    _keep(_forecast_key(device, threads, step), made)


def _forecast_key(device: str, threads: int, step: str) -> str:
    """A forecast is also of the code that made it, and of the layouts that were known."""
    layouts_now = json.dumps(sorted(layouts(device).items()))
    return f"{_machine(device, threads)}, step {step}, code {source_digest()}, layouts {digest(layouts_now)}"


@cache
def _machine(device: str, threads: int | None) -> str:
    """Everything but an operator's signature that what is known of it depends on."""
    if device == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {threads and 'growth'}"
    kernels = f"{torch.backends.cpu.get_cpu_capability()}, oneDNN {torch.backends.mkldnn.enabled}"
    return f"torch {torch.__version__}, {processor()}, {kernels}, threads {threads}"


def _path() -> Path:
    folder = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("slt_planner")
    return Path(folder) / "operators.sqlite"


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS known "
                "(machine TEXT, signature TEXT, value, PRIMARY KEY (machine, signature)) WITHOUT ROWID"
            )
            yield database
    except (OSError, sqlite3.Error) as error:
        raise InputError(
            f"what is known of operators cannot be kept in {path} ({error}); name another folder in {CACHE_VARIABLE}"
        ) from error


@cache
def _table(path: Path, machine: str) -> dict:
    if not path.exists():
        return {}
    with _database(path) as database:
        rows: Sequence[tuple[str, int | str]] = database.execute(
            "SELECT signature, value FROM known WHERE machine = ?", (machine,)
        ).fetchall()
        return dict(rows)


def _keep(machine: str, learned: Mapping[str, int] | Mapping[str, str]) -> None:
    path = _path()
    with _database(path) as database:
        rows = [(machine, signature, value) for signature, value in learned.items()]
        database.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", rows)
    _table(path, machine).update(learned)
