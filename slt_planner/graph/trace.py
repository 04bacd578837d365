"""From a module to its ModelGraph: operators, shapes and freeze units, without its weights."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from slt_planner.config import Config
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.freeze_units import Unit, assign_units, kind_of_call
from slt_planner.graph.widths import Cut, cut_graph, has_rule, is_weighted, kind_of, refusal, scaled_width


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A network's structure: `skeleton` is a copy on the meta device (no values), `programs` its traced graph by mode.

    `programs[True]` is the graph of training mode, `programs[False]` of evaluation mode; nodes carry ``meta["unit"]``
    and ``meta["shape"]`` (of one sample). `hash` is equal for networks of equal structure, whatever their weights.
    """

    skeleton: nn.Module
    programs: Mapping[bool, fx.Graph]
    units: tuple[Unit, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    hash: str

    @property
    def depth(self) -> int:
        """K, the number of freeze units; the classifier is not one."""
        return len(self.units)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The skeleton's modules by fqn."""
        return dict(self.skeleton.named_modules())

    def head_scales(self, full_depth: int) -> tuple[float, ...]:
        """The legal scales of a head behind `full_depth`: each k/C at which a head layer changes; ascending to 1.0."""
        channels = {
            node.meta["shape"][0]
            for node in self.programs[True].nodes
            if is_weighted(kind_of_call(node, self.modules)) and full_depth < node.meta["unit"] <= self.depth
        }
        candidates = sorted({Fraction(k, c) for c in channels for k in range(1, c + 1)} | {Fraction(1)})
        # Below one channel nothing shrinks: of several scales with the same widths only the first is legal.
        by_widths: dict[tuple[int, ...], float] = {}
        for scale in map(float, candidates):
            by_widths.setdefault(tuple(scaled_width(c, scale) for c in sorted(channels)), scale)
        return (*sorted(set(by_widths.values()) - {1.0}), 1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelGraph":
        """Itself: a graph never changes, and a copied sub-model still belongs to it."""
        return self

    def cuts(self, config: Config, training: bool = True) -> dict[fx.Node, Cut]:
        """What a sub-model keeps around every operator; raises InputError for a configuration beyond the last unit."""
        return cut_graph(self.programs[training], self.modules, config, self.depth)

    def unit_of_module(self) -> dict[str, int]:
        """The unit each module that is called belongs to, by fqn; depth + 1 for the classifier."""
        return {str(node.target): node.meta["unit"] for node in self.programs[True].nodes if node.op == "call_module"}


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> ModelGraph:
    """Trace a network's structure; its weights are neither copied nor changed.

    Args:
        model: a network of one input and one output of shape (N, classes).
        input_shape: of one sample, without the batch: (channels, height, width).

    Raises:
        UnsupportedLayerError: the network cannot be traced, or holds a kind of layer that has no width rule.
        InputError: the network does not take this input, or has no unit to freeze.

    >>> from slt_planner.models.registry import load_model
    >>> trace(load_model("resnet20"), (3, 32, 32)).depth
    19
    """
    _refuse_shared(model)
    skeleton = _on_meta(model)
    programs = {mode: _program(skeleton.train(mode), input_shape) for mode in (False, True)}
    modules = dict(skeleton.named_modules())
    units = {mode: assign_units(program, modules) for mode, program in programs.items()}[True]
    if not units:
        raise InputError("the network has no layer to freeze before its classifier")
    for program in programs.values():  # rules may refuse an operator by its options: better now than at the first plan
        cut_graph(program, modules, Config(freeze_depth=0, full_depth=0, head_scale=0.5), len(units))
    output = next(node for node in programs[True].nodes if node.op == "output")
    (result,) = output.all_input_nodes
    if len(result.meta["shape"]) != 1:
        raise InputError(f"the network's output has shape (N, {result.meta['shape']}); it must be (N, classes)")
    return ModelGraph(
        skeleton=skeleton,
        programs=MappingProxyType(programs),
        units=units,
        input_shape=tuple(input_shape),
        num_classes=result.meta["shape"][0],
        hash=_structure_hash(programs[True], modules, input_shape),
    )


class _LeafTracer(fx.Tracer):
    """Modules that have a width rule stay whole, as torch's own do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return has_rule(type(m)) or super().is_leaf_module(m, module_qualified_name)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes but no storage; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _program(skeleton: nn.Module, input_shape: tuple[int, ...]) -> fx.Graph:
    try:
        program = _LeafTracer().trace(skeleton)
    except Exception as error:  # whatever the network's own code raises when it meets fx's proxies
        raise UnsupportedLayerError(f"the network cannot be traced by torch.fx: {_first_line(error)}") from error
    _refuse_unknown(program, dict(skeleton.named_modules()))
    _ShapeRecorder(skeleton, program).run(torch.empty(2, *input_shape, device="meta"))
    return program


class _ShapeRecorder(fx.Interpreter):
    """Runs a program on the meta device and writes ``meta["shape"]`` (of one sample) on every node."""

    def __init__(self, skeleton: nn.Module, program: fx.Graph) -> None:
        super().__init__(fx.GraphModule(skeleton, program))
        self.extra_traceback = False
        self._given = ""

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:  # shapes that do not fit surface as whatever the failing operator raises
            where = n.target if n.op == "call_module" else n.name
            raise InputError(
                f"the network does not take inputs of {self._given}: {where}: {_first_line(error)}"
            ) from error
        if not isinstance(result, torch.Tensor):
            raise refusal(n, n.target, "does not give one tensor")
        n.meta = {"shape": tuple(result.shape[1:])}
        if n.op == "placeholder":
            self._given = "x".join(map(str, n.meta["shape"]))
        return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse_unknown(program: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    called: set[str] = set()
    for node in program.nodes:
        if node.op in ("placeholder", "output"):
            continue
        kind = kind_of(node, modules) if node.op != "get_attr" else "a parameter used directly"
        if not has_rule(kind):
            raise refusal(node, kind)
        if node.op == "call_module":
            fqn = str(node.target)
            if fqn in called and any(True for _ in modules[fqn].parameters()):
                raise refusal(node, kind, "used more than once has no width rule")
            called.add(fqn)


def _refuse_shared(model: nn.Module) -> None:
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_name.setdefault(id(parameter), name) != name:
            raise UnsupportedLayerError(
                f"{name}: a parameter shared with {first_name[id(parameter)]} has no width rule; give each its own"
            )


def _structure_hash(program: fx.Graph, modules: Mapping[str, nn.Module], input_shape: tuple[int, ...]) -> str:
    lines = [str(tuple(input_shape))]
    for node in program.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            what = f"{node.target} {type(module).__name__}({module.extra_repr()})"
        else:
            what = getattr(node.target, "__name__", str(node.target))
        lines.append(f"{node.name} {node.op} {what} {node.args} {node.kwargs} {node.meta['unit']}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
