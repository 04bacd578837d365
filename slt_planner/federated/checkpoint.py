"""A run's state on disk: one file, written under a temporary name and renamed, so that it is whole at every moment."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from slt_planner.config import Record
from slt_planner.errors import InputError, first_invalid
from slt_planner.federated.progress import Progress
from slt_planner.federated.run_folder import CHECKPOINT
from slt_planner.federated.strategies.base import ServerState
from slt_planner.files import write_bytes
from slt_planner.graph.trace import ModelGraph

_RECORD = "checkpoint"  # its name in the file's metadata


class Checkpoint(Record):
    """What a state is beside its weights; JSON in the metadata of the file that holds them."""

    version: Literal[1] = 1
    round: int = Field(ge=0)
    progress: Progress


def save_checkpoint(folder: Path, graph: ModelGraph, state: ServerState) -> None:
    """Keep a run's state in its folder; the one before is there until this one is.

    Raises:
        InputError: it cannot be written.
    """
    own = {name: tensor.contiguous() for name, tensor in state.weights.items() if graph.first_name(name) == name}
    record = Checkpoint(round=state.round, progress=state.progress)
    write_bytes(folder / CHECKPOINT, save(own, metadata={_RECORD: record.model_dump_json()}), force=True)


def load_checkpoint(folder: Path, graph: ModelGraph, start: ServerState) -> ServerState | None:
    """The state that a run's folder keeps; None if it keeps none yet. `start` is the run's first one, to compare with.

    Raises:
        InputError: the file is not a checkpoint, or one of another network.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = Checkpoint.model_validate_json((file.metadata() or {}).get(_RECORD, ""))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except ValidationError as error:
        raise InputError(f"{path}: not a checkpoint: {first_invalid(error)}; {_ADVICE}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a checkpoint ({str(error).splitlines()[0]}); {_ADVICE}") from error
    for name, expected in start.weights.items():
        own = tensors.get(graph.first_name(name))
        if own is None or own.shape != expected.shape or own.dtype != expected.dtype:
            raise InputError(f"{path}: {name} is not the run's network's; {_ADVICE}")
    return ServerState(record.round, {name: tensors[graph.first_name(name)] for name in start.weights}, record.progress)


_ADVICE = "without this file the run begins again at its first round"
