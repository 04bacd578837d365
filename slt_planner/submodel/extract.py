"""From a ModelGraph and a Config to a SubModel: the same mathematics with a frozen prefix and a scaled head."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from slt_planner.config import Config, LeanLever, Norms
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.segments import Segment
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Cut, Index
from slt_planner.submodel.cut_modules import Values, cut_module, filled_network
from slt_planner.submodel.lean_operators import recomputing
from slt_planner.submodel.lean_program import lean_program
from slt_planner.submodel.pieces import Piece, in_pieces, is_random, most_recomputed, moves_statistics
from slt_planner.submodel.prefix import Split, split_program
from slt_planner.submodel.program import segment_program, with_cuts, with_norms, with_unit_marks
from slt_planner.submodel.slices import shape_of
from slt_planner.submodel.tree import put_module, put_tensor

Forward = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Extraction:
    """How a sub-model was cut, and which of its tensors (by fqn) are frozen."""

    graph: ModelGraph
    config: Config
    norms: Norms
    frozen: frozenset[str]


class SubModel(nn.Module):
    """A network cut to a configuration; a copy that shares nothing with the model it came from.

    Its modules and parameters have the fqns of the original's. Parameters of frozen units have ``requires_grad``
    False. With `static` norms batch statistics are used in training and evaluation; with `running` norms the frozen
    ones stay in evaluation mode. Auxiliary outputs whose place is frozen are None.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        programs: Mapping[bool, fx.Graph],
        extraction: Extraction,
        around: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.extraction = extraction
        self._around = None if around is None else _Around(self, around)
        for fqn, module in modules.items():
            put_module(self, fqn, module)
        stored = extraction.graph.stored
        for fqn, tensor in tensors.items():
            put_tensor(self, fqn, tensor, persistent=fqn in stored)
        self._programs = _Programs(programs)
        self._forwards: dict[bool, list[Forward]] = {}
        self._levers: tuple[LeanLever, ...] = ()
        self.train()

    def use_levers(self, levers: tuple[LeanLever, ...]) -> None:
        """Run training steps in less memory, as these levers say; what is computed stays the same."""
        self._levers, self._forwards = levers, {}

    def _compiled(self, mode: bool, enter: Callable[[int], None] | None = None) -> list[Forward]:
        """The functions that make a forward pass, one after the other, each from what the one before it gives."""
        program = self._programs.by_mode[mode]
        return self._functions(program, enter) if mode else [self._function(program, enter)]

    def _functions(self, program: fx.Graph, enter: Callable[[int], None] | None = None) -> list[Forward]:
        """Those of a training program, with the levers."""
        if not self._levers:
            return [self._function(program, enter)]
        program = lean_program(program, self, self._levers, self.extraction.graph.programs[True].main)
        most = most_recomputed(self._levers)
        if most == 0:
            return [self._function(program, enter)]
        return [_recomputed(self._function(piece.graph, enter), piece) for piece in in_pieces(program, self, most)]

    def _function(self, program: fx.Graph, enter: Callable[[int], None] | None = None) -> Forward:
        if enter is not None:
            program = with_unit_marks(program, enter)
        # Only the function is kept, made from the weightless skeleton: a GraphModule is in a reference cycle and what
        # it holds would wait for the garbage collector.
        return type(fx.GraphModule(self.extraction.graph.skeleton, program)).forward

    def forward(self, *inputs: Any) -> Any:
        """The network's arguments, each (N, ...), to its outputs."""
        return self.run_traced(*inputs) if self._around is None else self._around.run(self, inputs)

    def run_traced(self, *inputs: Any) -> Any:
        """The part that was traced and cut; usually all of the network."""
        return self._run(self.passes(self.training), inputs)

    def _run(self, forwards: Sequence[Forward], given: tuple[Any, ...]) -> Any:
        for forward in forwards:
            given = forward(self, *given)
        return pytree.tree_unflatten(list(given), self.extraction.graph.programs[self.training].structure)

    def split(self, depth: int) -> Split | None:
        """The training pass in two, after units 1..depth at most; None where these are no function of a sample alone.

        `split.before`, given this or a copy and the network's arguments, gives what `run_after` takes.
        """
        parts = split_program(self._programs.by_mode[True], self, depth)
        if parts is None:
            return None
        before, after = parts
        names = (name for node in before.nodes for name in self.extraction.graph.tensors_of(node))
        return Split(self._function(before), self._functions(after), tuple(dict.fromkeys(names)))

    def is_batchable(self) -> bool:
        """Whether torch.func can train copies of it at once: no random numbers, running statistics in modules alone."""
        nodes = self._programs.by_mode[True].nodes
        return not any(
            is_random(node, self) or (node.op != "call_module" and moves_statistics(node, self)) for node in nodes
        )

    def run_after(self, split: Split, *values: Tensor) -> Any:
        """What `forward` gives in training, from what the first part of the split gave."""
        return self._run(split.after, values)

    def passes(self, mode: bool) -> list[Forward]:
        """The functions of a forward pass in training or evaluation mode; made once, and copies have them."""
        if mode not in self._forwards:
            self._forwards[mode] = self._compiled(mode)
        return self._forwards[mode]

    @contextmanager
    def following_units(self, enter: Callable[[int], None]) -> Iterator[None]:
        """While this lasts, `enter` is called with a unit's number whenever a forward pass comes to it."""
        plain = self._forwards
        self._forwards = {mode: self._compiled(mode, enter) for mode in self._programs.by_mode}
        try:
            yield
        finally:
            self._forwards = plain

    def train(self, mode: bool = True) -> "SubModel":
        """As torch's; running statistics of frozen norms never move."""
        super().train(mode)
        if self._around is not None:
            self._around.network.train(mode)
        for fqn, module in self.named_modules():
            norm = isinstance(module, _NormBase) and module.track_running_stats
            if norm and f"{fqn}.running_mean" in self.extraction.frozen:
                module.eval()
        return self

    def first_call_in(self, dtype: torch.dtype) -> str:
        """The first call of the training program that names this number format; empty if there is none."""
        nodes = self._programs.by_mode[True].nodes
        return next(
            (n.name for n in nodes if any(leaf is dtype for leaf in pytree.tree_leaves((n.args, n.kwargs)))), ""
        )

    def held_state(self) -> dict[str, Tensor]:
        """What a client is sent: every parameter and stored buffer once, by fqn; views, not copies."""
        first_name = self.extraction.graph.first_name
        return {n: v for n, v in self.state_dict().items() if first_name(n) == n}

    def trained_state(self) -> dict[str, Tensor]:
        """What a client sends back: trained parameters, and buffers beside them, by fqn; views, not copies."""
        return {n: v for n, v in self.held_state().items() if n not in self.extraction.frozen}


