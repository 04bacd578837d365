"""Networks by name, and the user's own by reference."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from slt_planner.errors import InputError
from slt_planner.graph.adapter import Adapter
from slt_planner.models.adapters import AuxiliaryLogits, Detection, Segmentation
from slt_planner.models.convnets import convnet, vgg9
from slt_planner.models.densenet_cifar import CifarDenseNet
from slt_planner.models.names import is_reference
from slt_planner.models.resnet_cifar import CifarResNet, Shortcut

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelEntry:
    """A network by name: how to build it for an input shape and a number of classes, and what it takes by default."""

    build: Callable[[Shape, int], nn.Module]
    input_shape: Shape
    num_classes: int


def _own_networks() -> dict[str, ModelEntry]:
    entries = {}
    for depth in (20, 32, 44, 56, 110):
        variants: tuple[tuple[str, Shortcut], ...] = (("", "conv"), ("_pad", "pad"))
        for suffix, shortcut in variants:
            build = partial(_fixed_size, partial(CifarResNet, (depth - 2) // 6, shortcut=shortcut))
            entries[f"resnet{depth}{suffix}"] = ModelEntry(build, (3, 32, 32), 10)
    entries["densenet40"] = ModelEntry(partial(_fixed_size, partial(CifarDenseNet, 12, 12)), (3, 32, 32), 10)
    entries["vgg9"] = ModelEntry(vgg9, (3, 32, 32), 10)  # type: ignore[arg-type]
    entries["convnet"] = ModelEntry(convnet, (3, 32, 32), 10)  # type: ignore[arg-type]
    entries["vit_cifar"] = ModelEntry(_small_vit, (3, 32, 32), 10)
    return entries


def _fixed_size(build: Callable[..., nn.Module], shape: Shape, classes: int) -> nn.Module:
    return build(num_classes=classes)


def _small_vit(shape: Shape, classes: int) -> nn.Module:
    """Six blocks of three heads, 192 channels, patches of 4x4: 1.8 million parameters at 32x32."""
    return _torchvision().VisionTransformer(
        image_size=shape[-1], patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=384, num_classes=classes
    )


_REGISTRY = _own_networks()


def model_names() -> tuple[str, ...]:
    """The networks of this package, by name; torchvision's go by their own names."""
    return tuple(_REGISTRY)


def torchvision_names() -> tuple[str, ...]:
    """torchvision's classification, segmentation, video and detection networks."""
    models = _torchvision()
    kinds = (models, models.segmentation, models.video, models.detection)
    return tuple(name for kind in kinds for name in models.list_models(module=kind))


def find_model(name: str) -> ModelEntry:
    """The entry of a name: a network of this package, of torchvision's, or of timm's as ``timm:NAME``.

    Raises:
        InputError: no such network; the message names the nearest ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name.startswith("timm:"):
        return _timm_entry(name.removeprefix("timm:"))
    names = torchvision_names()
    if name in names:
        return _torchvision_entry(name)
    for kind in ("optical_flow", "quantization"):
        if _is_a(name, kind):
            raise InputError(f"torchvision's {kind.replace('_', ' ')} networks cannot be planned; {name} is one")
    near = difflib.get_close_matches(name, [*_REGISTRY, *names], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(_REGISTRY)}"
    raise InputError(f"unknown model {name!r}; {hint} (your own: package.module:factory or ./file.py:Class)")


def load_model(
    name: str | nn.Module, num_classes: int | None = None, input_shape: Shape | None = None, weights: bool = True
) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: of this package (``resnet20``, ``densenet40``, ...), of torchvision (``resnet50``), ``timm:NAME``, or the
            user's own: ``package.module:factory`` or ``./file.py:Class``, called with ``num_classes`` if it takes it.
            A module is given back as it is.
        num_classes: size of the output; the network's own default if None.
        input_shape: of one sample; the network's own default if None. Some are built for one size.
        weights: False leaves large parameters without values (on the meta device): enough to trace and plan.

    Raises:
        InputError: no such network, or fewer than one class.

    >>> sum(p.numel() for p in load_model("resnet20").parameters())
    292954
    """
    if isinstance(name, nn.Module):
        return name
    if num_classes is not None and num_classes < 1:
        raise InputError(f"number of classes {num_classes}: must be at least 1")
    if is_reference(name):
        return _referenced(name, num_classes)
    entry = find_model(name)
    build = partial(entry.build, input_shape or entry.input_shape, num_classes or entry.num_classes)
    if weights:
        return build()
    try:
        with Weightless():
            return build()
    except RuntimeError:  # some networks compute with their weights while they are built
        return build()


_RANDOM = (torch.Tensor.uniform_, torch.Tensor.normal_)


class Weightless(TorchFunctionMode):
    """While this is on, ``torch.empty`` (where layers' parameters come from) gives tensors without storage.

    What networks compute while they are built (widths, tables of positions) keeps its values, as it would not on the
    meta device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch's comes by here."""
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif func in _RANDOM and args[0].is_meta:
            return args[0]  # there is nothing to fill, and torch would import its compiler for that
        return func(*args, **kwargs)


