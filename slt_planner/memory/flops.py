"""What a step costs beside memory: bytes that travel, and arithmetic.

Arithmetic is counted by torch.utils.flop_counter: convolutions and matrix products.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry, sdpa_flop_count, shape_wrapper

from slt_planner.memory.profile import StepCosts
from slt_planner.submodel.extract import SubModel

_BATCH = 2


def _convolution_backward(
    gradient: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of input and weight each take what the forward pass takes; torch's own count forgets groups."""
    return conv_flop_count(list(x), list(weight), list(gradient), transposed) * sum(wanted[:2])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The gradients of both matrix products; what a fused kernel computes again is not counted."""
    return 2 * sdpa_flop_count(query, key, value)


_OWN: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch 2.6 has none
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
_COUNTS: Mapping[Any, Callable[..., int]] = {**flop_registry, **{op: shape_wrapper(own) for op, own in _OWN.items()}}


def operator_flops(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> int:
    """FLOPs of one call of an ATen operator; a multiply and its add are two."""
    count = _COUNTS.get(getattr(function, "_overloadpacket", None))
    return count(*args, **kwargs, out_val=outputs) if count else 0


def step_costs(model: SubModel, train_flops_per_sample: int = 0) -> StepCosts:
    """What a client that trains a sub-model receives and sends; the arithmetic is counted elsewhere."""
    return StepCosts(
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        upload_bytes=sum(tensor.nbytes for tensor in model.trained_state().values()),
        download_bytes=sum(tensor.nbytes for tensor in model.held_state().values()),
        train_flops_per_sample=train_flops_per_sample,
    )


def training_flops(model: SubModel) -> int:
    """FLOPs of one sample's forward and backward pass; a multiply and its add are two.

    Frozen parts before the first trained one run forward only. Nothing is computed, but for networks whose shapes
    depend on data.
    """
    graph = model.extraction.graph
    device = "cpu" if graph.adapter.part else "meta"
    shadow = copy.deepcopy(model).to(device)
    kind = next((p.dtype for p in shadow.parameters()), torch.float32)
    with torch.device(device):
        batch = torch.zeros(_BATCH, *graph.input_shape, dtype=kind)
        labels = graph.adapter.example_labels(_BATCH, graph.num_classes, graph.input_shape)
    with FlopCounterMode(display=False, custom_mapping=_OWN) as counter:
        graph.adapter.step_loss(shadow, batch, labels).backward()
    return counter.get_total_flops() // _BATCH
