"""Training steps put together from their parts, each of which is simulated once: deep networks are made of few.

What comes of it is the step that `simulate` makes of the whole network, call by call and storage by storage.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from torch import fx

from slt_planner.config import Config, StepSpec
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.segments import Segment, segments
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Cut
from slt_planner.memory import known
from slt_planner.memory.hollow import TensorSpec
from slt_planner.memory.profile import StepCosts
from slt_planner.memory.simulate import SimulatedStep
from slt_planner.memory.step_parts import (
    AFTER,
    BACKWARD,
    BEFORE,
    FORWARD,
    MADE,
    NEVER,
    Moment,
    NotByPartsError,
    Part,
    SegmentPart,
    Trained,
    Value,
    batch_part,
    segment_part,
    update_part,
)
from slt_planner.memory.storages import ACTIVATIONS, TEMPORARIES, Column, Storages
from slt_planner.memory.watch import FOR_EVER, Call
from slt_planner.submodel.extract import extract

_Key: TypeAlias = Hashable
_FEWEST = 4
"""Segments: a network of fewer is not worth taking apart."""


class Composer:
    """Puts steps of one network together. It cannot for all of them (`step` gives None): those whose parts depend on
    each other beyond what passes between neighbours, because of levers, micro-batches, autocast, an adapter or
    optimizer that does more than the usual, or a network that is no chain.
    """

    def __init__(self, graph: ModelGraph, spec: StepSpec) -> None:
        self._graph, self._spec = graph, spec
        self._segments = segments(graph) if _is_plain(graph, spec) else ()
        if len(self._segments) < _FEWEST:
            self._segments = ()
        self._layouts = 0  # how many were known when the parts were simulated
        self._known: dict[_Key, SegmentPart] = {}
        self._updates: dict[tuple[Trained, bool], Part] = {}
        self._batch: tuple[Part, Value] | None = None
        self._order: dict[str, int] = {}

    def step(self, config: Config) -> SimulatedStep | None:
        """A steady step of a configuration; None where it cannot be put together.

        Raises:
            UnsupportedLayerError: what the step does depends on values, so that it must be measured.
            InputError: the configuration goes beyond the network's units.
        """
        if not self._segments or config.channels != "first":
            return None
        if self._layouts != (now := len(known.layouts(self._spec.device))):
            self._layouts, self._batch = now, None
            self._known.clear()
            self._updates.clear()
        try:
            self._batch = self._batch or batch_part(self._graph, self._spec)
            chain = self._chain(config, self._graph.cuts(config))
            return _Assembly(self._spec, self._batch[0], chain, self._ordered_updates(chain)).step()
        except NotByPartsError:
            self._segments = ()
            return None

    def _chain(self, config: Config, cuts: Mapping[fx.Node, Cut]) -> list[SegmentPart]:
        """Every segment as it is in this step, from what arrives from before and then from behind."""
        assert self._batch is not None
        chain: list[SegmentPart] = []
        keys: list[_Key] = []
        value = self._batch[1]
        for segment in self._segments:
            keys.append((segment.structure, segment.frozen(config.freeze_depth), segment.widths(cuts), value))
            part = self._part(keys[-1], segment, config, cuts, value, None)
            chain.append(part)
            value = part.result or value
        gradient = chain[-1].source_gradient
        for number in range(len(chain) - 2, -1, -1):
            if gradient is None:
                break
            source = self._batch[1] if number == 0 else chain[number - 1].result
            assert source is not None
            chain[number] = self._part(keys[number], self._segments[number], config, cuts, source, gradient)
            gradient = chain[number].source_gradient
        return chain

    def _part(
        self,
        key: _Key,
        segment: Segment,
        config: Config,
        cuts: Mapping[fx.Node, Cut],
        source: Value,
        gradient: TensorSpec | None,
    ) -> SegmentPart:
        part = self._known.get((key, gradient))
        if part is None:
            part = segment_part(self._graph, segment, config, cuts, self._spec, source, gradient)
            self._known[key, gradient] = part
            if gradient is None and part.result is not None:  # it was taken to be laid out as the result is
                self._known[key, part.result.spec] = part
        return part

    def _ordered_updates(self, chain: Sequence[SegmentPart]) -> list[Part]:
        """The optimizer's updates, in its order: that of the sub-model's parameters."""
        if not self._order:
            whole = extract(self._graph, None, Config.full_network(), self._spec.norms, on_meta=True)
            self._order = {name: number for number, (name, _) in enumerate(whole.named_parameters())}
        named = {
            name: trained
            for segment, part in zip(self._segments, chain, strict=True)
            for name, trained in zip(segment.tensors, part.trained, strict=True)
            if trained is not None
        }
        names = sorted(named, key=self._order.__getitem__)
        return [self._update(named[name], last=name == names[-1]) for name in names]

    def _update(self, trained: Trained, last: bool) -> Part:
        if (trained, last) not in self._updates:
            self._updates[trained, last] = update_part(self._spec, trained, last)
        return self._updates[trained, last]


def _is_plain(graph: ModelGraph, spec: StepSpec) -> bool:
    kind = type(graph.adapter)
    usual = all(getattr(kind, name) is getattr(Adapter, name) for name in ("inputs", "step_loss", "part"))
    in_one_go = spec.micro_batch is None and not spec.levers and spec.precision != "autocast" and spec.set_to_none
    return usual and in_one_go and spec.device == "cpu" and not spec.optimizer.foreach


class _Assembly:
    """Parts laid one behind the other: the batch, forward through the chain, back through it, the updates."""

    def __init__(self, spec: StepSpec, batch: Part, chain: Sequence[SegmentPart], updates: Sequence[Part]) -> None:
        self._spec, self._batch, self._chain, self._updates = spec, batch, chain, updates
        self._calls: list[Call] = []

    def step(self) -> SimulatedStep:
        parts = (self._batch, *self._chain, *self._updates)
        begun = self._lay()
        lives = [part.lives for part in parts]
        storages = Storages(
            size=np.concatenate([own.followed.size for own in lives]),
            begin=np.concatenate([at[own.begin[0]] + own.begin[1] for own, at in zip(lives, begun, strict=True)]),
            end=np.concatenate([at[own.end[0]] + own.end[1] for own, at in zip(lives, begun, strict=True)]),
            category=np.concatenate([own.followed.category for own in lives]),
            is_number=np.concatenate([own.followed.is_number for own in lives]),
        )
        # Of the part behind, so of the chain's own number.
        first = np.cumsum([len(part.lives.followed.size) for part in parts])
        self._join(storages, begun[1 : len(self._chain) + 1], first)
        return SimulatedStep(self._calls, storages, self._costs())

    def _lay(self) -> list[Column]:
        """Put the calls in order; gives for each part at which of them its runs begin."""
        self._calls += self._batch.calls[0]
        begun = np.zeros((len(self._chain), NEVER + 1), dtype=np.int64)
        begun[:, [BEFORE, MADE, NEVER]] = -1, len(self._calls), FOR_EVER
        for run in (FORWARD, BACKWARD, AFTER):
            numbers = range(len(self._chain))
            for number in numbers if run == FORWARD else reversed(numbers):
                begun[number, run] = len(self._calls)
                self._calls += self._chain[number].calls[run]
        updates = np.zeros((len(self._updates), NEVER + 1), dtype=np.int64)
        updates[:, [BEFORE, NEVER]] = -1, FOR_EVER
        for number, update in enumerate(self._updates):
            updates[number, 0] = len(self._calls)
            self._calls += update.calls[0]
            updates[number, 1] = len(self._calls)
        return [np.array([0, 0, 0, -1, 0, FOR_EVER]), *begun, *updates]

    def _join(self, storages: Storages, begun: Sequence[Column], first: Column) -> None:
        """What two segments hold goes when both have let it go, and is saved if one of them saves it."""

        def until(passed: int, moment: Moment, own: Column) -> None:
            storages.end[passed] = max(storages.end[passed], own[moment[0]] + moment[1])

        passed: int | None = None  # None for the batch, which stays
        for part, own, begin in zip(self._chain, begun, first, strict=False):
            if passed is not None:
                until(passed, part.source_end, own)
                if part.source_saved and storages.category[passed] == TEMPORARIES:
                    storages.category[passed] = ACTIVATIONS
            if part.result_life is not None:
                passed = int(begin) + part.result_life
        passed = None
        for part, own, begin in reversed(list(zip(self._chain, begun, first, strict=False))):
            if passed is not None:
                until(passed, part.gradient_end, own)
            if part.source_gradient is None:
                break
            if part.source_gradient_life is not None:
                passed = int(begin) + part.source_gradient_life
                if storages.category[passed] in (TEMPORARIES, ACTIVATIONS):  # else a parameter keeps it, too
                    storages.end[passed] = storages.begin[passed]

    def _costs(self) -> StepCosts:
        costs = [part.costs for part in self._chain]
        return StepCosts(
            trainable_parameters=sum(own.trainable_parameters for own in costs),
            upload_bytes=sum(own.upload_bytes for own in costs),
            download_bytes=sum(own.download_bytes for own in costs),
            train_flops_per_sample=sum(part.flops for part in self._chain) // self._spec.batch_size,
        )
