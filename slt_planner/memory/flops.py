"""How much arithmetic a sub-model does, counted by torch.utils.flop_counter: convolutions and matrix products."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from slt_planner.submodel.extract import SubModel

_BATCH = 2


def training_flops(model: SubModel) -> int:
    """FLOPs of one sample's forward and backward pass; a multiply and its add are two.

    Frozen parts before the first trained one run forward only. Nothing is computed, but for networks whose shapes
    depend on data.
    """
    shadow, batch, labels = _shadow(model)
    with FlopCounterMode(display=False) as counter:
        model.extraction.graph.adapter.step_loss(shadow, batch, labels).backward()
    return counter.get_total_flops() // _BATCH


def _shadow(model: SubModel) -> tuple[SubModel, torch.Tensor, torch.Tensor]:
    """A copy of a sub-model, a batch and its labels, all without values."""
    graph = model.extraction.graph
    device = "cpu" if graph.adapter.part else "meta"
    with torch.device(device):
        batch = torch.zeros(_BATCH, *graph.input_shape)
        labels = graph.adapter.example_labels(_BATCH, graph.num_classes, graph.input_shape)
    return copy.deepcopy(model).to(device), batch, labels
