"""Putting modules and tensors into a module by their dotted names."""

from torch import Tensor, nn


def put_module(root: nn.Module, fqn: str, module: nn.Module) -> None:
    """Register a module under its dotted path, with plain modules on the way."""
    path, _, leaf = fqn.rpartition(".")
    _parent(root, path).add_module(leaf, module)


def put_tensor(root: nn.Module, fqn: str, tensor: Tensor, persistent: bool) -> None:
    """Register a parameter or buffer under its dotted path."""
    path, _, leaf = fqn.rpartition(".")
    parent = _parent(root, path)
    if isinstance(tensor, nn.Parameter):
        parent.register_parameter(leaf, tensor)
    else:
        parent.register_buffer(leaf, tensor, persistent=persistent)


def _parent(root: nn.Module, path: str) -> nn.Module:
    parent = root
    for name in path.split(".") if path else ():
        if name not in parent._modules:
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    return parent
