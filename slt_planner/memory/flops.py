"""How much arithmetic: forward multiply-adds (fvcore) and training FLOPs (torch.utils.flop_counter)."""

import copy
import logging
import warnings

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from slt_planner.submodel.extract import SubModel


def forward_multiply_adds(model: SubModel) -> dict[str, int]:
    """Multiply-adds of one sample's forward pass by module fqn, as fvcore counts (a multiply and its add are one)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's own deprecation, which fvcore cannot avoid
        from fvcore.nn import FlopCountAnalysis  # slow to import, and only reports need it

        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
        sample = torch.zeros(2, *model.extraction.graph.input_shape)
        counter = FlopCountAnalysis(copy.deepcopy(model), sample)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return {fqn: int(count) // 2 for fqn, count in counter.by_module().items()}


def training_flops(model: SubModel) -> int:
    """FLOPs of one sample's forward and backward pass (a multiply and its add are two); nothing is computed.

    Frozen parts before the first trained one run forward only. Convolutions and matrix products are counted.
    """
    shadow = copy.deepcopy(model).to("meta")
    batch = torch.empty(2, *model.extraction.graph.input_shape, device="meta")
    labels = torch.empty(2, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(shadow(batch), labels).backward()
    return counter.get_total_flops() // 2
