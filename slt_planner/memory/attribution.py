"""Which freeze unit each operator of a training step belongs to, and how much arithmetic each unit does."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from slt_planner.memory.flops import operator_flops
from slt_planner.memory.operators import tensors_in
from slt_planner.memory.profile import UnitRow
from slt_planner.memory.step import SteadyStep, state_of
from slt_planner.submodel.extract import SubModel

_FIRST_ACCUMULATION = 2**62  # sequence numbers of nodes that add up gradients are larger than any other's


class Attribution:
    """Follows training steps of a sub-model operator by operator; of any other module all is in unit 0.

    It does not hold the module: what a forward pass calls must not hold the network.
    """

    def __init__(self) -> None:
        self.forward_flops: Counter[int] = Counter()
        self.flops: Counter[int] = Counter()
        self._unit = 0
        self._enters: list[tuple[int, int]] = [(0, 0)]  # from this autograd sequence number on: this unit
        self._unit_of: dict[int, int] = {}
        self._in_optimizer = False
        self._updating = False
        self._by_parameters = False

    def begin(
        self, module: nn.Module, optimizer: torch.optim.Optimizer | None, by_parameters: bool = False
    ) -> list[RemovableHandle]:
        """The steps that follow are those of this module and optimizer, whose state must be there.

        With `by_parameters` a unit is entered with the first operator that takes one of its parameters; otherwise when
        a forward pass says so (`following`). Gives the handle of a hook on the optimizer.
        """
        self._by_parameters = by_parameters
        if isinstance(module, SubModel):
            units = module.extraction.graph.unit_of_tensor()
            for name, parameter in module.named_parameters():
                for tensor in (parameter, *state_of(optimizer, parameter)):
                    self._unit_of[id(tensor)] = units[name]
        if optimizer is None:
            return []
        return [
            optimizer.register_step_pre_hook(self._begin_update),
            optimizer.register_step_post_hook(self._end_update),
        ]

    @property
    def unit(self) -> int:
        """The unit that the step is in."""
        return self._unit

    @property
    def in_optimizer(self) -> bool:
        """The optimizer's part of the step has begun."""
        return self._in_optimizer

    @property
    def updating(self) -> bool:
        """The optimizer is at work, in its own part of the step or in the backward pass."""
        return self._updating

    def following(self, module: nn.Module) -> AbstractContextManager[None]:
        """While this lasts, forward passes of the module are followed from unit to unit."""
        return module.following_units(self._enter) if isinstance(module, SubModel) else nullcontext()

    def operator(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """The unit of an operator that is about to be called."""
        node = torch._C._current_autograd_node()
        if node is not None:
            self._unit = self._backward_unit(node)
        elif self._in_optimizer or self._by_parameters:
            own = {self._unit_of[id(t)] for t in tensors_in(args, kwargs) if id(t) in self._unit_of}
            if own:
                unit = own.pop() if len(own) == 1 else 0
                if self._in_optimizer:
                    self._unit = unit
                elif unit != self._unit:
                    # The operator's own node is there already, if it has one.
                    self._enter(unit, own_node=any(t.requires_grad for t in tensors_in(args, kwargs)))
        return self._unit

    def called(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> None:
        """Count the arithmetic of an operator that was called."""
        flops = operator_flops(function, args, kwargs, outputs)
        if flops:
            self.flops[self._unit] += flops
            if torch._C._current_autograd_node() is None:
                self.forward_flops[self._unit] += flops

    def _enter(self, unit: int, own_node: bool = False) -> None:
        if self._in_optimizer:  # the next step has begun
            self._in_optimizer = False
            self._enters = [(0, 0)]
        self._unit = unit
        self._enters.append((torch.autograd._get_sequence_nr() - own_node, unit))

    def _backward_unit(self, node: Any) -> int:
        number = node._sequence_nr()
        if number >= _FIRST_ACCUMULATION:
            return self._unit_of.get(id(node.variable), self._unit)
        return self._enters[bisect_right(self._enters, number, key=lambda entry: entry[0]) - 1][1]

    def _begin_update(self, *_: Any) -> None:
        self._updating = True
        self._in_optimizer = torch._C._current_autograd_node() is None

    def _end_update(self, *_: Any) -> None:
        self._updating = False


def unit_rows(
    step: SteadyStep, attribution: Attribution, activations: Mapping[int, int], batch_size: int
) -> tuple[UnitRow, ...]:
    """A row a freeze unit and one for the classifier; `activations` are bytes by the unit that saved them first."""
    if not isinstance(step.module, SubModel):
        return ()
    graph = step.module.extraction.graph
    unit_of = graph.unit_of_tensor()
    parameters: dict[int, list[nn.Parameter]] = {}
    for name, parameter in step.module.named_parameters():
        parameters.setdefault(unit_of[name], []).append(parameter)
    names = {unit.index: (unit.name, unit.kind, unit.output_shape) for unit in graph.units}
    names[graph.depth + 1] = ("classifier", "classifier", (graph.num_classes,))
    rows = []
    for index, (name, kind, output_shape) in names.items():
        own = parameters.get(index, [])
        rows.append(
            UnitRow(
                index=index,
                name=name,
                kind=kind,
                output_shape=output_shape,
                parameters=sum(p.numel() for p in own),
                weights_bytes=storage_bytes(own),
                activations_bytes=activations.get(index, 0),
                gradients_bytes=storage_bytes([p.grad for p in own if p.grad is not None]),
                optimizer_bytes=storage_bytes([tensor for p in own for tensor in state_of(step.optimizer, p)]),
                forward_multiply_adds=attribution.forward_flops[index] // 2 // batch_size,
                training_flops=attribution.flops[index] // batch_size,
            )
        )
    return tuple(rows)


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each once however many views it has."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
