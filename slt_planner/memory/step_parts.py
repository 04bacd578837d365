"""Parts of a training step, each simulated by itself: making the batch, one segment of the network, one update.

A part says what it calls and which storages it brings; a storage's life begins and ends at a `Moment`. What passes from
one segment to the next, and the gradient that comes back, belong to both: the one says when it comes, both say when
they let it go.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slt_planner.config import Config, StepSpec
from slt_planner.graph.segments import Segment
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Cut
from slt_planner.memory.attribution import Attribution
from slt_planner.memory.flops import step_costs
from slt_planner.memory.hollow import Hollow, TensorSpec, make_hollow
from slt_planner.memory.profile import StepCosts
from slt_planner.memory.saved import changes_in_place_refused, saving_seen
from slt_planner.memory.step import (
    add_gradients,
    as_trained,
    example_batch,
    lone_values_refused,
    make_optimizer,
    state_of,
)
from slt_planner.memory.storages import Column, Storages
from slt_planner.memory.watch import FOR_EVER, Call, Storage, Watch, values_refused
from slt_planner.submodel.extract import SubModel, extract_segment

FORWARD, BACKWARD, AFTER, BEFORE, MADE, NEVER = range(6)
"""The runs of a segment's calls: forward, backward, and after all of backward. Storages that it brings to the step are
there BEFORE it; gradients of the step before go when the batch is MADE; what outlives the step NEVER goes."""
Moment: TypeAlias = tuple[int, int]
"""A run, and before which of its calls."""


class NotByPartsError(Exception):
    """The step is not what its parts would make."""


@dataclass(frozen=True)
class Value:
    """What passes from one segment to the next."""

    spec: TensorSpec
    requires_grad: bool


@dataclass(frozen=True, eq=False)
class Lives:
    """Storages that a part brings, as they were `followed`; `begin` and `end` have two rows, runs and calls."""

    followed: Storages
    begin: Column
    end: Column

    @classmethod
    def of(cls, lives: Sequence[tuple[Storage, Moment, Moment]]) -> "Lives":
        """Storages from one moment to another."""
        return cls(
            Storages.of([own for own, _, _ in lives]),
            np.array([begin for _, begin, _ in lives], dtype=np.int64).reshape(-1, 2).T,
            np.array([end for _, _, end in lives], dtype=np.int64).reshape(-1, 2).T,
        )


@dataclass(frozen=True)
class Part:
    """Calls, by run, and the storages that they bring."""

    calls: tuple[tuple[Call, ...], ...]
    lives: Lives


@dataclass(frozen=True)
class Trained:
    """A parameter that an optimizer updates, and its gradient."""

    parameter: TensorSpec
    gradient: TensorSpec


@dataclass(frozen=True)
class SegmentPart(Part):
    """A segment in a step.

    `source_end` and `gradient_end` say when it lets go of its source and of its result's gradient, `source_saved`
    whether the source is saved for backward. `result_life` and `source_gradient_life` are the numbers of lives, None
    where the result is in the source's storage, or the source's gradient in that of the result's. `trained` goes with
    the segment's tensors, None for a frozen one or a buffer.
    """

    source_end: Moment
    source_saved: bool
    result: Value | None
    result_life: int | None
    gradient_end: Moment
    source_gradient: TensorSpec | None
    source_gradient_life: int | None
    trained: tuple[Trained | None, ...]
    costs: StepCosts
    flops: int


def batch_part(graph: ModelGraph, spec: StepSpec) -> tuple[Part, Value]:
    """Making the batch, and the images that come of it."""
    watch = Watch(Attribution(), details=False)
    with watch:
        watch.forget_calls()
        batch, labels = example_batch(spec, graph.adapter, graph.input_shape, graph.num_classes)
        watch.hold({"batch": [x for x in pytree.tree_leaves([batch, labels]) if isinstance(x, Tensor)]})
        images = Value(TensorSpec.of(batch), requires_grad=False)
    return Part((tuple(watch.calls),), Lives.of(_followed(watch, watch.storages))), images


def segment_part(
    graph: ModelGraph,
    segment: Segment,
    config: Config,
    cuts: Mapping[fx.Node, Cut],
    spec: StepSpec,
    source: Value,
    gradient: TensorSpec | None,
) -> SegmentPart:
    """One segment's forward and backward pass, given what arrives at its two ends.

    Raises:
        NotByPartsError: no gradient comes back from it though one is due.
    """
    module = as_trained(extract_segment(graph, segment, config, cuts, spec.norms), spec)
    costs = step_costs(module)
    make_hollow(module, torch.device("cpu"))
    return _SegmentRun(graph, module, spec, source, gradient).part(segment.tensors, segment.result is None, costs)


class _SegmentRun:
    def __init__(
        self, graph: ModelGraph, module: SubModel, spec: StepSpec, source: Value, gradient: TensorSpec | None
    ) -> None:
        self._graph, self._module, self._spec = graph, module, spec
        self.structure = graph.programs[True].structure
        self.source, self.gradient = source, gradient
        self.watch = Watch(Attribution(), details=False)
        self.given: Storage | None = None
        self.taken: Tensor | None = None
        self.loss: Tensor | None = None

    def part(self, names: Sequence[str], last: bool, costs: StepCosts) -> SegmentPart:
        module, watch = self._module, self.watch
        watch.hold({"weights": list(module.parameters()), "buffers": list(module.buffers())})
        with watch:
            batch, labels = example_batch(
                self._spec, self._graph.adapter, self._graph.input_shape, self._graph.num_classes
            )
            watch.forget_calls()
            box = [self._make_source()]
            arrives = watch.follow(box[0])
            with (
                saving_seen(watch.say_saved),
                values_refused(),
                lone_values_refused(f"batch {self._spec.batch_size}"),
                changes_in_place_refused(),
            ):
                if last:
                    self.loss = self._run_to_loss(box, batch, labels)  # which is there until the step is over
                    result, came = None, None
                else:
                    result, came = self._run_to_result(box)
            self.all_done()
            parameters = dict(module.named_parameters())
            if any(p.requires_grad and p.grad is None for p in parameters.values()):
                raise NotByPartsError
            watch.hold({"gradients": [p.grad for p in parameters.values() if p.grad is not None]})
            own = [one for one in watch.storages if one.begin >= 0 and one is not arrives and one is not self.given]
            numbers = {id(storage): number for number, storage in enumerate(own)}
            taken = None if self.taken is None else watch.follow(self.taken)
            return SegmentPart(
                calls=_runs(watch),
                lives=Lives.of([*_followed(watch, own), *self._residents()]),
                source_end=_moment(watch, arrives.end),
                source_saved=arrives.saved_by is not None,
                result=result,
                result_life=None if came is None else numbers.get(id(came)),
                gradient_end=(NEVER, 0) if self.given is None else _moment(watch, self.given.end),
                source_gradient=None if self.taken is None else TensorSpec.of(self.taken),
                source_gradient_life=None if taken is None else numbers.get(id(taken)),
                trained=tuple(_trained(parameters.get(name)) for name in names),
                costs=costs,
                flops=watch.flops,
            )

    def _residents(self) -> list[tuple[Storage, Moment, Moment]]:
        """Weights and buffers stay; a gradient that is there from the step before goes soon, and weighs as the new."""
        held = (self._module.parameters(), self._module.buffers())
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        stay = [self.watch.follow(tensor) for tensors in held for tensor in tensors]
        return [
            *[(own, (BEFORE, 0), (NEVER, 0)) for own in stay],
            *[(self.watch.follow(own), (BEFORE, 0), (MADE, 0)) for own in gradients],
        ]

    def all_done(self) -> None:
        """The segment's backward pass is over; that of the last one follows its forward pass at once."""
        while len(self.watch.parts) < AFTER:
            self.watch.begin_part()

    def _make_source(self) -> Tensor:
        if not self.source.requires_grad:
            return Hollow.of(self.source.spec)
        began: Tensor = _Begin.apply(_scalar(requires_grad=True), self)
        return began

    def run(self, box: list[Tensor]) -> tuple[Any, ...]:
        """The segment's forward pass; takes its source out of the box."""
        (function,) = self._module.passes(True)
        return function(self._module, box)

    def _run_to_result(self, box: list[Tensor]) -> tuple[Value, Storage]:
        (result,) = self.run(box)
        value, came = Value(TensorSpec.of(result), result.requires_grad), self.watch.follow(result)
        if not value.requires_grad:
            return value, came
        self.gradient = self.gradient or value.spec
        end: Tensor = _End.apply(result, self)
        del result
        self.watch.begin_part()
        end.backward(gradient=_scalar(requires_grad=False))
        return value, came

    def _run_to_loss(self, box: list[Tensor], batch: Tensor, labels: Any) -> Tensor:
        return add_gradients(_Network(self, box), batch, labels, self._spec, self._graph.adapter)


