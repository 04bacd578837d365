"""From a module to its ModelGraph: operators, shapes and freeze units, without its weights."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from slt_planner.config import Config, Granularity
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.cuts import annotate, cut_program
from slt_planner.graph.freeze_units import Unit
from slt_planner.graph.record import first_line, record
from slt_planner.graph.region import Dimension
from slt_planner.graph.widths import Cut, is_leaf


@dataclass(frozen=True, eq=False)
class Program:
    """What a network computes in one mode: its graph, how its outputs are nested, and which of them is the main one.

    `main` counts the outputs' leaves; None means that all of them are.
    """

    graph: fx.Graph
    structure: pytree.TreeSpec
    main: int | None


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A network's structure: `skeleton` is a copy on the meta device (no values), `programs` its calls by mode.

    `programs[True]` is of training mode, `programs[False]` of evaluation mode; see `cuts.annotate` for what nodes
    carry. `granularity` says whether units are layers or merged to blocks (see `blocks.merge_to_blocks`). `hash` is
    equal for networks of equal structure and equal units, whatever their weights. `constants` are the values of
    buffers that are no part of a state dict.
    """

    skeleton: nn.Module
    programs: Mapping[bool, Program]
    units: tuple[Unit, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    hash: str
    adapter: Adapter
    constants: Mapping[str, Tensor]
    granularity: Granularity = "layer"

    @property
    def depth(self) -> int:
        """K, the number of freeze units; the classifier is not one."""
        return len(self.units)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The skeleton's modules by fqn."""
        return dict(self.skeleton.named_modules())

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """The skeleton's state dict: parameters and buffers under all their names, without values."""
        return self.skeleton.state_dict()

    @cached_property
    def _counts(self) -> tuple[tuple[int, int], ...]:
        """(unit, number of legal steps) of every width that is scaled."""
        nodes = self.programs[True].graph.nodes
        return tuple({(n.meta["unit"], n.meta["layout"].count) for n in nodes if "layout" in n.meta})

    def head_scales(self, full_depth: int) -> tuple[float, ...]:
        """The legal scales of a head behind `full_depth`: each k/C at which a head layer changes; ascending to 1.0.

        C counts whole legal steps. Below one step nothing shrinks, so the lowest scale is one step of the widest layer.
        """
        counts = {count for unit, count in self._counts if unit > full_depth and count > 1}
        if not counts:
            return (1.0,)
        return tuple(sorted({k / count for count in counts for k in range(2, count + 1)} | {1 / max(counts)}))

    @cached_property
    def has_batch_norm(self) -> bool:
        """Whether any layer takes statistics over the samples of a batch."""
        called = {getattr(node.target, "__name__", "") for node in self.programs[True].graph.nodes}
        return "batch_norm" in called or any(isinstance(module, _BatchNorm) for module in self.skeleton.modules())

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelGraph":
        """Itself: a graph never changes, and a copied sub-model still belongs to it."""
        return self

    def cuts(self, config: Config, training: bool = True) -> dict[fx.Node, Cut]:
        """What a sub-model keeps around the operators of its head; raises InputError beyond the last unit."""
        return cut_program(self.programs[training].graph, self.modules, config, self.depth)

    def unit_of_tensor(self) -> Mapping[str, int]:
        """The unit each parameter and buffer that is used freezes with, by fqn; depth + 1 for the classifier.

        A parameter that several units use freezes with the last of them.
        """
        return self._unit_of_tensor

    @cached_property
    def _unit_of_tensor(self) -> Mapping[str, int]:
        units: dict[str, int] = {}
        for program in self.programs.values():
            for node in program.graph.nodes:
                for name in self.tensors_of(node):
                    units[name] = max(node.meta["freezes"], units.get(name, 0))
        return units | dict.fromkeys(self.untraced, self.depth + 1)

    @cached_property
    def untraced(self) -> tuple[str, ...]:
        """The fqns of parameters and buffers outside the traced part of the network; they stay whole."""
        part = self.adapter.part
        return (
            tuple(n for n in self._tensors if not n.startswith(f"{part}.") and self.first_name(n) == n) if part else ()
        )

    def tensors_of(self, node: fx.Node) -> list[str]:
        """The fqns of the parameters and buffers that a node uses, each by the first of its names."""
        if node.op == "get_attr":
            return [str(node.target)]
        if node.op != "call_module":
            return []
        module = self.modules[str(node.target)]
        names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
        return [self.first_name(f"{node.target}.{name}") for name in names]

    def first_name(self, fqn: str) -> str:
        """The name under which a parameter or buffer is known, whichever of its names is given."""
        return self._first_names[fqn]

    def tensor(self, fqn: str) -> Tensor:
        """A parameter or buffer of the skeleton."""
        return self._tensors[fqn]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        parameters = self.skeleton.named_parameters(remove_duplicate=False)
        return dict([*parameters, *self.skeleton.named_buffers(remove_duplicate=False)])

    @cached_property
    def _first_names(self) -> dict[str, str]:
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self._tensors.items()}


