"""Recording what a network computes: its forward pass runs once on the meta device and every call becomes a node.

Unlike symbolic tracing, sizes are numbers while it runs, so a network may compute with them and branch on them. What
grows with the batch is found by recording twice, with two batch sizes: see `record`.
"""

import inspect
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slt_planner.errors import InputError, SltError, UnsupportedLayerError
from slt_planner.graph.region import Dimension

BATCHES = (3, 7)
"""Two sizes that tell B, B * n and n apart, and in which B // n cannot hide."""

WHOLE = "the network"
_UNREGISTERED = "uses a tensor that is neither a parameter nor a buffer; register it as a buffer"

# Some of Tensor's methods are functions of another name: x ** 2 is torch._tensor.pow.
_METHOD_NAMES = {
    method: name
    for name in dir(Tensor)
    if isinstance(method := inspect.getattr_static(Tensor, name), Hashable) and callable(method)
}

# What is no call of a torch function with a result, and would be lost in a recording.
_UNSEEN = {"_set_grad_enabled": "switches gradients on or off", "register_hook": "puts a hook on a tensor"}
_NOT_CALLS: tuple[tuple[Any, str, str], ...] = (
    (torch.autocast, "__enter__", "computes in another precision by itself (autocast)"),
    (torch.autograd.Function, "apply", "has a backward of its own (torch.autograd.Function)"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "changes what is saved for backward (checkpointing)"),
)

IsLeaf: TypeAlias = Callable[[nn.Module], bool]
"""Whether a module stays whole, one node of the graph, instead of being followed into its forward."""


def record(
    skeleton: nn.Module, inputs: Callable[[int], Sequence[Tensor]], is_leaf: IsLeaf, part: str = ""
) -> tuple[fx.Graph, pytree.TreeSpec]:
    """The calls of a network's forward pass in its present mode, and how its outputs are nested.

    Nodes that give tensors carry ``meta["dims"]``: a tuple of `Dimension` (a tuple of such tuples where a call
    gives several tensors), and ``meta["in_place"]``: what a call gives is what it was given. Sizes that were
    computed from the batch size are computed from it again.

    Args:
        skeleton: the network on the meta device.
        inputs: from a batch size to the network's arguments, on the meta device.
        is_leaf: which modules stay whole.
        part: the fqn of the module to record, if not all of the network; names stay those in the network.

    Raises:
        UnsupportedLayerError: what it computes depends on values, or on the batch size in another way than in
            proportion.
        InputError: the network does not take these inputs.
    """
    first, second = (_record_once(skeleton, inputs(batch), is_leaf, part) for batch in BATCHES)
    if [(n.op, n.target) for n in first.graph.nodes] != [(n.op, n.target) for n in second.graph.nodes]:
        raise UnsupportedLayerError("what the network does depends on the batch size")
    _join(first.graph, second.graph)
    return first.graph, first.structure


def _record_once(skeleton: nn.Module, inputs: Sequence[Tensor], is_leaf: IsLeaf, part: str) -> "_Recorder":
    recorder = _Recorder(skeleton, is_leaf, inputs)
    given = " and ".join("x".join(map(str, value.shape[1:])) for value in inputs)
    with torch.no_grad(), torch.device("meta"), recorder.following_modules(), recorder:
        try:
            outputs = skeleton.get_submodule(part)(*inputs)
        except SltError:
            raise
        except NotImplementedError as error:  # what torch says where a value is asked of a meta tensor
            raise UnsupportedLayerError(
                f"{recorder.place}: what it computes depends on values: {first_line(error)}"
            ) from error
        except Exception as error:  # shapes that do not fit surface as whatever the failing operator raises
            if "expected device meta" in str(error):
                raise UnsupportedLayerError(f"{recorder.place}: {_UNREGISTERED}") from error
            if "meta" in str(error):
                raise UnsupportedLayerError(
                    f"{recorder.place}: what it computes depends on values: {first_line(error)}"
                ) from error
            raise InputError(
                f"the network does not take inputs of {given}: {recorder.place}: {first_line(error)}"
            ) from error
    recorder.finish(outputs)
    return recorder


