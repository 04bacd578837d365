"""Which updates of clients are not used, and why: one place for every engine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from slt_planner.config import Config
from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Index
from slt_planner.submodel.merge import check_update, trained_indices
from slt_planner.submodel.slices import take


@dataclass(frozen=True)
class Verdict:
    """What came of looking at an update: why it is refused (None: it is used), and how far it moved the weights.

    `change` is the root mean square of the differences, over the trained parameters, divided by the client's steps;
    None where it is not finite or the update is not one of this network.
    """

    reason: str | None
    change: float | None = None


@dataclass
class Screen:
    """Looks at the updates of one round.

    An update is refused if

    - its tensors are not the ones that its configuration trains, by name and shape,
    - its training loss, or a number in it, is not finite,
    - it moves the weights absurdly far: its `Verdict.change` is more than `max_change` times the median of the
      `recent_changes`, both of a step: a client with more images takes more of them. While these are none or zero, as
      in the first round of a run, all its steps together may move them `max_change` times the size of the weights that
      were sent (their root mean square).

    All updates of a round are judged alike, by what was there before it, so neither their order nor the engine matters.
    Changes of updates that are refused as too far belong to the recent ones, too: where all clients move further from
    now on, the limit follows, and as long as most are honest the median is theirs.

    Args:
        graph: the network's traced structure.
        weights: the global state dict that the clients started from.
        recent_changes: of the last rounds' updates.
        max_change: how many times as far as usual is too far.
        samples_a_step: a client's batch, over its local epochs: how many of its samples make a step.
    """

    graph: ModelGraph
    weights: Mapping[str, Tensor]
    recent_changes: Sequence[float]
    max_change: float
    samples_a_step: float = math.inf
    _trained: dict[Config, dict[str, Index]] = field(default_factory=dict)

    def verdict(self, config: Config, update: Mapping[str, Tensor], samples: int, loss: float) -> Verdict:
        """Whether an update is used: trained tensors by fqn, of `samples` images, with this mean training loss."""
        if config not in self._trained:
            self._trained[config] = trained_indices(self.graph, config)
        trained = self._trained[config]
        parameters = [name for name in trained if isinstance(self.graph.tensor(name), nn.Parameter)]
        if (misfit := _misfit(update, trained, parameters, self.graph, samples)) is not None:
            return Verdict(misfit)
        if not math.isfinite(loss):
            return Verdict("its training loss is not finite")
        sent = {name: take(self.weights[name], trained[name]) for name in parameters}
        change = _root_mean_square([update[name].detach().to(value) - value for name, value in sent.items()])
        others = [name for name in update if name not in sent and update[name].is_floating_point()]
        # Where the sum over a tensor is finite its elements are: they are looked at only where it is not.
        suspects = others if math.isfinite(change) else [*parameters, *others]
        for name in suspects:
            if not bool(torch.isfinite(update[name]).all()):
                return Verdict(f"{name} is not finite")
        if not math.isfinite(change):
            return Verdict("it moves the weights further than can be measured")
        steps = max(1, math.ceil(samples / self.samples_a_step))
        usual = median(self.recent_changes) * steps if self.recent_changes else 0.0
        usual = usual or _root_mean_square(list(sent.values()))
        if change <= self.max_change * usual or usual == 0:
            return Verdict(None, change / steps)
        return Verdict(f"it moves the weights {change / usual:.3g} times as far as usual", change / steps)


def _misfit(
    update: Mapping[str, Tensor],
    trained: Mapping[str, Index],
    parameters: Sequence[str],
    graph: ModelGraph,
    samples: int,
) -> str | None:
    """Why these cannot be the tensors that a client trained: each parameter must be there, buffers may be."""
    try:
        check_update(update, trained, graph, samples)
    except InputError as error:
        return str(error)
    missing = [name for name in parameters if name not in update or not update[name].is_floating_point()]
    return f"an update lacks {missing[0]}, or has it in whole numbers" if missing else None


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    squares = sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in tensors)
    return math.sqrt(squares / max(1, sum(tensor.numel() for tensor in tensors)))