def trace(
    model: nn.Module,
    input_shape: tuple[int, ...],
    adapter: Adapter | None = None,
    granularity: Granularity = "layer",
) -> ModelGraph:
    """Trace a network's structure; its weights are neither copied nor changed.

    Args:
        model: the network.
        input_shape: of one sample of the data, without the batch: (channels, height, width).
        adapter: between the data and the network, where it does not take images and give logits; by default the
            network's own ``slt_adapter``, if it has one.
        granularity: of freeze units: ``layer``, or ``block`` for units between which a single tensor passes, such as
            a whole residual block.

    Raises:
        UnsupportedLayerError: what the network does cannot be recorded, or it holds a kind of layer that has no rule.
        InputError: the network does not take this input, or has no unit to freeze; an unknown granularity.

    >>> from slt_planner.models.registry import load_model
    >>> trace(load_model("resnet20"), (3, 32, 32)).depth
    19
    >>> trace(load_model("resnet20"), (3, 32, 32), granularity="block").depth
    10
    """
    if granularity not in get_args(Granularity):
        raise InputError(f"granularity {granularity!r}: known are {', '.join(get_args(Granularity))}")
    adapter = adapter or getattr(model, "slt_adapter", None) or Adapter()
    skeleton = _on_meta(model)
    modules = dict(skeleton.named_modules())
    shape = adapter.traced_shape(model, tuple(input_shape))
    programs = {mode: _program(skeleton.train(mode), shape, adapter) for mode in (False, True)}
    units = annotate(programs[True].graph, modules, _main_nodes(programs[True]), granularity=granularity)
    if not units:
        raise InputError("the network has no layer to freeze before its classifier")
    _check_scores(programs[True], adapter)
    annotate(programs[False].graph, modules, _main_nodes(programs[False]), programs[True].graph)
    for program in programs.values():  # rules may refuse an operator at some widths: better now than at the first plan
        for full_depth in (0, len(units) // 2):
            narrow = Config(freeze_depth=0, full_depth=full_depth, head_scale=0.3)
            cut_program(program.graph, modules, narrow, len(units))
    return ModelGraph(
        skeleton=skeleton,
        programs=MappingProxyType(programs),
        units=units,
        input_shape=tuple(input_shape),
        num_classes=adapter.num_classes(model) or _num_classes(programs[True]),
        hash=_structure_hash(programs[True].graph, modules, input_shape),
        adapter=adapter,
        constants=_constants(model),
        granularity=granularity,
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes but no storage; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:  # torch's word for modules that hold computed tensors, such as old weight norms
        raise UnsupportedLayerError(f"the network cannot be copied: {first_line(error)}") from error


def _constants(model: nn.Module) -> dict[str, Tensor]:
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored and not buffer.is_meta}


def _program(skeleton: nn.Module, input_shape: tuple[int, ...], adapter: Adapter) -> Program:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        return adapter.inputs(torch.empty(batch, *input_shape, device="meta"))

    graph, structure = record(skeleton, inputs, is_leaf, adapter.part)
    leaves: Any = graph.output_node().args[0]
    scores = adapter.scores(pytree.tree_unflatten(list(leaves), structure))
    main = next((i for i, leaf in enumerate(leaves) if leaf is scores and isinstance(leaf, fx.Node)), None)
    if main is None and not adapter.part:
        raise InputError(
            f"the network's scores are no tensor that it gives but {type(scores).__name__}; "
            "say which output counts with an adapter (README, Your own network)"
        )
    return Program(graph, structure, main)


def _main_nodes(program: Program) -> set[fx.Node]:
    leaves: Any = program.graph.output_node().args[0]
    return {leaf for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and program.main in (None, i)}


def _num_classes(program: Program) -> int:
    """The size of dimension 1 of the main output."""
    (main, *_) = _main_nodes(program)
    dims: tuple[Dimension, ...] = main.meta["dims"]
    if len(dims) < 2 or not dims[0].batched:
        raise InputError(f"the network's output has {len(dims)} dimensions; it must be (N, classes, ...)")
    return dims[1].size


def _check_scores(program: Program, adapter: Adapter) -> None:
    """Where an adapter says nothing of labels, loss and metric a sample has one class, and scores are logits.

    Raises:
        InputError: they are of positions.
    """
    silent = adapter.metric == "accuracy" and all(
        getattr(getattr(adapter, name), "__func__", None) is getattr(Adapter, name)
        for name in ("loss", "step_loss", "example_labels")
    )
    for main in _main_nodes(program) if silent else ():
        if len(main.meta["dims"]) > 2:
            more = ", ".join(str(dim.size) for dim in main.meta["dims"][1:])
            raise InputError(
                f"the network gives (N, {more}), not logits (N, classes); say what its labels are and what it "
                "minimises with an adapter (README, Your own network)"
            )


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What a module was made with and what else is set on it, by name; lists as tuples."""
    return {name: _in_tuples(value) for name, value in vars(module).items() if not name.startswith("_")}


def _in_tuples(value: Any) -> Any:
    return tuple(map(_in_tuples, value)) if isinstance(value, (list, tuple)) else value


_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _described(module: nn.Module) -> str:
    """A module's settings and tensors; its own repr differs from one version of torch to the next."""
    plain = {name: value for name, value in settings_of(module).items() if _is_plain(value)}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return str(sorted((plain | {name: tuple(tensor.shape) for name, tensor in tensors}).items()))


def _structure_hash(program: fx.Graph, modules: Mapping[str, nn.Module], input_shape: tuple[int, ...]) -> str:
    lines = [str(tuple(input_shape))]
    for node in program.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            what = f"{node.target} {type(module).__name__}({_described(module)})"
        else:
            what = getattr(node.target, "__name__", str(node.target))
        lines.append(f"{node.name} {node.op} {what} {node.args} {node.kwargs} {node.meta['unit']}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