class _Recorder(TorchFunctionMode):
    """Writes down every call that gives tensors; tensors are known by identity."""

    def __init__(self, skeleton: nn.Module, is_leaf: IsLeaf, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.structure: pytree.TreeSpec
        self.place = WHOLE
        self._is_leaf = is_leaf
        self._inside_leaf = False
        self._device: fx.Node | None = None
        self._names = {id(module): name for name, module in skeleton.named_modules()}
        self._stored = {id(t): name for name, t in [*skeleton.named_parameters(), *skeleton.named_buffers()]}
        self._alive: list[Tensor] = []  # an id is a tensor's only as long as it lives
        self._node_of: dict[int, fx.Node] = {}
        for number, value in enumerate(inputs):
            self._know(value, self.graph.placeholder(f"input_{number}" if number else "x"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside_leaf:
            self._write_call(func, args, kwargs, result)
        return result

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """While this lasts, calls of leaf modules are written down whole."""
        plain_call = nn.Module.__call__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = recorder._names.get(id(module))
            if recorder._inside_leaf or name is None:
                return plain_call(module, *args, **kwargs)
            before, recorder.place = recorder.place, name or WHOLE
            if not recorder._is_leaf(module):
                result = plain_call(module, *args, **kwargs)
            else:
                recorder._inside_leaf = True
                try:
                    result = plain_call(module, *args, **kwargs)
                finally:
                    recorder._inside_leaf = False
                recorder._write("call_module", name, args, kwargs, result)
            recorder.place = before  # not restored after an error, which is told with its place
            return result

        def refuse(what: str) -> Callable[..., Any]:
            def refused(*args: Any, **kwargs: Any) -> Any:
                raise UnsupportedLayerError(f"{recorder.place}: {what}, which a plan cannot follow")

            return refused

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(nn.Module, "__call__", call))
            for owner, attribute, what in _NOT_CALLS:
                patches.enter_context(mock.patch.object(owner, attribute, refuse(what)))
            yield

    def finish(self, outputs: Any) -> None:
        """Write the output node: a tuple of all tensors in the outputs, in order; others are kept as they are."""
        leaves, self.structure = pytree.tree_flatten(outputs)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise UnsupportedLayerError(
                    f"the network gives {type(leaf).__name__}; give tensors, or tuples, lists and dicts of them"
                )
        self.graph.output(tuple(self._argument(leaf) for leaf in leaves))

    def _write_call(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", "")
        if name in _UNSEEN:
            raise UnsupportedLayerError(f"{self.place}: {_UNSEEN[name]}, which a plan cannot follow")
        if name == "__setitem__":
            self._write("call_function", assigned, args, kwargs, args[0])
        elif not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return
        elif name == "__get__":  # an attribute such as x.T
            self._write("call_function", getattr, (args[0], func.__self__.__name__), {}, result)
        elif func in _METHOD_NAMES:
            self._write("call_method", _METHOD_NAMES[func], args, kwargs, result)
        else:
            self._write("call_function", func, args, kwargs, result)

    def _write(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        node = self.graph.create_node(op, target, self._arguments(args), self._arguments(kwargs))
        node.meta["place"] = self.place
        node.meta["in_place"] = any(result is value for value in args)  # or it does nothing
        self._know(result, node)

    def _know(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._alive.append(result)
            self._node_of[id(result)] = node
            node.meta["sizes"] = tuple(result.shape)
        elif isinstance(result, (tuple, list)):
            node.meta["sizes"] = tuple(tuple(t.shape) if isinstance(t, Tensor) else None for t in result)
            for number, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._know(item, self.graph.call_function(operator.getitem, (node, number)))
        else:
            raise UnsupportedLayerError(f"{self.place}: gives {type(result).__name__}, not tensors")

    def _arguments(self, arguments: Any) -> Any:
        return fx.node.map_aggregate(arguments, self._argument)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._node_of:
                self._know(value, self._stored_tensor(value))
            return self._node_of[id(value)]
        if isinstance(value, torch.device) and value.type == "meta":
            return self._device_node()
        return value.item() if isinstance(value, np.generic) else value

    def _stored_tensor(self, value: Tensor) -> fx.Node:
        if id(value) not in self._stored:
            raise UnsupportedLayerError(f"{self.place}: {_UNREGISTERED}")
        return self.graph.create_node("get_attr", self._stored[id(value)])

    def _device_node(self) -> fx.Node:
        if self._device is None:
            first, *_ = self.graph.nodes
            with self.graph.inserting_after(_last_placeholder(self.graph)):
                self._device = self.graph.call_function(getattr, (first, "device"))
        return self._device


def _join(graph: fx.Graph, other: fx.Graph) -> None:
    """Make one graph of two that differ in the batch size alone: `graph` becomes right for any."""
    twin = dict(zip(graph.nodes, other.nodes, strict=True))
    sizes = _BatchSizes(graph)
    for node, same in twin.items():
        node.args = sizes.joined(node.args, same.args, node)
        node.kwargs = sizes.joined(node.kwargs, same.kwargs, node)
        if "sizes" in node.meta:
            node.meta["dims"] = _dimensions(node.meta.pop("sizes"), same.meta["sizes"], node)


class _BatchSizes:
    """Numbers that differ between the two recordings, as expressions of the batch size."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._known: dict[tuple[int, int], fx.Node] = {}

    def joined(self, one: Any, other: Any, node: fx.Node) -> Any:
        """`one` and `other` as one argument."""
        if isinstance(one, fx.Node):
            return one
        if isinstance(one, (tuple, list)):
            return type(one)(self.joined(a, b, node) for a, b in zip(one, other, strict=True))
        if isinstance(one, dict):
            return {key: self.joined(value, other[key], node) for key, value in one.items()}
        if isinstance(one, slice):
            return slice(*(self.joined(getattr(one, k), getattr(other, k), node) for k in ("start", "stop", "step")))
        if isinstance(one, int) and one != other:
            return self._expression(*_in_proportion(one, other, node))
        if one != other:
            raise UnsupportedLayerError(f"{where(node)}: {one!r} depends on the batch size")
        return one

    def _expression(self, factor: int, constant: int) -> fx.Node:
        if not self._known:
            first, *_ = self._graph.nodes
            with self._graph.inserting_after(_last_placeholder(self._graph)):
                self._known[1, 0] = self._graph.call_method("size", (first, 0))
        if (factor, constant) not in self._known:
            with self._graph.inserting_after(self._known[1, 0]):
                product = self._graph.call_function(operator.mul, (self._known[1, 0], factor))
            with self._graph.inserting_after(product):
                self._known[factor, constant] = self._graph.call_function(operator.add, (product, constant))
        return self._known[factor, constant]


def _in_proportion(one: int, other: int, node: fx.Node) -> tuple[int, int]:
    """(a, c) of a * B + c."""
    factor, rest = divmod(other - one, BATCHES[1] - BATCHES[0])
    if rest:
        raise UnsupportedLayerError(f"{where(node)}: a size depends on the batch size, and not in proportion")
    return factor, one - factor * BATCHES[0]


def _dimensions(one: Any, other: Any, node: fx.Node) -> Any:
    if one is None:
        return None
    if any(isinstance(size, tuple) or size is None for size in one):
        return tuple(_dimensions(a, b, node) for a, b in zip(one, other, strict=True))
    return tuple(_dimension(a, b, node) for a, b in zip(one, other, strict=True))


def _dimension(one: int, other: int, node: fx.Node) -> Dimension:
    if one == other:
        return Dimension(one)
    factor, constant = _in_proportion(one, other, node)
    if constant:
        raise UnsupportedLayerError(f"{where(node)}: a dimension is the batch size plus {constant}")
    return Dimension(factor, batched=True)


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """x[index] = value, as an expression."""
    x[index] = value
    return x


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def where(node: fx.Node) -> str:
    """The place of a node in the network, for a message."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return str(node.meta.get("place", node.name))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
