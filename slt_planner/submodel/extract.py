"""From a ModelGraph and a Config to a SubModel: the same mathematics with a frozen prefix and a scaled head."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slt_planner.config import Config, Norms
from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.graph.widths import Cut, Index
from slt_planner.submodel.slices import take


@dataclass(frozen=True)
class Extraction:
    """How a sub-model was cut, and which of its modules (by fqn) are frozen."""

    graph: ModelGraph
    config: Config
    norms: Norms
    frozen: frozenset[str]


class SubModel(nn.Module):
    """A network cut to a configuration; a copy that shares nothing with the model it came from.

    Its modules and parameters have the fqns of the original's. Parameters of frozen units have ``requires_grad``
    False. With `static` norms batch statistics are used in training and evaluation; with `running` norms the frozen
    ones stay in evaluation mode.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], programs: Mapping[bool, fx.Graph], extraction: Extraction
    ) -> None:
        super().__init__()
        self.extraction = extraction
        for fqn, module in modules.items():
            _put_module(self, fqn, module)
        # Only the compiled functions are kept, made from the weightless skeleton: a GraphModule is in a reference cycle
        # and what it holds would wait for the garbage collector.
        skeleton = extraction.graph.skeleton
        self._forwards = {mode: type(fx.GraphModule(skeleton, program)).forward for mode, program in programs.items()}
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) inputs to (N, classes)."""
        return self._forwards[self.training](self, x)

    def train(self, mode: bool = True) -> "SubModel":
        """As torch's; running statistics of frozen norms never move."""
        super().train(mode)
        for fqn in self.extraction.frozen:
            module = self.get_submodule(fqn)
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.eval()
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """What a client sends back: trained parameters, and buffers beside them, by fqn; views, not copies."""
        frozen = tuple(f"{fqn}." for fqn in self.extraction.frozen)
        return {name: value for name, value in self.state_dict().items() if not name.startswith(frozen)}


def extract(
    graph: ModelGraph,
    model: nn.Module | Mapping[str, Tensor] | None,
    config: Config,
    norms: Norms = "static",
) -> SubModel:
    """Cut a trainable sub-model out of a network (METHOD: units and widths).

    Args:
        graph: the network's traced structure.
        model: the network, or its state dict, to copy values from; None fills in values of its own, for measuring.
        config: what is frozen, trained at full width, and scaled.
        norms: ``static`` (batch statistics always) or ``running``.

    Raises:
        InputError: `model` does not have the graph's parameters, or the configuration goes beyond its units.

    >>> from slt_planner.graph.trace import trace
    >>> from slt_planner.models.registry import load_model
    >>> model = load_model("resnet20")
    >>> sub = extract(trace(model, (3, 32, 32)), model, Config(freeze_depth=4, full_depth=5, head_scale=0.5))
    >>> tuple(sub.fc.weight.shape)
    (10, 32)
    """
    indices = tensor_indices(graph, config)
    state = _checked_state(graph, model)
    units = graph.unit_of_module()
    attributes = _module_attributes(graph, config)
    modules = {fqn: _cut_module(graph.modules[fqn], fqn, attributes[fqn], indices, state, norms) for fqn in attributes}
    frozen = frozenset(fqn for fqn, unit in units.items() if unit <= config.freeze_depth)
    for fqn in frozen:
        modules[fqn].requires_grad_(False)
    programs = {mode: _cut_program(program, graph.cuts(config, mode)) for mode, program in graph.programs.items()}
    return SubModel(modules, programs, Extraction(graph, config, norms, frozen))


def tensor_indices(graph: ModelGraph, config: Config) -> dict[str, Index]:
    """Which entries of each parameter and buffer (by fqn) a sub-model holds."""
    return {
        f"{node.target}.{name}": index
        for node, cut in graph.cuts(config).items()
        if node.op == "call_module"
        for name, index in cut.parameters.items()
    }


def _module_attributes(graph: ModelGraph, config: Config) -> dict[str, Mapping[str, int]]:
    """Every module that is called, in any mode, with the sizes its copy gets."""
    return {
        str(node.target): cut.attributes
        for mode in (False, True)
        for node, cut in graph.cuts(config, mode).items()
        if node.op == "call_module"
    }


def _checked_state(graph: ModelGraph, model: nn.Module | Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    if model is None:
        return None
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, expected in graph.skeleton.state_dict().items():
        if name not in state:
            raise InputError(f"the model has no {name}; it is not the network that was traced")
        if state[name].shape != expected.shape:
            raise InputError(f"{name} has shape {tuple(state[name].shape)}, traced was {tuple(expected.shape)}")
    return state


def _cut_module(
    skeleton: nn.Module,
    fqn: str,
    attributes: Mapping[str, int],
    indices: Mapping[str, Index],
    state: Mapping[str, Tensor] | None,
    norms: Norms,
) -> nn.Module:
    """A copy of one leaf module with its sizes and tensors cut."""
    module = copy.deepcopy(skeleton)
    for name, size in attributes.items():
        setattr(module, name, size)
    if norms == "static" and isinstance(module, _BatchNorm):
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        index = indices.get(f"{fqn}.{name}", ())
        value = _synthetic(old, index, name) if state is None else take(state[f"{fqn}.{name}"], index)
        setattr(module, name, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)
    return module


def _synthetic(like: Tensor, index: Index, name: str) -> Tensor:
    """Values for measuring, harmless in any network: small weights, and norms that change nothing."""
    shape = [len(kept) for kept in index] + list(like.shape[len(index) :])
    if len(shape) > 1:
        return torch.randn(shape, dtype=like.dtype) * 0.05
    return torch.full(shape, 0 if name in ("bias", "running_mean") else 1, dtype=like.dtype)


def _cut_program(program: fx.Graph, cuts: Mapping[fx.Node, Cut]) -> fx.Graph:
    """A copy of a traced program in which inputs are cut to the channels that their operator takes."""
    copied = fx.Graph()
    copy_of: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        sources = node.all_input_nodes
        wanted = cuts[node].inputs
        narrowed = {
            source: copied.call_function(torch.narrow, (copy_of[source], 1, 0, len(taken)))
            for source, taken in zip(sources, wanted, strict=True)
            if _is_cut(cuts[source].output, taken, node)
        }
        copy_of[node] = copied.node_copy(node, lambda n: narrowed.get(n, copy_of[n]))  # noqa: B023
    copied.lint()
    return copied


def _is_cut(given: tuple[int, ...], taken: tuple[int, ...], node: fx.Node) -> bool:
    if given == taken:
        return False
    if given[: len(taken)] != taken:
        raise InputError(f"{node.name}: takes channels that are not the first ones its producer gives")
    return True


def _put_module(root: nn.Module, fqn: str, module: nn.Module) -> None:
    """Register a module under its dotted path, with plain modules on the way."""
    *path, leaf = fqn.split(".")
    parent = root
    for name in path:
        if name not in parent._modules:
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(leaf, module)