class _Network(nn.Module):
    """Stands for the network before its adapter; all but the last segment has run already."""

    def __init__(self, run: _SegmentRun, box: list[Tensor]) -> None:
        super().__init__()
        self._run, self._box = run, box

    def forward(self, *_: Tensor) -> Any:
        """The network's outputs."""
        return pytree.tree_unflatten(list(self._run.run(self._box)), self._run.structure)


def _scalar(requires_grad: bool) -> Tensor:
    scalar = Hollow.of(TensorSpec((), (), torch.float32, torch.device("cpu")))
    return scalar.requires_grad_(requires_grad)


class _Begin(torch.autograd.Function):
    """Gives a segment's source, as if a segment before had made it, and takes the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, run: _SegmentRun) -> Tensor:
        ctx.run = run
        ctx.set_materialize_grads(False)
        return Hollow.of(run.source.spec)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        if gradient is None:
            raise NotByPartsError
        ctx.run.taken = gradient
        ctx.run.all_done()
        return None, None


class _End(torch.autograd.Function):
    """Takes a segment's result, and gives its gradient, as if a segment behind had made it."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, run: _SegmentRun) -> Tensor:
        ctx.run = run
        return _scalar(requires_grad=False)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        gradient = Hollow.of(ctx.run.gradient)
        ctx.run.given = ctx.run.watch.follow(gradient)
        return gradient, None


