"""A sub-model's training program rewritten with leaner operators.

Each rewriting is a lever of its own (config.LeanLever); what it finds no pattern for stays as it is.
"""

import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import Conv1d, Conv2d, Conv3d

from slt_planner.config import LeanLever
from slt_planner.submodel import lean_operators as lean

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATION_OF: dict[Any, str] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu", "relu": "relu", F.relu_: "relu", "relu_": "relu",
    nn.ReLU6: "relu6", F.relu6: "relu6",
    nn.Hardswish: "hardswish", F.hardswish: "hardswish",
    nn.SiLU: "silu", F.silu: "silu",
}  # fmt: skip
# Operators whose outputs are new tensors, and those whose backward pass gives gradients that nobody else holds.
_GIVES_NEW = (*CONVOLUTIONS, nn.Linear, _BatchNorm)
_GRADIENT_IS_NEW = (*_GIVES_NEW, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.LayerNorm)
# Operators through which a gradient comes to each of their tensors.
_PASSES_ON = (
    *_GRADIENT_IS_NEW, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Dropout, nn.Flatten,
    nn.Identity, nn.GroupNorm,
)  # fmt: skip
_PASSES_ON_BY_FUNCTION = (
    *_SUMS, *[kind for kind in _ACTIVATION_OF if not isinstance(kind, type)], torch.cat, torch.narrow, torch.flatten,
    "flatten", "mean", "mul", operator.mul, torch.mul, operator.getitem, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.dropout, lean.add, lean.batch_norm, lean.convolution, lean.convolutions, lean.with_cut,
)  # fmt: skip
_NEW_BY_FUNCTION = (*_SUMS, lean.batch_norm, lean.batch_norm_in_place, lean.convolution, lean.add_in_place)


def lean_program(
    program: fx.Graph, module: nn.Module, levers: Collection[LeanLever], main: int | None = None
) -> fx.Graph:
    """A copy of a training program in which the levers' rewritings are done.

    Args:
        program: calls of the module's parts; nodes carry ``meta["unit"]``.
        module: says which parameters are trained.
        main: the number of the output that the loss surely depends on; None if there is none.
        levers: what to rewrite. Recomputing and `early_updates` are not for here, but where something is recomputed
            norms are rewritten that keep running statistics, so that those move once.
    """
    return _Rewriting(program, module, levers, main).done()


def trained_nodes(program: fx.Graph, module: nn.Module) -> set[fx.Node]:
    """The nodes whose values have gradients."""
    trained: set[fx.Node] = set()
    for node in program.nodes:
        own: Iterable[Any] = ()
        if node.op == "call_module":
            own = module.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr":
            own = (operator.attrgetter(str(node.target))(module),)
        if any(isinstance(t, Tensor) and t.requires_grad for t in own) or trained & set(node.all_input_nodes):
            trained.add(node)
    return trained


