"""Whether a cheaper lever than SLT would do: the whole network measured with each, and what that costs in time."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product

import torch

from slt_planner.config import Optimizer, StepSpec, Tier
from slt_planner.environment import environment
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import threads
from slt_planner.planning.lever_bench import (
    LeverBench,
    Levers,
    changes_of,
    levers_of,
    micro_batch_sizes,
    micro_batches,
)
from slt_planner.planning.levers import CHANGES, Alternative, TierAnswer, WhatIf, joined, severity
from slt_planner.units import LARGEST_BYTES, format_bytes


def what_if(
    graph: ModelGraph,
    spec: StepSpec,
    tiers: Sequence[Tier],
    progress: Callable[[str], None] = lambda doing: None,
) -> WhatIf:
    """Measure the whole network, plain and with every lever: peak memory, and the time of a step on this machine.

    Levers are micro-batches (the largest that fit each budget), number formats, channels_last, leaner optimizers. Where
    no single one is enough for a tier, combinations are tried. An answer changes the mathematics least: the levers that
    change nothing come first, then other batch statistics, number formats, optimizers; of equals, fewer levers, and
    then the fastest.

    Args:
        graph: the traced network.
        spec: the plain step.
        tiers: the budgets.
        progress: told in words what is measured next.

    Raises:
        InputError: the plain step cannot be run (no such device, batch norm over one value).

    >>> from slt_planner.config import equal_tiers
    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> graph = trace(load_model("convnet"), (3, 32, 32))
    >>> what_if(graph, StepSpec(batch_size=2), equal_tiers("1GB")).tiers[0].alternative
    0
    """
    with threads(spec) as number, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec = spec.model_copy(update={"threads": number})
        table = _Table(LeverBench(graph, spec, progress))
        ordered = sorted(tiers, key=lambda tier: tier.budget_bytes)
        found = [table.answer(tier.budget_bytes) for tier in ordered]
    rows = sorted(table.alternatives, key=lambda row: (len(row.levers), severity(row.changes)))
    answers = tuple(
        TierAnswer(
            tier=tier.name,
            budget_bytes=tier.budget_bytes,
            alternative=None if best is None else rows.index(best),
            answer=words,
        )
        for tier, (best, words) in zip(ordered, found, strict=True)
    )
    return WhatIf(spec=spec, environment=environment(number), alternatives=tuple(rows), tiers=answers)


class _Table:
    """The alternatives that are shown, and each tier's answer among them."""

    def __init__(self, bench: LeverBench) -> None:
        self._bench = bench
        self._sizes = micro_batch_sizes(bench.graph, bench.spec)
        self._plain = bench.alternative(())
        self.alternatives = [self._plain]
        groups = levers_of(bench.graph, bench.spec)
        taken = [tuple(lever for lever in group if not self._show((lever,)).refused) for group in groups]
        self._combinations = list(self._combined(taken))

    def answer(self, budget: int) -> tuple[Alternative | None, str]:
        """How the whole network could be trained within a budget, if at all; and that in words."""
        best = self._plain if self._plain.fits(budget) else self._single(budget) or self._several(budget)
        return best, self._not_enough(budget) if best is None else _enough(best)

    def _show(self, levers: Levers) -> Alternative:
        alternative = self._bench.alternative(levers)
        if alternative not in self.alternatives:
            self.alternatives.append(alternative)
        return alternative

    def _in_pieces(self, levers: Levers) -> list[Levers]:
        """The levers with micro-batches of every size, largest first."""
        return [(*levers, micro_batches(self._bench.graph, size)) for size in self._sizes]

    def _combined(self, groups: Sequence[Levers]) -> Iterator[list[Levers]]:
        """Every choice of levers, without and with micro-batches: what it can be, in order of falling peaks."""
        for chosen in product(*[((), *((lever,) for lever in group)) for group in groups]):
            levers = tuple(lever for own in chosen for lever in own)
            yield [levers]
            if self._sizes:
                yield self._in_pieces(levers)

    def _largest(self, ways: Sequence[Levers], budget: int) -> Levers | None:
        """The first that fits: those whose tensors alone are over the budget are passed by, the others measured.

        Tensors are taken to become less from one way to the next; peaks, which hold kernels' scratch memory, are not.
        """
        first = bisect_left(ways, True, key=lambda levers: self._bench.bound(levers) <= budget)
        return next((levers for levers in ways[first:] if self._peak(levers) <= budget), None)

    def _leanest(self) -> Levers:
        """The levers with the smallest peak; what cannot be the smallest by its tensors is not measured."""
        least: Levers = ()
        for ways in sorted(self._combinations, key=lambda ways: self._bench.bound(ways[-1])):
            for levers in reversed(ways):
                if self._bench.bound(levers) >= self._peak(least):
                    break
                least = min(least, levers, key=self._peak)
        return least

    def _peak(self, levers: Levers) -> int:
        """As measured; of what cannot be run, more than there is."""
        peak = self._bench.peak(levers)
        return peak if isinstance(peak, int) else LARGEST_BYTES + 1

    def _single(self, budget: int) -> Alternative | None:
        """The mildest single lever that is enough."""
        if self._sizes:
            pieces = self._in_pieces(())
            self._show(self._largest(pieces, budget) or pieces[-1])
        enough = [row for row in self.alternatives if len(row.levers) == 1 and row.fits(budget)]
        return min(enough, key=lambda row: (severity(row.changes), row.relative_time), default=None)

    def _several(self, budget: int) -> Alternative | None:
        """The mildest combination that is enough; of those that change as little, with as few levers, the fastest."""

        def cost(ways: list[Levers]) -> tuple[tuple[bool, ...], int]:
            return severity(changes_of(ways[0])), len(ways[0])

        several = [ways for ways in self._combinations if len(ways[0]) > 1]
        for _, alike in groupby(sorted(several, key=cost), key=cost):
            fitting = [levers for ways in alike if (levers := self._largest(ways, budget))]
            if fitting:
                return self._show(min(fitting, key=lambda levers: self._bench.alternative(levers).relative_time or 0))
        return None

    def _not_enough(self, budget: int) -> str:
        """Why a budget is too small for the whole network: what is always there, and the least that it needs."""
        least = self._show(self._leanest())
        still = f"with {least.words} it is still {format_bytes(least.peak_bytes or 0, round_up=True)}"
        resident = self._bench.plain_profile.resident or {}
        standing = sum(resident.get(kind, 0) for kind in ("weights", "buffers", "gradients", "optimizer"))
        if standing <= budget:
            return f"no lever is enough: {still}"
        names = _standing(self._bench.spec.optimizer)
        return f"no lever is enough: {names} alone need {format_bytes(standing, round_up=True)}; {still}"


def _enough(row: Alternative) -> str:
    needed = format_bytes(row.peak_bytes or 0)
    if not row.levers:
        return f"SLT is not needed: the whole network trains as it is, in {needed}"
    found = f"with {row.words} the whole network trains in {needed}, at {row.relative_time:.2f} times the step time"
    if row.exact:
        return f"SLT is not needed: {found}"
    return f"SLT may not be needed: {found}, but {joined(CHANGES[change] for change in row.changes)}"


def _standing(optimizer: Optimizer) -> str:
    """What is there all the time, in words."""
    if optimizer.name != "sgd":
        return "weights, gradients and moments"
    return "weights, gradients and momentum" if optimizer.momentum else "weights and gradients"
