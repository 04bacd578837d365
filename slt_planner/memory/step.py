"""One training step, the same for measuring and for training: gradients to zero, forward, loss, backward, optimizer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slt_planner.config import Optimizer, StepSettings
from slt_planner.graph.adapter import Adapter


def make_optimizer(
    parameters: Iterable[nn.Parameter], optimizer: Optimizer, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of a step, over those of the parameters that are trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decay, foreach = optimizer.weight_decay, optimizer.foreach
    if optimizer.name == "sgd":
        return torch.optim.SGD(
            trained, lr=learning_rate, momentum=optimizer.momentum, weight_decay=decay, foreach=foreach
        )
    kind = torch.optim.Adam if optimizer.name == "adam" else torch.optim.AdamW
    return kind(trained, lr=learning_rate, weight_decay=decay, foreach=foreach)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    labels: Any,
    step: StepSettings,
    adapter: Adapter,
) -> Tensor:
    """One step on a batch (N, ...) with its labels; gives the loss, detached."""
    optimizer.zero_grad(set_to_none=step.set_to_none)
    loss = adapter.step_loss(model, batch, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def memory_format(step: StepSettings) -> torch.memory_format:
    """The step's layout of images and convolution weights."""
    return torch.channels_last if step.memory_format == "channels_last" else torch.contiguous_format


@contextmanager
def threads(step: StepSettings) -> Iterator[int]:
    """Run with the step's number of threads (torch's own where it names none); gives that number."""
    before = torch.get_num_threads()
    torch.set_num_threads(step.threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
