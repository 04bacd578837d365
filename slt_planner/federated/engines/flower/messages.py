"""What travels: records as JSON, and weights as one safetensors array; both are checked where they arrive."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slt_planner.config import Config, Record
from slt_planner.errors import InputError, first_invalid
from slt_planner.federated.client import LocalTraining
from slt_planner.federated.engines.flower.introduction import Introduction
from slt_planner.planning.plan import PlannedModel

_RecordT = TypeVar("_RecordT", bound=Record)
_RECORD, _WEIGHTS, _IMAGES = "record", "weights", "images"
_STYPE = "safetensors"


class Brief(Record):
    """What a client must know of a run: the network, and the data set, unless it has images of its own."""

    model: PlannedModel
    input_shape: tuple[int, ...]
    num_classes: int
    dataset: str
    data_root: str | None = None


class Task(Record):
    """What a client does in a round.

    It has kept the weights of units 1..`held_depth` since an earlier round of the stage, and those that come are of
    the units after them; it is to keep units 1..`keep_depth` for the rest of it. With a budget, a step that would pass
    it fails.
    """

    brief: Brief
    round: int = Field(ge=1)
    stage: int = Field(ge=0)
    config: Config
    training: LocalTraining
    seed: int = Field(ge=0)
    budget_bytes: int | None = None
    held_depth: int = Field(default=0, ge=0)
    keep_depth: int = Field(default=0, ge=0)


class Outcome(Record):
    """What a client says beside its weights: its mean training loss (None: not finite), and on how many images."""

    loss: float | None
    samples: int = Field(ge=0)


def packed(record: Record, weights: ArrayRecord | None = None, images: np.ndarray | None = None) -> RecordDict:
    """A message's content."""
    content = RecordDict({_RECORD: ConfigRecord({"json": record.model_dump_json()})})
    if weights is not None:
        content[_WEIGHTS] = weights
    if images is not None:
        content[_IMAGES] = ArrayRecord({"indices": Array(np.ascontiguousarray(images))})
    return content


def record_in(message: Message, kind: type[_RecordT]) -> _RecordT:
    """The record of a message.

    Raises:
        InputError: it has none, or another one.
    """
    try:
        return kind.model_validate_json(str(message.content.config_records[_RECORD]["json"]))
    except KeyError as error:
        raise InputError(f"a message without a {kind.__name__.lower()}") from error
    except ValidationError as error:
        raise InputError(f"a message's {kind.__name__.lower()} is not valid: {first_invalid(error)}") from error


def weights_in(message: Message) -> dict[str, Tensor]:
    """The tensors of a message, by fqn; raises InputError if they cannot be read."""
    if _WEIGHTS not in message.content.array_records:
        raise InputError("a message without weights")
    return read_state(message.content.array_records[_WEIGHTS])


def images_in(message: Message) -> np.ndarray:
    """Which training images a client has, (n,) int64.

    Raises:
        InputError: they cannot be read.
    """
    try:
        indices = message.content.array_records[_IMAGES]["indices"].numpy()
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("a message without the numbers of images") from error
    if indices.ndim != 1 or indices.dtype != np.int64:
        raise InputError(f"numbers of images are {indices.dtype} of shape {indices.shape}; they must be int64 (n,)")
    return indices


def write_state(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by fqn as one array: any number format travels, and as few pieces as can be."""
    blob = save({name: tensor.detach().contiguous() for name, tensor in state.items()})
    return ArrayRecord({"state": Array(dtype="uint8", shape=(len(blob),), stype=_STYPE, data=blob)})


def read_state(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors again.

    Raises:
        InputError: it is something else, or damaged.
    """
    array = record.get("state")
    if array is None or array.stype != _STYPE:
        raise InputError("weights that are not one safetensors array")
    try:
        return load(array.data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"weights that cannot be read ({str(error).splitlines()[0]})") from error


__all__ = [
    "Brief",
    "Introduction",
    "Outcome",
    "Task",
    "images_in",
    "packed",
    "read_state",
    "record_in",
    "weights_in",
    "write_state",
]
