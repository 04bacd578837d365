"""Ordered dropout within a client (FjORD, arXiv 2102.13451): one set of weights, trained at several nested widths."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from slt_planner.config import Config, StepSettings, StepSpec
from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.calibrate import calibrate_as_run
from slt_planner.memory.measure import peak_of
from slt_planner.memory.step import SteadyStep, as_trained, make_optimizer
from slt_planner.submodel.extract import SubModel, extract, tensor_indices


@dataclass(frozen=True)
class TrainedWidth:
    """A sub-model and its optimizer."""

    model: SubModel
    optimizer: torch.optim.Optimizer


def check_nested(widest: SubModel, widths: tuple[float, ...]) -> None:
    """Whether the entries of each of these head scales are the first ones of the widest's, so that views can have them.

    Raises:
        UnsupportedLayerError: those of a tensor are not (after a concatenation, or of attention's joint projection).
    """
    graph, config = widest.extraction.graph, widest.extraction.config
    kept = tensor_indices(graph, config)
    for width in widths:
        places = tensor_indices(graph, config.model_copy(update={"head_scale": width}))
        for name in widest.held_state():
            for dim, inner in enumerate(places[name]):
                outer = kept[name][dim].indices if kept[name] else range(inner.size)
                if list(outer[: inner.width]) != list(inner.indices):
                    raise UnsupportedLayerError(
                        f"{name}: its entries at head scale {width:.3g} are not the first ones of those at "
                        f"{config.head_scale:.3g}, and fjord trains views of them; use heterofl, of one width a client"
                    )


def nested_widths(
    widest: SubModel, widths: tuple[float, ...], step: StepSettings, learning_rate: float
) -> tuple[TrainedWidth, ...]:
    """The network at several head scales, in one set of weights and of optimizer state: those of the widest.

    Weights, buffers and momentum of a narrower one are views of the widest's, so that a step at one width changes the
    entries that it has and no others, and all widths together take the memory of the widest.

    Raises:
        UnsupportedLayerError: as `check_nested`.
    """
    check_nested(widest, widths)
    extraction = widest.extraction
    graph, own = extraction.graph, make_optimizer(widest.parameters(), step.optimizer, learning_rate)
    _make_state(own)
    held, by_name = widest.held_state(), dict(widest.named_parameters())
    trained = []
    for width in widths:
        if width == extraction.config.head_scale:
            trained.append(TrainedWidth(widest, own))
            continue
        config = extraction.config.model_copy(update={"head_scale": width})
        narrow = as_trained(extract(graph, None, config, step.norms).to(step.device), step)
        for name, cut in narrow.held_state().items():
            _find(narrow, name).data = _first_entries(held[name], cut.shape)
        optimizer = make_optimizer(narrow.parameters(), step.optimizer, learning_rate)
        for name, parameter in narrow.named_parameters():
            optimizer.state[parameter] = {
                key: _first_entries(value, parameter.shape) if value.dim() else value
                for key, value in own.state.get(by_name[name], {}).items()
            }
        trained.append(TrainedWidth(narrow, optimizer))
    return tuple(trained)


def nested_peak(graph: ModelGraph, config: Config, widths: tuple[float, ...], spec: StepSpec) -> int:
    """The most that a client needs who trains these widths, each measured as it runs: beside all of the widest.

    A narrower one can need more than the widest: kernels want weights that are views in one piece, and copy them.

    Raises:
        UnsupportedLayerError: as `check_nested`.
    """
    return max(peak_of(step, spec) for step in _nested_steps(graph, config, widths, spec))


def calibrate_nested(graph: ModelGraph, config: Config, widths: tuple[float, ...], spec: StepSpec) -> None:
    """Learn the scratch memory of the operators of these widths, as `calibrate`."""
    for step in _nested_steps(graph, config, widths, spec):
        calibrate_as_run(step(), spec)


def _nested_steps(
    graph: ModelGraph, config: Config, widths: tuple[float, ...], spec: StepSpec
) -> list[Callable[[], SteadyStep]]:
    """What makes the step of each width."""

    def step(width: float) -> SteadyStep:
        widest = as_trained(extract(graph, None, config, spec.norms).to(spec.device), spec)
        (own,) = (own for own in nested_widths(widest, widths, spec, 0.0) if _scale(own.model) == width)
        return SteadyStep(own.model, spec, graph.input_shape, graph.num_classes, graph.adapter, own.optimizer)

    return [partial(step, width) for width in widths]


def _scale(model: SubModel) -> float:
    return model.extraction.config.head_scale


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring momentum into being, all zero, and change no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _find(model: nn.Module, fqn: str) -> Tensor:
    path, _, leaf = fqn.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _first_entries(wide: Tensor, shape: torch.Size) -> Tensor:
    """A view of the first entries along each dimension, so many as the shape says."""
    view = wide.detach()
    for dim, size in enumerate(shape):
        view = view.narrow(dim, 0, size)
    return view
