"""One training step, the same for measuring, predicting and training: gradients to zero, forward, loss, backward,
optimizer; and steady steps of a module on made-up data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slt_planner.config import Optimizer, StepSettings, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.adapter import Adapter
from slt_planner.memory.profile import Category
from slt_planner.submodel.extract import SubModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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


def state_of(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    """The tensors that an optimizer keeps for one parameter; none without an optimizer."""
    state = optimizer.state.get(parameter, {}) if optimizer else {}
    return [value for value in state.values() if isinstance(value, Tensor)]


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
    with _precision(step):
        loss = adapter.step_loss(model, batch, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _precision(step: StepSettings) -> AbstractContextManager[Any]:
    if step.precision != "autocast":
        return nullcontext()
    return torch.autocast(step.device, dtype=torch.bfloat16)


def as_trained(model: ModuleT, step: StepSettings) -> ModuleT:
    """The module with its weights in the step's number format and memory format, in place.

    Raises:
        UnsupportedLayerError: a sub-model's program makes tensors of fp32, and the step is in another format.
    """
    if step.precision == "bf16" and isinstance(model, SubModel) and (fixed := model.first_call_in(torch.float32)):
        raise UnsupportedLayerError(f"{fixed}: makes tensors of fp32 whatever it is given; use autocast, not bf16")
    model = model.to(dtype=dtype(step))
    over_time = any(parameter.dim() == 5 for parameter in model.parameters())  # has no channels_last
    return model if over_time else model.to(memory_format=memory_format(step))


def dtype(step: StepSettings) -> torch.dtype:
    """The number format of weights and batches; autocast keeps both in fp32."""
    return torch.bfloat16 if step.precision == "bf16" else torch.float32


def memory_format(step: StepSettings) -> torch.memory_format:
    """The step's layout of images and convolution weights."""
    return torch.channels_last if step.memory_format == "channels_last" else torch.contiguous_format


def as_batch(images: Tensor, step: StepSettings) -> Tensor:
    """Images (N, ...) in the step's number format and layout."""
    images = images.to(dtype(step))
    return images.to(memory_format=memory_format(step)) if images.dim() == 4 else images


@contextmanager
def threads(step: StepSettings) -> Iterator[int]:
    """Run with the step's number of threads (torch's own where it names none); gives that number."""
    before = torch.get_num_threads()
    torch.set_num_threads(step.threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def device_name(device: str, number_of_threads: int) -> str:
    """The device of a profile, in words."""
    if device == "cuda":
        return f"cuda, {torch.cuda.get_device_name()}"
    return f"cpu, {number_of_threads} thread{'s' if number_of_threads > 1 else ''}"


class SteadyStep:
    """A module in training and its optimizer, with what it takes to bring one to the second step and run that."""

    def __init__(
        self, module: nn.Module, spec: StepSpec, input_shape: tuple[int, ...], num_classes: int, adapter: Adapter
    ) -> None:
        self.module = module.train()
        self.optimizer = make_optimizer(module.parameters(), spec.optimizer, learning_rate=0.0)
        self.device = spec.device
        self._spec, self._adapter = spec, adapter
        self._input_shape, self._num_classes = input_shape, num_classes
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def prepare(self) -> None:
        """Bring gradients and the optimizer's state into being, as a first step does."""
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def run(self, at_end: Callable[[Mapping[Category, list[Tensor]]], None]) -> None:
        """One step; `at_end` is given the tensors that are there when it is done, before the batch goes."""
        with torch.device(self._spec.device):
            images = torch.randn(self._spec.batch_size, *self._input_shape)
            labels = self._adapter.example_labels(self._spec.batch_size, self._num_classes, self._input_shape)
        batch = as_batch(images, self._spec)
        del images
        try:
            training_step(self.module, self.optimizer, batch, labels, self._spec, self._adapter)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(f"batch {len(batch)}: batch norm would see one value a channel; use 2 or more") from error
        at_end({**self.tensors(), "batch": [x for x in pytree.tree_leaves([batch, labels]) if isinstance(x, Tensor)]})

    def tensors(self) -> dict[Category, list[Tensor]]:
        """What outlives a step, by category."""
        return {
            "weights": list(self.module.parameters()),
            "buffers": list(self.module.buffers()),
            "gradients": [parameter.grad for parameter in self._trained if parameter.grad is not None],
            "optimizer": [tensor for parameter in self._trained for tensor in state_of(self.optimizer, parameter)],
        }
