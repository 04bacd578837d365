"""A run folder: config.json, metrics.jsonl and weights.safetensors, readable at every moment of a run."""

import json
from collections.abc import Mapping
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
_FILES = (SETTINGS, METRICS, WEIGHTS, REPORT, PICTURE)


class RunFolder:
    """The files of a run in the making.

    Raises:
        InputError: the folder exists and `force` is False, or it cannot be made.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        if force:
            clear_runs(path)  # weights of an earlier run do not belong to this one's metrics
        else:
            refuse_existing([path])
        self.path = path
        write_text(path / METRICS, "", force=True)

    def write_settings(self, result: RunResult) -> None:
        """config.json: everything needed to make the run again, and what it has come to so far."""
        write_text(self.path / SETTINGS, result.model_dump_json(indent=2, exclude={"rows"}) + "\n", force=True)

    def append(self, row: RoundRow) -> None:
        """Add a round to metrics.jsonl; raises InputError if it cannot be written."""
        append_text(self.path / METRICS, row.model_dump_json() + "\n")

    def write_weights(self, weights: "Mapping[str, Tensor]", config: Config) -> None:
        """The global model's state dict, whole; its metadata holds the configuration that was trained, to cut it by."""
        from safetensors.torch import save  # imports torch, which reading a run does not need

        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        content = save(tensors, metadata={"config": config.model_dump_json()})
        write_bytes(self.path / WEIGHTS, content, force=True)


def load_run(folder: str | Path) -> RunResult:
    """Read a run folder, finished or stopped; a line of metrics that a crash cut short is left out.

    Raises:
        InputError: not a run folder, or one whose files are not what a run writes.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        *lines, _unfinished = (folder / METRICS).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
        return RunResult.model_validate({**settings, "rows": rows} if isinstance(settings, dict) else settings)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"run {folder}: {SETTINGS} or {METRICS} cannot be read; is it a run folder?") from error
    except ValidationError as error:
        raise InputError(f"run {folder}: not a valid run: {first_invalid(error)}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or absurdly deep or long
        raise InputError(f"run {folder}: not a valid run ({str(error).splitlines()[0]})") from error


def clear_runs(path: Path) -> None:
    """Remove what earlier runs left in a folder, alone or in its subfolders STRATEGY-seedN; nothing else is touched."""
    folders = [path, *path.glob("*-seed*")]
    runs = [folder for folder in folders if all((folder / name).is_file() for name in (SETTINGS, METRICS))]
    written = [folder / name for folder in runs for name in _FILES]
    if runs:
        written += [path / REPORT, path / PICTURE]  # several runs have theirs beside them
    for file in written:
        file.unlink(missing_ok=True)
    for folder in runs:
        if folder != path and not any(folder.iterdir()):
            folder.rmdir()