def _torchvision() -> Any:
    """torchvision's networks, imported when one is asked for: it takes as long as torch itself."""
    import torchvision

    return torchvision.models


def _torchvision_entry(name: str) -> ModelEntry:
    build = partial(_build_torchvision, name)
    if _is_a(name, "segmentation"):
        return ModelEntry(build, (3, 224, 224), 21)
    if _is_a(name, "detection"):
        return ModelEntry(build, (3, 320, 320), 91)
    if _is_a(name, "video"):
        size = 224 if name.startswith(("mvit", "swin3d", "s3d")) else 112
        return ModelEntry(build, (3, 16, size, size), 400)
    size = 299 if name == "inception_v3" else 224
    return ModelEntry(build, (3, size, size), 1000)


def _is_a(name: str, kind: str) -> bool:
    return name in _torchvision().list_models(module=getattr(_torchvision(), kind))


def _build_torchvision(name: str, shape: Shape, classes: int) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": classes}
    if _is_a(name, "segmentation") or _is_a(name, "detection"):
        arguments["weights_backbone"] = None
    elif name.startswith("vit_"):
        arguments["image_size"] = shape[-1]
    elif name.startswith("maxvit"):
        arguments["input_size"] = shape[-2:]
    elif name in _AUXILIARY_WEIGHTS:
        arguments["init_weights"] = True
    model = _torchvision().get_model(name, weights=None, **arguments)
    adapter = _torchvision_adapter(name, classes)
    if adapter is not None:
        model.slt_adapter = adapter
    return model


# Of the auxiliary heads' losses, as in torchvision's documentation and the two papers.
_AUXILIARY_WEIGHTS = {"googlenet": 0.3, "inception_v3": 0.4}


def _torchvision_adapter(name: str, classes: int) -> Adapter | None:
    """The adapter of a network that does not simply take images and give logits."""
    if name in _AUXILIARY_WEIGHTS:
        return AuxiliaryLogits(_AUXILIARY_WEIGHTS[name])
    if _is_a(name, "segmentation"):
        return Segmentation()
    if _is_a(name, "detection"):
        return Detection(classes, masks=name.startswith("mask"), keypoints=name.startswith("keypoint"))
    return None


def _timm_entry(name: str) -> ModelEntry:
    try:
        import timm
    except ImportError as error:
        raise InputError('timm networks need the extra: pip install "slt-planner[timm]"') from error
    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise InputError(f"unknown timm model {name!r}; did you mean {', '.join(near) or 'another name'}?")
    settings = timm.models.get_pretrained_cfg(name)
    shape, classes = ((3, 224, 224), 1000) if settings is None else (tuple(settings.input_size), settings.num_classes)
    return ModelEntry(partial(_build_timm, name), shape, classes)


def _build_timm(name: str, shape: Shape, classes: int) -> nn.Module:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=classes)
    resize: Any = getattr(model, "set_input_size", None)  # networks with tables of positions are made for one size
    if resize is not None:
        resize(shape[-2:])
    return model


def referenced_object(reference: str, what: str) -> Any:
    """What ``package.module:name`` or ``./file.py:name`` stands for; runs the user's code.

    Raises:
        InputError: no such module, file or name; the message says which.
    """
    source, _, attribute = reference.rpartition(":")
    module = _module_from_file(Path(source), reference) if source.endswith(".py") else _module(source, reference)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise InputError(f"{what} {reference!r}: {source} has no {attribute!r}") from error


def _module(name: str, reference: str) -> ModuleType:
    sys.path.insert(0, "")  # as `python -m` does: modules beside the working directory are found
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"model {reference!r}: cannot import {name}: {error}") from error
    finally:
        sys.path.remove("")


def _module_from_file(path: Path, reference: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"model {reference!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"slt_planner_user_{path.stem}", path)
    assert spec is not None  # a path that ends in .py has one,
    assert spec.loader is not None  # and a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise InputError(f"model {reference!r}: {path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def takes_classes(reference: str) -> bool:
    """Whether the user's own code takes ``num_classes``; it is imported for that."""
    factory = referenced_object(reference, "model")
    return callable(factory) and "num_classes" in inspect.signature(factory).parameters


def _referenced(reference: str, num_classes: int | None) -> nn.Module:
    factory = referenced_object(reference, "model")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise InputError(f"model {reference!r}: not a class or function that builds a network")
    arguments = {}
    if num_classes is not None:
        if "num_classes" not in inspect.signature(factory).parameters:
            raise InputError(f"model {reference!r}: takes no num_classes, so --num-classes cannot be set")
        arguments["num_classes"] = num_classes
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"model {reference!r}: cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {reference!r}: gives {type(model).__name__}, not a torch.nn.Module")
    return model
