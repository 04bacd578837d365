"""One training step, the same for measuring, predicting and training: gradients to zero, forward, loss, backward,
optimizer; and steady steps of a module on made-up data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from slt_planner.config import Config, Optimizer, StepSettings, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.profile import Category
from slt_planner.memory.saved import changes_in_place_refused
from slt_planner.submodel.extract import SubModel, extract

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
    """One step on a batch (N, ...) with its labels; gives the loss, detached.

    With micro-batches the pieces run forward and backward one after another, each with its share of the loss, and the
    optimizer steps once. Where the loss is a mean over samples (`Adapter.loss_is_mean`) the gradients are the batch's
    own, but for the order of sums. Batch norm is then ghost batch norm (arXiv 1705.08741): its statistics are those of
    a piece, and running ones move once a piece. Random masks are drawn piece by piece.

    With the lever ``early_updates`` a parameter is updated as soon as its gradient is there, and the gradient goes.
    """
    optimizer.zero_grad(set_to_none=step.set_to_none)
    pieces = step.pieces(len(batch))
    if "early_updates" in step.levers:
        with _early_updates(optimizer):
            return add_gradients(model, batch, labels, step, adapter)
    if len(pieces) == 1:
        loss = add_gradients(model, batch, labels, step, adapter)
    else:
        loss, begin = torch.zeros((), device=batch.device), 0
        for size in pieces:
            chosen = slice(begin, begin + size)
            own = adapter.labels_of(labels, chosen)
            loss += add_gradients(model, batch[chosen], own, step, adapter, share=size / len(batch))
            begin += size
    optimizer.step()
    return loss


@contextmanager
def _early_updates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While this lasts, a backward pass updates each parameter when its gradient is complete, and frees that."""
    groups = optimizer.param_groups
    handles = []

    def updating(group: dict[str, Any]) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            optimizer.param_groups = [{**group, "params": [parameter]}]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups = groups
            parameter.grad = None

        return update

    for group in groups:
        update = updating(group)
        handles += [parameter.register_post_accumulate_grad_hook(update) for parameter in group["params"]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_gradients(
    model: nn.Module, batch: Tensor, labels: Any, step: StepSettings, adapter: Adapter, share: float = 1.0
) -> Tensor:
    """Forward and backward of some samples; gives the share of the loss that they count with, detached."""
    with precision(step):
        loss = adapter.step_loss(model, batch, labels)
    if share < 1:
        loss = loss * share
    loss.backward()
    return loss.detach()


def precision(step: StepSettings) -> AbstractContextManager[Any]:
    """What a forward pass of the step runs in."""
    if step.precision != "autocast":
        return nullcontext()
    return torch.autocast(step.device, dtype=torch.bfloat16)


def as_trained(model: ModuleT, step: StepSettings) -> ModuleT:
    """The module with its weights in the step's number format and memory format, and its levers in use, in place.

    Raises:
        UnsupportedLayerError: a sub-model's program makes tensors of fp32, and the step is in another format.
        InputError: levers that rewrite a program, and the module is no sub-model.
    """
    if isinstance(model, SubModel):
        model.use_levers(step.levers)
    elif rewriting := [lever for lever in step.levers if lever != "early_updates"]:
        raise InputError(f"{', '.join(rewriting)}: these levers are for sub-models; extract one from the network")
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


def example_batch(
    spec: StepSpec, adapter: Adapter, input_shape: tuple[int, ...], num_classes: int
) -> tuple[Tensor, Any]:
    """Random images (N, ...), ready for the step, and labels."""
    with torch.device(spec.device):
        images = torch.randn(spec.batch_size, *input_shape)
        labels = adapter.example_labels(spec.batch_size, num_classes, input_shape)
    return as_batch(images, spec), labels


@contextmanager
def threads(step: StepSettings) -> Iterator[int]:
    """Run with the step's number of threads (torch's own where it names none); gives that number."""
    before = torch.get_num_threads()
    torch.set_num_threads(step.threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether what comes out for a sample depends on the others beside it."""
    if isinstance(module, SubModel):
        return module.extraction.graph.has_batch_norm
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def device_name(device: str, number_of_threads: int) -> str:
    """The device of a profile, in words."""
    if device == "cuda":
        return f"cuda, {torch.cuda.get_device_name()}"
    return f"cpu, {number_of_threads} thread{'s' if number_of_threads > 1 else ''}"


@contextmanager
def lone_values_refused(what: str, right: str = "use 2 or more") -> Iterator[None]:
    """Batch norm's refusal of a single value a channel, in our words: what it is given, and what would be right.

    Raises:
        InputError: that is what it got.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(f"{what}: batch norm would see one value a channel; {right}") from error


def _refuse_lone_samples(module: nn.Module, spec: StepSpec) -> None:
    """Batch norm takes statistics over samples, and a micro-batch of one sample has none."""
    if spec.micro_batch is not None and min(spec.pieces(spec.batch_size)) == 1 and has_batch_norm(module):
        right = 2 if spec.batch_size % 2 == 0 else 3
        raise InputError(
            f"micro-batches of {spec.micro_batch} in a batch of {spec.batch_size}: batch norm would see a single "
            f"sample; use {right} or more"
        )


class SteadyStep:
    """A module in training and its optimizer, with what it takes to bring one to the second step and run that.

    Without an optimizer it makes the step's, which learns nothing.

    Raises:
        InputError: micro-batches of one sample, and the module has batch norms.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: StepSpec,
        input_shape: tuple[int, ...],
        num_classes: int,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        _refuse_lone_samples(module, spec)
        self.module = module.train()
        self.optimizer = optimizer or make_optimizer(module.parameters(), spec.optimizer, learning_rate=0.0)
        self.device = spec.device
        self._spec, self._adapter = spec, adapter
        self._input_shape, self._num_classes = input_shape, num_classes
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    @classmethod
    def of(cls, graph: ModelGraph, config: Config, spec: StepSpec) -> "SteadyStep":
        """That of a configuration of a network, with made-up values; it has run once, so that it is steady."""
        module = as_trained(extract(graph, None, config, spec.norms).to(spec.device), spec)
        step = cls(module, spec, graph.input_shape, graph.num_classes, graph.adapter)
        step.prepare()
        step.train(*step.example_batch())
        return step

    def prepare(self) -> None:
        """Bring gradients and the optimizer's state into being, as a first step does."""
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        if "early_updates" in self._spec.levers:
            self.optimizer.zero_grad(set_to_none=True)

    def run(self, at_end: Callable[[Mapping[Category, list[Tensor]]], None]) -> None:
        """One step; `at_end` is given the tensors that are there when it is done, before the batch goes."""
        batch, labels = self.example_batch()
        self.train(batch, labels)
        at_end({**self.tensors(), "batch": [x for x in pytree.tree_leaves([batch, labels]) if isinstance(x, Tensor)]})

    def example_batch(self) -> tuple[Tensor, Any]:
        """Random images (N, ...), ready for the step, and labels."""
        return example_batch(self._spec, self._adapter, self._input_shape, self._num_classes)

    def train(self, batch: Tensor, labels: Any) -> None:
        """The step alone."""
        with lone_values_refused(f"batch {len(batch)}"), changes_in_place_refused():
            training_step(self.module, self.optimizer, batch, labels, self._spec, self._adapter)

    def tensors(self) -> dict[Category, list[Tensor]]:
        """What outlives a step, by category."""
        return {
            "weights": list(self.module.parameters()),
            "buffers": list(self.module.buffers()),
            "gradients": [parameter.grad for parameter in self._trained if parameter.grad is not None],
            "optimizer": [tensor for parameter in self._trained for tensor in state_of(self.optimizer, parameter)],
        }
