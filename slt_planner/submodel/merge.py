"""Trained sub-models go back into the global state: an average per element, over the clients that trained it."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from slt_planner.config import Config
from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Index
from slt_planner.submodel.extract import tensor_indices
from slt_planner.submodel.slices import add_at, shape_of, take

Update: TypeAlias = tuple[Config, Mapping[str, Tensor], int]
"""What a client trained: its configuration, its trained state by fqn, and on how many samples."""


def merge(graph: ModelGraph, state: Mapping[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
    """The new global state: for each element, global + sum(n_k * delta_k) / sum(n_k) over the clients that trained it.

    Updates are folded in the order they come, one at a time, so they may be a generator. Elements that nobody trained
    keep their value to the bit; neither `state` nor the updates are changed. Counters (integer buffers) are kept.

    Args:
        graph: the network's traced structure.
        state: the global state dict, full shapes.
        updates: (configuration, trained state, number of samples) of each client.

    Raises:
        InputError: an update names a tensor that its configuration does not train, has one of another shape, or comes
            with no samples.
    """
    total: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}
    trained: dict[Config, dict[str, Index]] = {}
    for config, part, samples in updates:
        if config not in trained:
            trained[config] = trained_indices(graph, config)
        check_update(part, trained[config], graph, samples)
        for name, value in part.items():
            if not value.is_floating_point():
                continue
            if name not in total:
                total[name] = torch.zeros_like(state[name])
                weight[name] = torch.zeros_like(state[name])
            index = trained[config][name]
            old = take(state[name], index)
            add_at(total[name], index, (value.detach().to(old) - old) * samples)
            add_at(weight[name], index, float(samples))
    # Where nobody trained, the sum is zero: dividing it by one instead of zero leaves the element as it is.
    merged = {
        name: old + total[name] / weight[name].clamp(min=1) if name in total else old for name, old in state.items()
    }
    return {name: merged[graph.first_name(name)] for name in state}


def trained_indices(graph: ModelGraph, config: Config) -> dict[str, Index]:
    """Which entries of each tensor (by fqn) a configuration trains: those outside its frozen units."""
    units = graph.unit_of_tensor()
    indices = tensor_indices(graph, config)
    return {name: index for name, index in indices.items() if units[name] > config.freeze_depth}


def check_update(part: Mapping[str, Tensor], trained: Mapping[str, Index], graph: ModelGraph, samples: int) -> None:
    """Whether trained tensors (by fqn) are among the `trained` ones, in their shapes, and come with samples.

    Raises:
        InputError: they are not.
    """
    if samples < 1:
        raise InputError(f"an update comes with {samples} samples; it must be at least 1")
    full = graph.skeleton.state_dict()
    for name, value in part.items():
        if name not in full:
            raise InputError(f"an update holds {name}, which the network does not have")
        if not value.is_floating_point():
            continue
        if name not in trained:
            raise InputError(f"an update holds {name}, which its configuration does not train")
        index = trained[name]
        expected = shape_of(index, full[name].shape)
        if tuple(value.shape) != expected:
            raise InputError(f"an update's {name} has shape {tuple(value.shape)}; it must be {expected}")