def _recomputed(function: Forward, piece: Piece) -> Forward:
    """A piece's function; run again in backward, if the piece is to be."""
    if not piece.recomputed:
        return function

    def run(*inputs: Any) -> tuple[Any, ...]:
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=recomputing, preserve_rng_state=False)

    return run


class _Around:
    """A network whose traced part is a sub-model's: its other modules are the sub-model's own."""

    def __init__(self, sub: SubModel, network: nn.Module) -> None:
        self.network, self._part = network, _TracedPart()
        part = sub.extraction.graph.adapter.part
        for name, child in network.named_children():
            if name != part:
                sub.add_module(name, child)
        setattr(network, part, self._part)

    def run(self, sub: SubModel, inputs: tuple[Any, ...]) -> Any:
        """The network's forward pass, with the sub-model's as that of its part."""
        with self._part.being(sub):
            return self.network(*inputs)


class _TracedPart(nn.Module):
    """Stands where the traced part was. It knows the sub-model during a pass only: in a reference cycle the weights of
    every sub-model would wait for the garbage collector."""

    def __init__(self) -> None:
        super().__init__()
        self._sub: tuple[SubModel, ...] = ()  # as a tuple no child: the sub-model is not a part of its part

    @contextmanager
    def being(self, sub: SubModel) -> Iterator[None]:
        """While this lasts, a forward pass is that of the sub-model."""
        self._sub = (sub,)
        try:
            yield
        finally:
            self._sub = ()

    def forward(self, *inputs: Any) -> Any:
        (sub,) = self._sub
        return sub.run_traced(*inputs)


