"""What a head scale does to every width: a registry of one small rule a layer kind.

A rule sees one operator of the recorded graph and says what a sub-model keeps around it. A kind that has no rule is
refused by name; nothing is guessed. To add a kind, write a function and decorate it with `rule`: `graph/rules` has the
known ones, and README a small example.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from torch import fx, nn

from slt_planner.config import Channels
from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.record import where
from slt_planner.graph.region import Axis, Dimension, Region, Split

Index: TypeAlias = Region
"""Which entries of a parameter a sub-model keeps, by dimension; dimensions beyond are kept whole."""

Several: TypeAlias = tuple[Region | None, ...]
"""What is kept of each result of a call that gives several; None where a result is no tensor."""


@dataclass(frozen=True)
class Cut:
    """What a sub-model keeps around one operator.

    `inputs` is what the operator takes of an input where that is less than what comes; the input is cut to it.
    `parameters` and `attributes` say how the sub-model's copy of a module is made, `replacement` that another module
    takes its place; `arguments` are new arguments of the call, by position or name; `call` is another function with
    all its arguments, called in its place.
    """

    output: Region | Several
    inputs: Mapping[fx.Node, Region] = field(default_factory=dict)
    parameters: Mapping[str, Index] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[int | str, Any] = field(default_factory=dict)
    replacement: Callable[[nn.Module], nn.Module] | None = None
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


class Needs:
    """What operators need of the widths that reach them; noted once a graph, when everything is at full width.

    A width can only be scaled in steps that all its users can take (METHOD, section 1, Widths): whole groups, whole
    heads, and not at all along a factor that is taken apart one by one.
    """

    def __init__(self) -> None:
        self._strides: dict[str, set[int]] = {}
        self._whole: dict[str, set[tuple[int, int]]] = {}
        self._factors: dict[str, set[tuple[int, int]]] = {}
        self._joined: dict[str, frozenset[str]] = {}
        self._together: dict[str, frozenset[str]] = {}

    def steps(self, dimension: Dimension, step: int) -> None:
        """This dimension must come in whole steps of `step` entries."""
        if dimension.axis is not None and step > 1:
            for maker in dimension.axis.makers:
                self._strides.setdefault(maker, set()).add(dimension.axis.stride * step)

    def split(self, split: Split) -> None:
        """This axis is split into factors: each is a step of the one before it."""
        stride = split.axis.stride
        for factor in reversed(split.factors[1:]):
            stride *= factor
            for maker in split.axis.makers:
                self._strides.setdefault(maker, set()).add(stride)

    def whole(self, dimension: Dimension) -> None:
        """This dimension is taken apart one by one: all of it must be there."""
        if dimension.axis is not None and dimension.size > 1:
            for maker in dimension.axis.makers:
                self._whole.setdefault(maker, set()).add((dimension.axis.stride, dimension.size))
                self._strides.setdefault(maker, set()).update(
                    {dimension.axis.stride, dimension.axis.stride * dimension.size}
                )

    def join(self, region: Region) -> None:
        """Operators whose outputs meet in one dimension have one width: what one needs, all need."""
        for dimension in region:
            if dimension.axis is not None:
                _unite(self._joined, dimension.axis.makers)
                self.choose_together(dimension)

    def choose_together(self, *dimensions: Dimension) -> None:
        """Of all these dimensions the same steps are to be kept, whichever are."""
        _unite(self._together, frozenset().union(*(d.axis.makers for d in dimensions if d.axis is not None)))

    def factor(self, dimension: Dimension) -> None:
        """This dimension is combined to one: where it is a factor of the channels, the others are scaled."""
        if dimension.axis is not None and dimension.size > 1:
            for maker in dimension.axis.makers:
                self._factors.setdefault(maker, set()).add((dimension.axis.stride, dimension.size))

    def layout(self, maker: str, size: int) -> "Layout":
        """How the outputs of a weight-bearing operator are scaled so that all its users can take them."""
        makers, chosen_with = self._joined.get(maker, {maker}), min(self._together.get(maker, {maker}))
        needed = {stride for m in makers for stride in self._strides.get(m, ())}
        strides = sorted({s for s in needed if s < size} | {1}, reverse=True)
        bounds = [size, *strides]
        if any(large % small for large, small in pairwise(bounds)):
            return Layout(size, 1, 1, chosen_with)  # its users want steps that do not go together: it is not scaled
        whole = {factor for m in makers for factor in self._whole.get(m, ())}
        if len(bounds) > 2:  # all of the channels are no factor of them
            whole |= {factor for m in makers for factor in self._factors.get(m, ())}
        for large, small in pairwise(bounds):
            if (small, large // small) not in whole:
                return Layout(size // large, large // small, small, chosen_with)
        return Layout(size, 1, 1, chosen_with)


def _unite(classes: dict[str, frozenset[str]], members: frozenset[str]) -> None:
    """Make one class of the classes of these members."""
    united = frozenset().union(*(classes.get(m, {m}) for m in members))
    classes |= dict.fromkeys(united, united)


@dataclass(frozen=True)
class Layout:
    """Outputs as `outer` x `count` x `inner`: a scale keeps some of the `count` steps, and all of the others.

    Layers with the same `chosen_with` keep the same steps, whichever are chosen.
    """

    outer: int
    count: int
    inner: int
    chosen_with: str = ""

    def kept(self, head_scale: float, channels: Channels = "first") -> tuple[int, ...] | range:
        """The outputs that are kept at a scale, ascending."""
        steps = chosen_steps(channels, self.count, scaled_width(self.count, head_scale), self.chosen_with)
        if self.outer == 1 and isinstance(steps, range):
            return range(len(steps) * self.inner)
        block = self.count * self.inner
        return tuple(
            o * block + s * self.inner + i for o in range(self.outer) for s in steps for i in range(self.inner)
        )


def chosen_steps(channels: Channels, count: int, width: int, chosen_with: str) -> Sequence[int]:
    """Which `width` of `count` steps are kept, ascending; a range where they are the first ones.

    ``rolling:N`` is the window of FedRolex (arXiv 2212.01548, section 3): steps N, N + 1, ..., counted around the end.
    ``random:SEED`` draws without replacement, for each `chosen_with` anew.

    >>> chosen_steps("rolling:6", 8, 4, "conv1")
    (0, 1, 6, 7)
    """
    kind, _, number = channels.partition(":")
    if kind == "first" or width == count:
        return range(width)
    if kind == "rolling":
        return tuple(sorted((int(number) + i) % count for i in range(width)))
    random = np.random.default_rng([int(number), zlib.crc32(chosen_with.encode())])
    return tuple(sorted(random.permutation(count)[:width].tolist()))


Keep: TypeAlias = Callable[[int], Dimension]
"""From a full width to the dimension that a weight-bearing operator gives."""


@dataclass(frozen=True)
class Operator:
    """One operator of the graph, as its rule sees it: `module` is None for functions and methods.

    `regions` is what comes from every node, `output` the full result, `keep` the width a weight-bearing operator is to
    give, `needs` where the rule notes what it needs of its inputs' widths.
    """

    node: fx.Node
    module: Any
    regions: Mapping[fx.Node, Any]
    keep: Keep
    needs: Needs

    @property
    def name(self) -> str:
        """The plain name of the function or method, or the name of the module's class."""
        return kind_name(self.node, self.module)

    @property
    def output(self) -> Any:
        """The dimensions of the full result."""
        return self.node.meta["dims"]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position (the tensor itself is 0, for methods too) or name."""
        if position < len(self.node.args):
            return self.node.args[position]
        alias = {"dim": "axis", "keepdim": "keepdims"}.get(name, name)
        return self.node.kwargs.get(name, self.node.kwargs.get(alias, default))

    def region(self, argument: Any) -> Region:
        """What comes of an argument that is a tensor."""
        if not isinstance(argument, fx.Node) or argument not in self.regions:
            raise self.refused("of something that is no tensor has no width rule")
        region: Region = self.regions[argument]
        return region

    @property
    def tensors(self) -> dict[fx.Node, Region]:
        """All inputs that are tensors."""
        return {n: self.regions[n] for n in self.node.all_input_nodes if _is_region(self.regions.get(n))}

    def refused(self, why: str) -> UnsupportedLayerError:
        """The error for this operator, with its place and kind."""
        return refusal(self.node, self.name, why)


def _is_region(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(dimension, Dimension) for dimension in value)


Rule: TypeAlias = Callable[[Operator], Cut]
Weighted: TypeAlias = Callable[[Operator], bool]

_RULES: dict[Any, Rule] = {}
_WEIGHTED: dict[Any, Weighted] = {}


def rule(*kinds: type[nn.Module] | str, weighted: bool | Weighted = False) -> Callable[[Rule], Rule]:
    """Register a width rule for layer kinds: module classes, or names of functions and tensor methods.

    A module of a known class is one node of the graph. A name holds for the function, the method, its in-place form
    and its operator: ``"add"`` is torch.add, x.add, x.add_, x + y and x += y. `weighted` kinds start a freeze unit
    (METHOD: convolution, linear, attention); the others belong to their producer's.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, function))
        if weighted:
            _WEIGHTED.update(dict.fromkeys(kinds, weighted if callable(weighted) else lambda op: True))
        return function

    return register


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node of the graph: it has a rule, or is a layer of torch's without parts."""
    if _module_kind(module) is not None:
        return True
    holds_others = isinstance(module, nn.Sequential) or any(True for _ in module.children())
    return type(module).__module__.startswith("torch.nn.") and not holds_others


