"""What a client does: local training of its sub-model on its own images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slt_planner.config import StepSettings
from slt_planner.data.augment import random_crop_flip
from slt_planner.data.datasets import Dataset, normalise
from slt_planner.federated.nested_widths import TrainedWidth, nested_widths
from slt_planner.graph.adapter import Adapter
from slt_planner.memory.limit import memory_limit
from slt_planner.memory.step import as_batch, make_optimizer, training_step
from slt_planner.submodel.extract import SubModel
from slt_planner.submodel.prefix import Split


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: epochs over its images in batches of `batch_size`, at one learning rate a round.

    With `augment` images are cropped and flipped at random, if their data set is one where that makes sense. With
    `widths` each batch trains the network of one of these head scales, drawn by chance.
    """

    step: StepSettings
    batch_size: int
    epochs: int
    learning_rate: float
    augment: bool = True
    enforce: bool = False
    widths: tuple[float, ...] = ()


def train_client(
    model: SubModel,
    dataset: Dataset,
    indices: np.ndarray,
    training: LocalTraining,
    seed: int,
    budget_bytes: int | None = None,
) -> float:
    """Train a sub-model in place on the training images `indices`, with a fresh optimizer; gives the mean loss.

    The sub-model is in the step's number and memory format. All randomness (order, augmentation, dropout) derives from
    `seed`. With a budget, a step that would pass it raises BudgetExceeded.
    """
    generator, adapter = torch.Generator().manual_seed(seed), model.extraction.graph.adapter
    batches = local_batches(dataset, indices, training, generator)
    return _train(model, batches, adapter, training, seed, generator, budget_bytes)


def train_after_prefix(
    model: SubModel, split: Split, rows: Sequence[Tensor], labels: Tensor, training: LocalTraining, seed: int
) -> float:
    """As `train_client`, from what the first part of the split gives for the client's own images.

    `rows` are its tensors (n, ...), `labels` (n, ...) those of the same images.
    """
    generator, adapter = torch.Generator().manual_seed(seed), _FromRows(model.extraction.graph.adapter, split, rows)
    dealt, device = _places(len(labels), training, generator), training.step.device
    batches = ((_there(places, device), _there(labels[places].long(), device)) for places in dealt)
    return _train(model, batches, adapter, training, seed, generator)


class _FromRows(Adapter):
    """A batch is places in what a prefix has given."""

    def __init__(self, own: Adapter, split: Split, rows: Sequence[Tensor]) -> None:
        self._own, self._split, self._rows = own, split, rows

    def labels_of(self, labels: Any, chosen: slice) -> Any:
        return self._own.labels_of(labels, chosen)

    def step_loss(self, model: nn.Module, images: Tensor, labels: Any) -> Tensor:
        assert isinstance(model, SubModel)
        return self._own.loss(model.run_after(self._split, *(rows[images] for rows in self._rows)), labels)


def _train(
    model: SubModel,
    batches: Iterator[tuple[Tensor, Tensor]],
    adapter: Adapter,
    training: LocalTraining,
    seed: int,
    generator: torch.Generator,
    budget_bytes: int | None = None,
) -> float:
    """Train in place on batches, which the generator makes and the adapter understands; gives the mean loss."""
    device = training.step.device
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed)
        steps = [
            _Step(trained, training.step, _limit(budget_bytes, model, trained, device), adapter)
            for trained in _widths(model, training)
        ]
        for step in steps:
            step.trained.model.train()
        total, images = torch.zeros((), device=device), 0
        for batch, labels in batches:
            step = steps[0] if len(steps) == 1 else steps[int(torch.randint(len(steps), (), generator=generator))]
            loss = step.run(batch, labels)
            total += loss * len(batch)
            images += len(batch)
            del loss  # the next step's memory is to be its own
            if len(steps) > 1:
                step.trained.optimizer.zero_grad()  # gradients of one width must not wait beside those of the next
    return float(total) / images


def _widths(model: SubModel, training: LocalTraining) -> tuple[TrainedWidth, ...]:
    """What a batch may train: the sub-model, or one of several widths of it."""
    if training.widths:
        return nested_widths(model, training.widths, training.step, training.learning_rate)
    return (TrainedWidth(model, make_optimizer(model.parameters(), training.step.optimizer, training.learning_rate)),)


def _limit(
    budget_bytes: int | None, model: SubModel, trained: TrainedWidth, device: str
) -> AbstractContextManager[object]:
    """Nothing, or what makes a step that passes the budget fail."""
    if budget_bytes is None:
        return nullcontext()
    held = () if trained.model is model else (model,)  # a narrower network is a view of it
    return memory_limit(budget_bytes, trained.model, trained.optimizer, *held, device=device)


@dataclass(frozen=True)
class _Step:
    """A training step, again and again."""

    trained: TrainedWidth
    settings: StepSettings
    limit: AbstractContextManager[object]
    adapter: Adapter

    def run(self, batch: Tensor, labels: Tensor) -> Tensor:
        """One step; gives the loss."""
        with self.limit:
            return training_step(self.trained.model, self.trained.optimizer, batch, labels, self.settings, self.adapter)


def local_batches(
    dataset: Dataset, indices: np.ndarray, training: LocalTraining, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented batches of (images (n, C, H, W), labels (n, ...)), as `_places` deals them."""
    own = torch.as_tensor(indices)
    for places in _places(len(own), training, generator):
        # Nothing but the batch itself may stay alive here while the step runs: it would not be in the plan's peak.
        yield _batch(dataset, own[places], training, generator), _labels(dataset, own[places], training.step)


def _places(images: int, training: LocalTraining, generator: torch.Generator) -> Iterator[Tensor]:
    """Which of its images a client trains on in each step, by their places among them.

    A tail of one image is dropped, and so is a last image that would be a micro-batch alone: batch statistics of a
    single image at one position are not defined.
    """
    for _ in range(training.epochs):
        for places in torch.randperm(images, generator=generator).split(training.batch_size):
            pieces = training.step.pieces(len(places))
            if pieces[-1] == 1 < max(pieces):
                places = places[:-1]
            if len(places) > 1 or images == 1:
                yield places


def _batch(dataset: Dataset, chosen: Tensor, training: LocalTraining, generator: torch.Generator) -> Tensor:
    images = dataset.train_images[chosen]
    if training.augment and dataset.augment:
        images = random_crop_flip(images, generator)
    return as_batch(normalise(_there(images, training.step.device), dataset), training.step)


def _labels(dataset: Dataset, chosen: Tensor, step: StepSettings) -> Tensor:
    return _there(dataset.train_labels[chosen].long(), step.device)


def _there(made: Tensor, device: str) -> Tensor:
    """What was made on the CPU, on the device; a GPU that is still at the step before is not waited for."""
    return made.to(device, non_blocking=True)


def client_seed(seed: int, round_number: int, client: int) -> int:
    """A client's own seed in a round: the same whoever runs it, and in whatever order."""
    return int(np.random.SeedSequence([seed, round_number, client]).generate_state(1)[0])


def learning_rate(round_number: int, rounds: int, first: float, last: float) -> float:
    """Cosine from `first` in round 1 to `last` in the final round.

    >>> [round(learning_rate(r, 3, 0.1, 0.01), 3) for r in (1, 2, 3)]
    [0.1, 0.055, 0.01]
    """
    progress = (round_number - 1) / max(1, rounds - 1)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
