"""Names of networks: name -> module and input shape."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torchvision
from torch import nn

from slt_planner.errors import InputError
from slt_planner.models.resnet_cifar import CifarResNet, Shortcut


@dataclass(frozen=True)
class ModelEntry:
    """A registered network: how to build it for a number of classes, and the shape of one input."""

    build: Callable[[int], nn.Module]
    input_shape: tuple[int, ...]
    num_classes: int


def _cifar_resnets() -> dict[str, ModelEntry]:
    entries = {}
    for depth in (20, 32, 44, 56):
        variants: tuple[tuple[str, Shortcut], ...] = (("", "conv"), ("_pad", "pad"))
        for suffix, shortcut in variants:
            build = partial(CifarResNet, (depth - 2) // 6, shortcut=shortcut)
            entries[f"resnet{depth}{suffix}"] = ModelEntry(build, (3, 32, 32), 10)
    return entries


_REGISTRY = _cifar_resnets()


def model_names() -> tuple[str, ...]:
    """The networks of this package, by name; torchvision's classification networks go by their own names."""
    return tuple(_REGISTRY)


def find_model(name: str) -> ModelEntry:
    """The entry of a name: a network of this package, or one of torchvision's classification networks.

    Raises:
        InputError: no such network; the message names the nearest ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    names = torchvision.models.list_models(module=torchvision.models)
    if name in names:

        def build(classes: int) -> nn.Module:
            return torchvision.models.get_model(name, weights=None, num_classes=classes)

        return ModelEntry(build, (3, 224, 224), 1000)
    near = difflib.get_close_matches(name, [*_REGISTRY, *names], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(_REGISTRY)}"
    raise InputError(f"unknown model {name!r}; {hint}")


def load_model(name: str, num_classes: int | None = None) -> nn.Module:
    """A freshly initialised network by its name.

    Args:
        name: ``resnet20``, ``resnet20_pad`` (parameter-free shortcut), ..., or a torchvision name such as ``resnet50``.
        num_classes: size of the output; the network's own default if None.

    Raises:
        InputError: no such network, or fewer than one class.

    >>> sum(p.numel() for p in load_model("resnet20").parameters())
    292954
    """
    entry = find_model(name)
    classes = entry.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise InputError(f"number of classes {classes}: must be at least 1")
    return entry.build(classes)