def _module_kind(module: nn.Module) -> type | None:
    """The class whose rule holds for a module: its own, or one whose forward it inherits."""
    for kind in type(module).__mro__:
        if kind in _RULES and getattr(kind, "forward", None) is type(module).forward:
            return kind
    return None


def kind_of(node: fx.Node, module: nn.Module | None) -> Any:
    """The key of a node's rule: its module's class, or the plain name of its function or method."""
    if module is not None:
        return _module_kind(module)
    if node.target is getattr:
        return str(node.args[1])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return plain_name(name)


_ARITHMETIC = "add|sub|mul|truediv|floordiv|matmul|pow|mod|neg|eq|ne|lt|le|gt|ge|and|or|invert"
_OPERATOR = re.compile(rf"^__[ri]?({_ARITHMETIC}|getitem|setitem)__$")


def plain_name(name: str) -> str:
    """A function's or method's name without in-place marks and operator forms.

    >>> plain_name("__iadd__"), plain_name("relu_"), plain_name("__getitem__")
    ('add', 'relu', 'getitem')
    """
    dunder = _OPERATOR.match(name)
    return dunder.group(1) if dunder else name.removesuffix("_")


def kind_name(node: fx.Node, module: nn.Module | None) -> str:
    """A node's kind for a message."""
    return type(module).__name__ if module is not None else str(kind_of(node, None))


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule:
    """A node's rule.

    Raises:
        UnsupportedLayerError: its kind has none.
    """
    kind = kind_of(node, module)
    if kind not in _RULES:
        raise refusal(node, kind_name(node, module), "has no width rule", hint=True)
    return _RULES[kind]


def is_weighted(op: Operator) -> bool:
    """Whether an operator starts a freeze unit."""
    weighted = _WEIGHTED.get(kind_of(op.node, op.module))
    return weighted is not None and weighted(op)


def refusal(node: fx.Node, kind: str, why: str, hint: bool = False) -> UnsupportedLayerError:
    """The error for an operator that is not understood, with its place and kind."""
    key = kind if node.op == "call_module" else f'"{kind}"'
    advice = f"; teach it with @slt_planner.graph.widths.rule({key}) (README, Your own network) or replace the layer"
    return UnsupportedLayerError(f"{where(node)}: {kind} {why}{advice if hint else ''}")


def scaled_width(count: int, head_scale: float) -> int:
    """Width of a head layer: max(1, floor(s * C)), with 1e-9 so that k/C gives k in floating point.

    >>> scaled_width(16, 0.5), scaled_width(16, 1 / 64), scaled_width(64, 29 / 64)
    (8, 1, 29)
    """
    return max(1, math.floor(head_scale * count + 1e-9))


def made_by(node: fx.Node, size: int) -> Dimension:
    """The full width that a weight-bearing operator gives."""
    return Dimension(size, axis=Axis(frozenset((node.meta.get("twin", node).name,))))
