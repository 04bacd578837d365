"""Clients that train alike, all at once: their weights are stacked, and each step is one of all of them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase

from slt_planner.data.datasets import Dataset
from slt_planner.federated.client import LocalTraining, local_batches
from slt_planner.graph.adapter import Adapter
from slt_planner.memory.step import make_optimizer
from slt_planner.submodel.extract import SubModel


def can_be_stacked(model: SubModel, training: LocalTraining) -> bool:
    """Whether stacked clients train as one alone does.

    Not where batches train one of several widths, run in pieces or under autocast, where the network draws random
    numbers, has a loss of its own (what that does is not known) or norms whose running statistics torch.func cannot
    batch.
    """
    step, adapter = training.step, type(model.extraction.graph.adapter)
    plain = not training.widths and not training.enforce and step.micro_batch is None and step.precision == "fp32"
    usual_loss = (adapter.loss, adapter.step_loss) == (Adapter.loss, Adapter.step_loss)
    return plain and usual_loss and model.is_batchable()


@contextmanager
def _attention_one_by_one() -> Iterator[None]:
    """Without torch's word that fused attention on a CPU has no batching rule, so that it is run client by client.

    It is as well so: its parts have rules, but keep all scores and, with many positions, take longer.
    """
    with warnings.catch_warnings():
        attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
        warnings.filterwarnings(
            "ignore", f"There is a performance drop .* the batching rule for {attention}", UserWarning
        )
        yield


@_attention_one_by_one()
def train_stacked(
    model: SubModel, dataset: Dataset, clients: Sequence[np.ndarray], training: LocalTraining, seeds: Sequence[int]
) -> list[tuple[dict[str, Tensor], float]]:
    """What `train_client` makes of each client, up to the order of sums: what it trained by fqn, and its mean loss.

    Args:
        model: what each of them gets; it stays as it is.
        dataset: the images.
        clients: each one's training images, as many for all.
        training: how all of them train; levers are not used.
        seeds: each one's own.
    """
    model.train()
    own = {name: nn.Parameter(_times(value, len(clients))) for name, value in _trained(model).items()}
    statistics = {name: _times(value, len(clients)) for name, value in _moving_statistics(model).items()}
    optimizer = make_optimizer(own.values(), training.step.optimizer, training.learning_rate)
    adapter = model.extraction.graph.adapter

    def loss_of(tensors: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return adapter.loss(functional_call(model, dict(tensors), adapter.inputs(images)), labels)

    batches = [
        local_batches(dataset, indices, training, torch.Generator().manual_seed(seed))
        for indices, seed in zip(clients, seeds, strict=True)
    ]
    total, images = torch.zeros(len(clients), device=training.step.device), 0
    for step in zip(*batches, strict=True):
        stacked, labels = map(torch.stack, zip(*step, strict=True))
        optimizer.zero_grad(set_to_none=True)
        losses = vmap(loss_of)({**own, **statistics}, stacked, labels)
        losses.sum().backward()  # no client's loss depends on another's weights: each gets its own gradient
        optimizer.step()
        total += losses.detach() * stacked.shape[1]
        images += stacked.shape[1]
    stacks = {**own, **statistics}
    return [
        (
            {n: stacks[n].detach()[place] if n in stacks else value for n, value in model.trained_state().items()},
            float(total[place]) / images,
        )
        for place in range(len(clients))
    ]


def _times(value: Tensor, count: int) -> Tensor:
    return value.detach().expand(count, *value.shape).clone(memory_format=torch.contiguous_format)


def _trained(model: SubModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _moving_statistics(model: SubModel) -> dict[str, Tensor]:
    """The running statistics of norms that are trained."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _NormBase) and m.training}
    return {f"{name}.{leaf}": value for name, norm in norms.items() for leaf, value in norm.named_buffers()}