class _Programs:
    """Programs by mode; a copied sub-model uses the same ones."""

    def __init__(self, by_mode: Mapping[bool, fx.Graph]) -> None:
        self.by_mode = by_mode

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Programs":
        return self


def extract(
    graph: ModelGraph,
    model: nn.Module | Mapping[str, Tensor] | None,
    config: Config,
    norms: Norms = "static",
    on_meta: bool = False,
) -> SubModel:
    """Cut a trainable sub-model out of a network (METHOD: units and widths).

    Args:
        graph: the network's traced structure.
        model: the network, or its state dict, to copy values from; None fills in values of its own, for measuring.
        config: what is frozen, trained at full width, and scaled.
        norms: ``static`` (batch statistics always) or ``running``.
        on_meta: leave the sub-model on the meta device, without values; nothing of its size is allocated.

    Raises:
        InputError: `model` does not have the graph's parameters, or the configuration goes beyond its units.

    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> model = load_model("resnet20")
    >>> sub = extract(trace(model, (3, 32, 32)), model, Config(freeze_depth=4, full_depth=5, head_scale=0.5))
    >>> tuple(sub.fc.weight.shape)
    (10, 32)
    """
    cuts = {mode: graph.cuts(config, mode) for mode in graph.programs}
    dropped = {mode: _dropped(graph, config, mode) for mode in graph.programs}
    indices = _tensor_indices(graph, cuts, dropped)
    constants = {**graph.constants, **(dict(model.named_buffers()) if isinstance(model, nn.Module) else {})}
    values = Values(graph, indices, _checked_state(graph, model), constants, on_meta)
    units = graph.unit_of_tensor()
    frozen = frozenset(name for name, unit in units.items() if unit <= config.freeze_depth)
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, Tensor] = {}
    for mode, program in graph.programs.items():
        own = [node for node in program.graph.nodes if node not in dropped[mode]]
        _add_parts(modules, tensors, own, graph, cuts[mode], values, norms)
    programs = {
        mode: with_norms(
            with_cuts(p.graph, cuts[mode], dropped[mode], _silent(graph, config, mode)), norms, config.freeze_depth
        )
        for mode, p in graph.programs.items()
    }
    around = filled_network(graph, values, norms) if graph.adapter.part else None
    return _put_together(modules, tensors, programs, Extraction(graph, config, norms, frozen), around)


def extract_segment(
    graph: ModelGraph, segment: Segment, config: Config, cuts: Mapping[fx.Node, Cut], norms: Norms
) -> SubModel:
    """The part of a sub-model that is in one segment, on the meta device, for training mode alone.

    `cuts` are those of the configuration. Its function is `passes(True)`, as `program.segment_program` has it.
    """
    indices: dict[str, Index] = {}
    for node in segment.nodes:
        indices |= _indices_at(graph, node, cuts.get(node, Cut(())))
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, Tensor] = {}
    values = Values(graph, indices, None, {}, on_meta=True)
    _add_parts(modules, tensors, segment.nodes, graph, cuts, values, norms)
    programs = {True: with_norms(segment_program(segment, cuts), norms, config.freeze_depth)}
    units = graph.unit_of_tensor()
    frozen = frozenset(name for name in segment.tensors if units[name] <= config.freeze_depth)
    return _put_together(modules, tensors, programs, Extraction(graph, config, norms, frozen), None)