def update_part(spec: StepSpec, trained: Trained, last: bool) -> Part:
    """The update of one parameter in the optimizer's loop.

    What lives on into the next one ends in run 1, which has no calls here. After the last there is none.

    Raises:
        NotByPartsError: the optimizer does not go through its parameters one by one.
    """
    attribution = Attribution()
    watch = Watch(attribution, details=False)
    parameters = [_parameter(trained.parameter) for _ in range(2)]
    optimizer = make_optimizer(parameters, spec.optimizer, learning_rate=0.0)
    with watch:
        for parameter in parameters:
            parameter.grad = Hollow.of(trained.gradient)
        optimizer.step()
        watch.hold({"optimizer": [own for parameter in parameters for own in state_of(optimizer, parameter)]})
        watch.forget_calls()
        attribution.begin(nn.Module(), optimizer)
        optimizer.step()
        state = [watch.follow(own) for own in state_of(optimizer, parameters[0])]
    half, rest = divmod(len(watch.calls), 2)
    first, second = watch.calls[:half], watch.calls[half:]
    if rest or [call.operator.signature for call in first] != [call.operator.signature for call in second]:
        raise NotByPartsError
    begin = half if last else 0
    return Part(
        (tuple(first), ()),
        Lives.of(
            [
                *[(own, (BEFORE, 0), (NEVER, 0)) for own in state],
                *[
                    (own, (0, own.begin - begin), _in_loop(own.end, begin, half))
                    for own in watch.storages
                    if begin <= own.begin < begin + half
                ],
            ]
        ),
    )


def _parameter(spec: TensorSpec) -> Any:
    parameter = Hollow.of(spec).requires_grad_(True)
    parameter._is_param = True
    return parameter


def _trained(parameter: Tensor | None) -> Trained | None:
    if parameter is None or parameter.grad is None:
        return None
    return Trained(TensorSpec.of(parameter), TensorSpec.of(parameter.grad))


def _in_loop(end: int, begin: int, length: int) -> Moment:
    if end == FOR_EVER:
        return NEVER, 0
    return divmod(end - begin, length) if end - begin < 2 * length else (1, length)


def _runs(watch: Watch) -> tuple[tuple[Call, ...], ...]:
    """The calls of each part that the watch was told of."""
    begins = [0, *[part - number - 1 for number, part in enumerate(watch.parts)]]
    return tuple(tuple(watch.calls[begin:end]) for begin, end in zip(begins, [*begins[1:], None], strict=True))


def _followed(watch: Watch, storages: Sequence[Storage]) -> list[tuple[Storage, Moment, Moment]]:
    return [(own, _moment(watch, own.begin), _moment(watch, own.end)) for own in storages]


def _moment(watch: Watch, now: int) -> Moment:
    if now == FOR_EVER:
        return NEVER, 0
    run = bisect_right(watch.parts, now)
    return run, now - (watch.parts[run - 1] if run else 0)
