"""A run folder: config.json, metrics.jsonl and weights.safetensors, readable at every moment of a run."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from slt_planner.config import Config
from slt_planner.errors import InputError, first_invalid
from slt_planner.federated.result import RoundRow, RunResult
from slt_planner.files import append_text, refuse_existing, write_bytes, write_text

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS, METRICS, WEIGHTS = "config.json", "metrics.jsonl", "weights.safetensors"
REPORT, PICTURE = "report.html", "accuracy.png"
CHECKPOINT, TENSORBOARD, SPLIT = "checkpoint/state.safetensors", "tensorboard", "split.safetensors"
_REPORTS = (REPORT, PICTURE, "report.csv", "report.md", "report.tex")
_FILES = (SETTINGS, METRICS, WEIGHTS, *_REPORTS, CHECKPOINT, SPLIT)
_SEVERAL = "*-seed*"


class RunFolder:
    """The files of a run in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, result: RunResult, force: bool = False) -> None:
        """Make the folder, with no round in it yet.

        Raises:
            InputError: the folder exists and `force` is False, or it cannot be made.
        """
        if force:
            clear_runs(self.path)  # weights of an earlier run do not belong to this one's metrics
        else:
            refuse_existing([self.path])
        write_text(self.path / METRICS, "", force=True)
        self.write_settings(result)  # from now on it is a run

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts no other process can go on with this run; one that is killed lets go of it.

        Raises:
            InputError: another process is at it.
        """
        try:
            import fcntl
        except ImportError:  # not on every system
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"run {self.path}: another process is at work on it; wait until it ends") from error
            yield
        finally:
            os.close(folder)

    def write_settings(self, result: RunResult) -> None:
        """config.json: everything needed to make the run again, and what it has come to so far."""
        write_text(self.path / SETTINGS, result.model_dump_json(indent=2, exclude={"rows"}) + "\n", force=True)

    def keep_rounds(self, rounds: int) -> list[RoundRow]:
        """The first rows of metrics.jsonl; those after them are dropped from it, to be made again.

        What a killed process left half written goes, too.

        Raises:
            InputError: there are fewer.
        """
        rows, lines = load_run(self.path).rows, _lines(self.path)
        if len(rows) < rounds:
            raise InputError(
                f"run {self.path}: {METRICS} has {len(rows)} rounds, but the checkpoint is of round {rounds}; "
                f"without {CHECKPOINT} the run begins again at its first round"
            )
        for name in _FILES:
            _remove_half_written(self.path / name)
        write_text(self.path / METRICS, "".join(f"{line}\n" for line in lines[:rounds]), force=True)
        return list(rows[:rounds])

    def append(self, row: RoundRow) -> None:
        """Add a round to metrics.jsonl; raises InputError if it cannot be written."""
        append_text(self.path / METRICS, row.model_dump_json() + "\n")

    def write_weights(self, weights: "Mapping[str, Tensor]", config: Config) -> None:
        """The global model's state dict, whole; its metadata holds the configuration that was trained, to cut it by."""
        import torch  # which reading a run does not need
        from safetensors.torch import save

        # A tensor that has two names is written under both: the format does not share.
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
        content = save(tensors, metadata={"config": config.model_dump_json()})
        write_bytes(self.path / WEIGHTS, content, force=True)

    def remove_checkpoint(self) -> None:
        """A finished run needs none."""
        _remove(self.path / CHECKPOINT)


def load_run(folder: str | Path) -> RunResult:
    """Read a run folder, finished or stopped; a line of metrics that a crash cut short is left out.

    Raises:
        InputError: not a run folder, or one whose files are not what a run writes.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in _lines(folder)]
        return RunResult.model_validate({**settings, "rows": rows} if isinstance(settings, dict) else settings)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"run {folder}: {SETTINGS} or {METRICS} cannot be read; is it a run folder?") from error
    except ValidationError as error:
        raise InputError(f"run {folder}: not a valid run: {first_invalid(error)}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or absurdly deep or long
        raise InputError(f"run {folder}: not a valid run ({str(error).splitlines()[0]})") from error


def _lines(folder: Path) -> list[str]:
    *lines, _unfinished = (folder / METRICS).read_text(encoding="utf-8").split("\n")
    return lines


def run_folders(path: Path) -> list[Path]:
    """The runs in a folder: itself, or its subfolders STRATEGY-seedN.

    Raises:
        InputError: there is none.
    """
    if (path / SETTINGS).is_file():
        return [path]
    folders = sorted(folder.parent for folder in path.glob(f"{_SEVERAL}/{SETTINGS}"))
    if not folders:
        raise InputError(f"{path}: no run to go on with; give a run folder, one with a {SETTINGS}, or a folder of them")
    return folders


def clear_runs(path: Path) -> None:
    """Remove what earlier runs left in a folder, alone or in its subfolders STRATEGY-seedN; nothing else is touched.

    Raises:
        InputError: another process is at one of them; then all are left.
    """
    folders = [path, *path.glob(_SEVERAL)]
    runs = [folder for folder in folders if all((folder / name).is_file() for name in (SETTINGS, METRICS))]
    with ExitStack() as alone:
        for folder in runs:
            alone.enter_context(RunFolder(folder).alone())
        for folder in runs:
            for name in _FILES:
                _remove(folder / name)
            remove_events(folder / TENSORBOARD)
            if folder != path and not any(folder.iterdir()):
                folder.rmdir()
    if runs:  # several runs have theirs beside them
        for name in _REPORTS:
            _remove(path / name)


def remove_events(folder: Path) -> None:
    """Remove TensorBoard's files, and their folder if nothing else is in it."""
    for file in folder.glob("events.out.tfevents.*"):
        _remove(file)


def _remove(file: Path) -> None:
    """Remove a file of a run, and its folder below the run's if that is then empty."""
    _remove_half_written(file)
    file.unlink(missing_ok=True)
    below = file.parent.name in (TENSORBOARD, Path(CHECKPOINT).parent.name)
    if below and file.parent.is_dir() and not any(file.parent.iterdir()):
        file.parent.rmdir()


def _remove_half_written(file: Path) -> None:
    """What a process that was killed while it wrote a file has left of it (`files.write_bytes`)."""
    for own in file.parent.glob(f".{file.name}.*"):
        own.unlink(missing_ok=True)