class _Rewriting:
    def __init__(self, program: fx.Graph, module: nn.Module, levers: Collection[LeanLever], main: int | None) -> None:
        self._module, self._levers = module, levers
        self._graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        outputs = self._graph.graph_copy(program, copies)
        self._graph.output(outputs)
        for node, copied in copies.items():
            copied.meta["unit"] = node.meta.get("unit", 0)
        self._trains = trained_nodes(self._graph, module)
        self._surely = self._with_sure_gradients(main)

    def done(self) -> fx.Graph:
        self._skip_identities()
        for node in list(self._graph.nodes):
            if self._is_cut(node) and "copied_cuts" in self._levers:
                self._copy_cut(node)
        for node in list(self._graph.nodes):
            if "in_place_prefix" in self._levers and node not in self._trains and not node._erased:
                self._write_over_inputs(node)
        # From the end: whether a gradient is nobody else's depends on what comes after.
        for node in reversed(list(self._graph.nodes)):
            if node in self._trains:
                self._rewrite_trained(node)
        if "split_convolutions" in self._levers:
            for node in list(self._graph.nodes):
                self._split(node)
        self._graph.lint()
        return self._graph

    def _with_sure_gradients(self, main: int | None) -> set[fx.Node]:
        """The nodes to which a gradient of the main output comes, whatever the loss is made of besides."""
        output = self._graph.output_node()
        leaves: Any = output.args[0]
        if main is None:
            return set()
        surely = {leaves[main]}
        for node in reversed(list(self._graph.nodes)):
            if any(user in surely and self._is(user, _PASSES_ON, _PASSES_ON_BY_FUNCTION) for user in node.users):
                surely.add(node)
        return surely & self._trains

    def _part(self, node: fx.Node) -> nn.Module:
        return self._module.get_submodule(str(node.target))

    def _kind(self, node: fx.Node) -> Any:
        """What is called: a module's class, a function, or a method's name."""
        return type(self._part(node)) if node.op == "call_module" else node.target

    def _is(self, node: fx.Node, modules: tuple[type, ...], functions: tuple[Any, ...] = ()) -> bool:
        if node.op == "call_module":
            return isinstance(self._part(node), modules)
        return node.op in ("call_function", "call_method") and node.target in functions

    def _put(self, before: fx.Node, function: Callable[..., Any], *args: Any, unit_of: fx.Node) -> fx.Node:
        with self._graph.inserting_before(before):
            new = self._graph.call_function(function, args)
        new.meta["unit"] = unit_of.meta["unit"]
        return new

    def _replace(self, old: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        new = self._put(old, function, *args, unit_of=old)
        old.replace_all_uses_with(new)
        self._graph.erase_node(old)
        for nodes in (self._trains, self._surely):
            if old in nodes:
                nodes.add(new)
        return new

    def _stored(self, before: fx.Node, name: str) -> fx.Node | None:
        """A node for a parameter or buffer; None where there is none of that name."""
        path, _, leaf = name.rpartition(".")
        if getattr(self._module.get_submodule(path), leaf) is None:
            return None
        with self._graph.inserting_before(before):
            node = self._graph.create_node("get_attr", name)
        node.meta["unit"] = before.meta["unit"]
        return node

    def _skip_identities(self) -> None:
        for node in list(self._graph.nodes):
            if self._is(node, (nn.Identity,)):
                node.replace_all_uses_with(node.args[0])
                self._graph.erase_node(node)

    # Cuts

    def _is_cut(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target is torch.narrow and node.args[2:3] == (0,)

    def _copy_cut(self, node: fx.Node) -> None:
        source, dim, _, length = node.args
        assert isinstance(source, fx.Node)
        if source.op == "get_attr":
            return
        if node not in self._trains:
            new = self._put(_after(source), lean.copied_cut, source, dim, length, unit_of=source)
            node.replace_all_uses_with(new)
        else:
            others = [user for user in source.users if user is not node]
            pair = self._put(_after(source), lean.with_cut, source, dim, length, unit_of=source)
            cut = self._put(_after(pair), operator.getitem, pair, 1, unit_of=source)
            whole = self._put(_after(pair), operator.getitem, pair, 0, unit_of=source)
            self._trains |= {pair, whole, cut}
            if node in self._surely:
                self._surely |= {pair, cut}
            if not self._surely.isdisjoint(others):
                self._surely |= {pair, whole}
            node.replace_all_uses_with(cut)
            for user in others:
                user.replace_input_with(source, whole)
        self._graph.erase_node(node)

    # The frozen prefix

    def _write_over_inputs(self, node: fx.Node) -> None:
        if self._is(node, (_BatchNorm,)) and self._may_be_written(node.args[0]) and self._is_lean_norm(node):
            self._replace_norm(node, lean.batch_norm_in_place, activation=self._activation_after(node))
        elif self._is(node, (), _SUMS) and (operands := self._operands(node)):
            over = next((x for x in operands if self._may_be_written(x)), None)
            if over is not None:
                other = operands[1] if over is operands[0] else operands[0]
                self._replace(node, lean.add_in_place, over, other, self._activation_after(node))
        elif (own := self._activation(node)) and self._may_be_written(node.args[0]):
            self._replace(node, lean.ACTIVATIONS[own].in_place, node.args[0])

    def _may_be_written(self, value: Any) -> bool:
        """A tensor of its own that only one operator takes."""
        if not isinstance(value, fx.Node) or len(value.users) > 1:
            return False
        if value.target is lean.add:
            return value.args[2] is None  # else it is saved for the activation's gradient
        if value.target in [activation.in_place for activation in lean.ACTIVATIONS.values()]:
            return value not in self._trains  # else it is saved for its gradient
        return self._is(value, _GIVES_NEW, _NEW_BY_FUNCTION)

    # The trained part

    def _rewrite_trained(self, node: fx.Node) -> None:
        if node.op == "call_function" and node.target is lean.with_cut:
            whole = next(user for user in node.users if user.args[1] == 0)
            node.args = (*node.args, self._gradient_is_own(whole))
        wanted = any(lever == "lean_norms" or lever.startswith("recompute") for lever in self._levers)
        if wanted and self._is(node, (_BatchNorm,)) and self._is_lean_norm(node):
            if "lean_norms" in self._levers:
                activation = self._activation_after(node)
                owned = self._gradient_is_own(node)
                self._replace_norm(node, lean.batch_norm, activation=activation, owned=owned)
            elif self._part(node).track_running_stats:
                self._replace_norm(node, lean.batch_norm, activation=None, owned=False)
        elif "lean_norms" in self._levers and self._is(node, (), _SUMS) and (operands := self._operands(node)):
            activation = self._activation_after(node, from_output=True)
            owned = self._gradient_is_own(node)
            first = next((x for x in operands if self._may_be_written(x)), operands[0])
            other = operands[1] if first is operands[0] else operands[0]
            self._replace(node, lean.add, first, other, activation, self._may_be_written(first), owned)

    def _gradient_is_own(self, node: fx.Node) -> bool:
        """Whether nobody else holds the gradient that arrives at a value.

        Where two operators surely give one, autograd has added them up: in a tensor of its own.
        """
        users = [user for user in node.users if user in self._trains]
        giving = [u for u in users if u in self._surely and self._is(u, _PASSES_ON, _PASSES_ON_BY_FUNCTION)]
        return len(giving) > 1 or (bool(users) and all(self._gives_own_gradient(user) for user in users))

    def _gives_own_gradient(self, user: fx.Node) -> bool:
        if self._is(user, _GRADIENT_IS_NEW, (lean.batch_norm, lean.convolution)):
            return True
        if user.op == "call_function" and user.target is lean.add:
            *_, activation, _, owned = user.args
            alone = sum(x in self._trains for x in user.all_input_nodes) == 1
            return alone and (activation is not None or bool(owned))
        if user.op == "call_function" and user.target is lean.with_cut:
            whole = next(x for x in user.users if x.args[1] == 0)
            return self._gradient_is_own(whole) or any(x in self._surely for x in user.users if x.args[1] == 1)
        return False

    def _activation(self, node: fx.Node) -> str | None:
        return _ACTIVATION_OF.get(self._kind(node)) if node.op.startswith("call") and node.args else None

    def _activation_after(self, node: fx.Node, from_output: bool = False) -> str | None:
        """The name of the activation that alone takes a node's value; its node goes, the value stands for both."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        name = self._activation(user)
        if name is None or (from_output and not lean.ACTIVATIONS[name].from_output):
            return None
        user.replace_all_uses_with(node)
        self._graph.erase_node(user)
        return name

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors of a plain sum."""
        first, second = node.args if len(node.args) == 2 else (None, None)
        if node.kwargs or not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        return first, second

    def _is_lean_norm(self, node: fx.Node) -> bool:
        norm = self._part(node)
        if norm.track_running_stats and (norm.momentum is None or (node in self._trains and not norm.training)):
            return False
        return bool(norm.affine and node.args)

    def _replace_norm(self, node: fx.Node, function: Callable[..., Any], **more: Any) -> None:
        norm, name = self._part(node), str(node.target)
        tensors = {leaf: self._stored(node, f"{name}.{leaf}") for leaf in ("weight", "bias")}
        keeps = norm.track_running_stats
        kept = ("running_mean", "running_var", "num_batches_tracked")
        statistics = tuple(self._stored(node, f"{name}.{leaf}") if keeps else None for leaf in kept)
        mode = () if function is lean.batch_norm else (norm.training or not keeps,)
        args = (node.args[0], tensors["weight"], tensors["bias"], statistics, *mode, norm.momentum or 0.0, norm.eps)
        self._replace(node, function, *args, *more.values())

    # Convolutions

    def _split(self, node: fx.Node) -> None:
        """Run a convolution in parts; with it those of the same tensor, whose gradients then meet in one place."""
        if node._erased or not self._may_be_split(node):
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        together = [user for user in source.users if self._may_be_split(user)] if source in self._trains else [node]
        parts: list[Any] = [self._part(own) for own in together]
        settings = [(part.stride, part.padding, part.dilation, part.groups) for part in parts]
        weights, biases = (
            [self._stored(node, f"{own.target}.{leaf}") for own in together] for leaf in ("weight", "bias")
        )
        if len(together) == 1:
            self._replace(node, lean.convolution, source, weights[0], biases[0], settings[0])
            return
        all_of_them = self._put(node, lean.convolutions, source, weights, biases, settings, unit_of=node)
        gives = [self._put(node, operator.getitem, all_of_them, i, unit_of=own) for i, own in enumerate(together)]
        for own, given in zip(together, gives, strict=True):
            own.replace_all_uses_with(given)
            self._graph.erase_node(own)

    def _may_be_split(self, node: fx.Node) -> bool:
        if not self._is(node, CONVOLUTIONS) or not node.args:
            return False
        own: Any = self._part(node)
        plain = any(type(own)._conv_forward is kind._conv_forward for kind in CONVOLUTIONS)
        return plain and own.padding_mode == "zeros" and not isinstance(own.padding, str)


def _after(node: fx.Node) -> fx.Node:
    """The node before which to insert what comes right after this one; inputs stay together."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
