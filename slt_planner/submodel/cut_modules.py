"""The modules and tensors of a sub-model: copies of the network's, with their sizes and values cut."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slt_planner.config import Norms
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Cut, Index
from slt_planner.submodel.slices import shape_of, take


class Values:
    """The values of a sub-model's tensors, cut; without a state they are made up."""

    def __init__(
        self,
        graph: ModelGraph,
        indices: Mapping[str, Index],
        state: Mapping[str, Tensor] | None,
        constants: Mapping[str, Tensor],
        on_meta: bool,
    ) -> None:
        self._graph, self._indices, self._state, self._constants = graph, indices, state, constants
        self._on_meta = on_meta
        self._made: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(0)  # a detector's shapes depend on made-up values too

    def of(self, fqn: str) -> Tensor:
        """A tensor's kept part; the same object every time, so that what is shared stays shared."""
        name = self._graph.first_name(fqn)
        if name not in self._made:
            like = self._graph.tensor(name)
            index = self._indices.get(name, ())
            if self._on_meta:
                value = torch.empty(shape_of(index, like.shape), dtype=like.dtype, device="meta")
            elif self._state is not None and name in self._state:
                value = take(self._state[name], index)
            elif name in self._constants:
                value = take(self._constants[name], index)
            else:
                value = _synthetic(like, index, name, self._random)
            self._made[name] = nn.Parameter(value) if isinstance(like, nn.Parameter) else value
        return self._made[name]


def cut_module(fqn: str, graph: ModelGraph, cut: Cut, values: Values, norms: Norms) -> nn.Module:
    """A copy of one leaf module with its sizes and tensors cut."""
    module = copy.deepcopy(graph.modules[fqn])
    for name, size in cut.attributes.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, size)
    _fill(module, f"{fqn}.", values, norms)
    return module if cut.replacement is None else cut.replacement(module)


def filled_network(graph: ModelGraph, values: Values, norms: Norms) -> nn.Module:
    """A copy of the network without its traced part."""
    part = graph.skeleton.get_submodule(graph.adapter.part)
    network = copy.deepcopy(graph.skeleton, {id(part): nn.Identity()})
    _fill(network, "", values, norms)
    return network


def _fill(module: nn.Module, prefix: str, values: Values, norms: Norms) -> None:
    """Give a weightless module its values; with static norms, no running statistics."""
    for norm in module.modules():
        if norms == "static" and isinstance(norm, _NormBase):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, values.of(f"{prefix}{name}"))


def _synthetic(like: Tensor, index: Index, name: str, random: torch.Generator) -> Tensor:
    """Values for measuring, harmless in any network: small weights, and norms that change nothing."""
    shape = shape_of(index, like.shape)
    if len(shape) > 1 and like.is_floating_point():
        return torch.randn(shape, dtype=like.dtype, generator=random) * 0.05
    zero = name.rpartition(".")[2] in ("bias", "running_mean") or not like.is_floating_point()
    return torch.full(shape, 0 if zero else 1, dtype=like.dtype)
