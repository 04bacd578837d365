"""How much arithmetic a sub-model does, counted by torch.utils.flop_counter: convolutions and matrix products."""

import copy
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from slt_planner.submodel.extract import SubModel

_BATCH = 2


def forward_multiply_adds(model: SubModel) -> Counter[int]:
    """Multiply-adds of one sample's forward pass by unit (depth + 1 is the classifier); a multiply and its add are one.

    Nothing is computed, but for networks whose shapes depend on data.
    """
    shadow, batch, labels = _shadow(model)
    shadow.requires_grad_(False)
    counts: Counter[int] = Counter()
    unit = before = 0

    def enter(next_unit: int) -> None:
        nonlocal unit, before
        counts[unit] += counter.get_total_flops() - before
        unit, before = next_unit, counter.get_total_flops()

    with torch.no_grad(), FlopCounterMode(display=False) as counter, shadow.following_units(enter):
        model.extraction.graph.adapter.step_loss(shadow, batch, labels)
        enter(0)
    return Counter({unit: flops // 2 // _BATCH for unit, flops in counts.items()})


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
