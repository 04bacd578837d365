"""What frozen prefixes give for clients' images, kept while their weights stay: it is computed once a stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from slt_planner.config import Config, StepSettings
from slt_planner.data.datasets import Dataset, normalise
from slt_planner.federated.client import LocalTraining
from slt_planner.graph.adapter import Adapter
from slt_planner.memory.step import as_batch, precision
from slt_planner.submodel.extract import SubModel
from slt_planner.submodel.prefix import Split

Rows: TypeAlias = tuple[Tensor, ...]
"""The tensors that pass from a prefix to the rest, each with a row an image of one client."""


@dataclass(frozen=True, eq=False)
class FrozenPrefix:
    """That of the clients that train one step: `weights` are its tensors by fqn, `row_bytes` what an image takes."""

    split: Split
    weights: Mapping[str, Tensor]
    row_bytes: int


class PrefixCache:
    """Rows by client, up to a number of bytes; those of a prefix whose weights have changed are dropped.

    A client whose rows do not fit beside the others takes the place of those that came last, so that of clients that
    come by turns some always find theirs.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._prefixes: dict[tuple[Config, StepSettings], FrozenPrefix | None] = {}
        self._rows: dict[int, tuple[FrozenPrefix, Rows]] = {}
        self._depth = 0

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(kept.nbytes for _, rows in self._rows.values() for kept in rows)

    def begin_round(self, depth: int) -> None:
        """Units 1..depth are those that nobody trains in this round; rows of another depth go."""
        if depth != self._depth:
            self._prefixes, self._rows, self._depth = {}, {}, depth

    def prefix(self, model: SubModel, step: StepSettings, dataset: Dataset) -> FrozenPrefix | None:
        """That of a client's sub-model, which trains this step; None where nothing of it is fixed."""
        key = (model.extraction.config, step)
        known = self._prefixes.get(key)
        if known is not None and not _has(model, known.weights):
            self._rows = {client: kept for client, kept in self._rows.items() if kept[0] is not known}
            del self._prefixes[key]
        if key not in self._prefixes:
            self._prefixes[key] = _frozen_prefix(model, step, self._depth, dataset)
        return self._prefixes[key]

    def rows(
        self,
        client: int,
        prefix: FrozenPrefix,
        model: SubModel,
        dataset: Dataset,
        indices: np.ndarray,
        training: LocalTraining,
    ) -> Rows | None:
        """What the prefix gives for a client's images, kept or computed now; None where they alone pass the limit."""
        of, rows = self._rows.get(client, (None, ()))
        if of is prefix:
            return rows
        needed = prefix.row_bytes * len(indices)
        if needed > self._limit:
            return None
        self._rows.pop(client, None)
        while self.bytes + needed > self._limit:
            self._rows.popitem()
        rows = _computed(prefix.split, model, dataset, torch.as_tensor(indices), training)
        self._rows[client] = (prefix, rows)
        return rows


def _has(model: SubModel, weights: Mapping[str, Tensor]) -> bool:
    held = model.held_state()
    return all(torch.equal(held[name], value) for name, value in weights.items())


def _frozen_prefix(model: SubModel, step: StepSettings, depth: int, dataset: Dataset) -> FrozenPrefix | None:
    computes_own_loss = type(model.extraction.graph.adapter).step_loss is not Adapter.step_loss
    split = None if depth == 0 or computes_own_loss else model.split(depth)
    if split is None:
        return None
    held = model.held_state()
    weights = {name: held[name].clone() for name in split.tensors if name in held}
    row_bytes = sum(value.nbytes for value in _passed(split, model, dataset, torch.zeros(1, dtype=torch.long), step))
    return FrozenPrefix(split, weights, row_bytes)


def _computed(split: Split, model: SubModel, dataset: Dataset, images: Tensor, training: LocalTraining) -> Rows:
    """Rows of images, computed in batches of the step's size, in their order: the same whenever it is done."""
    rows: Rows = ()
    for begin in range(0, len(images), training.batch_size):
        chosen = images[begin : begin + training.batch_size]
        passed = _passed(split, model, dataset, chosen, training.step)
        rows = rows or tuple(_room_for(len(images), value) for value in passed)
        for kept, value in zip(rows, passed, strict=True):
            kept[begin : begin + len(chosen)] = value
    return rows


def _room_for(rows: int, value: Tensor) -> Tensor:
    """An empty tensor of so many rows like these, in their number format and memory format."""
    layout = torch.contiguous_format if value.is_contiguous() else torch.channels_last
    room = torch.empty((rows, *value.shape[1:]), dtype=value.dtype, device=value.device)
    return room.to(memory_format=layout) if value.dim() == 4 else room


def _passed(split: Split, model: SubModel, dataset: Dataset, images: Tensor, step: StepSettings) -> Rows:
    """What passes to the rest for some training images."""
    batch = as_batch(normalise(dataset.train_images[images].to(step.device), dataset), step)
    with precision(step):
        passed: Rows = split.before(model, *model.extraction.graph.adapter.inputs(batch))
    return passed