def _add_parts(
    modules: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    nodes: Iterable[fx.Node],
    graph: ModelGraph,
    cuts: Mapping[fx.Node, Cut],
    values: Values,
    norms: Norms,
) -> None:
    """The modules that nodes call and the tensors that they use, cut, by fqn; added to those that are there."""
    for node in nodes:
        name = str(node.target)
        if node.op == "call_module" and name not in modules:
            modules[name] = cut_module(name, graph, cuts.get(node, Cut(())), values, norms)
        elif node.op == "get_attr":
            tensors[name] = values.of(name)


def _put_together(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    programs: Mapping[bool, fx.Graph],
    extraction: Extraction,
    around: nn.Module | None,
) -> SubModel:
    used = {str(node.target) for program in programs.values() for node in program.nodes if node.op == "get_attr"}
    sub = SubModel(modules, {n: t for n, t in tensors.items() if n in used}, programs, extraction, around)
    for name, parameter in sub.named_parameters():
        parameter.requires_grad_(name not in extraction.frozen)
    return sub


def tensor_indices(graph: ModelGraph, config: Config) -> dict[str, Index]:
    """Which entries of each parameter and buffer (by fqn) a sub-model holds; dimensions not named are whole."""
    cuts = {mode: graph.cuts(config, mode) for mode in graph.programs}
    return _tensor_indices(graph, cuts, {mode: _dropped(graph, config, mode) for mode in graph.programs})


def _tensor_indices(
    graph: ModelGraph, cuts: Mapping[bool, Mapping[fx.Node, Cut]], dropped: Mapping[bool, set[fx.Node]]
) -> dict[str, Index]:
    indices: dict[str, Index] = dict.fromkeys(graph.untraced, ())
    for mode, program in graph.programs.items():
        for node in program.graph.nodes:
            if node not in dropped[mode]:
                for name, index in _indices_at(graph, node, cuts[mode].get(node, Cut(()))).items():
                    if shape_of(indices.setdefault(name, index), graph.tensor(name).shape) != shape_of(
                        index, graph.tensor(name).shape
                    ):
                        raise UnsupportedLayerError(f"{name}: is used more than once, at different widths")
    return indices


def _indices_at(graph: ModelGraph, node: fx.Node, cut: Cut) -> dict[str, Index]:
    """The indices of the tensors that one node uses."""
    indices: dict[str, Index] = dict.fromkeys(graph.tensors_of(node), ())
    if node.op == "get_attr" and cut.output:
        indices[str(node.target)] = cut.output  # type: ignore[assignment]
    return indices | {graph.first_name(f"{node.target}.{name}"): index for name, index in cut.parameters.items()}


def _silent(graph: ModelGraph, config: Config, mode: bool) -> set[fx.Node]:
    """What only auxiliary outputs need, on a frozen place: an output among them is None."""
    nodes = graph.programs[mode].graph.nodes
    return {node for node in nodes if node.meta["auxiliary"] and node.meta["freezes"] <= config.freeze_depth}


def _dropped(graph: ModelGraph, config: Config, mode: bool) -> set[fx.Node]:
    """What is not computed: auxiliary heads on a frozen place, unless one that is not frozen needs a part of them, and
    what is stored for them alone.
    """
    silent = _silent(graph, config, mode)
    dropped: set[fx.Node] = set()
    for node in reversed(graph.programs[mode].graph.nodes):
        unused = all(user in dropped or user.op == "output" for user in node.users)
        if (unused and node in silent) or (unused and node.users and not node.meta["data"]):
            dropped.add(node)
    return dropped


def _checked_state(graph: ModelGraph, model: nn.Module | Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    if model is None:
        return None
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, expected in graph.stored.items():
        if name not in state:
            raise InputError(f"the model has no {name}; it is not the network that was traced")
        if state[name].shape != expected.shape:
            raise InputError(f"{name} has shape {tuple(state[name].shape)}, traced was {tuple(expected.shape)}")
    return state
