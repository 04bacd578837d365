"""Looking on at what autograd saves for the backward pass, which must stay as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from slt_planner.errors import InputError

_CHANGED = "modified by an inplace operation"  # torch's word


def saving_seen(see: Callable[[Tensor], None]) -> torch.autograd.graph.saved_tensors_hooks:
    """While this lasts, `see` is given each tensor that is saved for backward.

    Where hooks look on torch does not check that what was saved has not been changed since; so this does, and raises
    the error that torch would.
    """

    def save(tensor: Tensor) -> tuple[Tensor, int]:
        see(tensor)
        alias = tensor.detach()  # the tensor itself would make a reference cycle with its own grad_fn
        return alias, alias._version

    def give(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:
            raise RuntimeError(f"a tensor that is needed for gradient computation has been {_CHANGED}")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(save, give)


@contextmanager
def changes_in_place_refused() -> Iterator[None]:
    """Autograd's refusal of what was changed since it was saved, in our words.

    Raises:
        InputError: that is what happened.
    """
    try:
        yield
    except RuntimeError as error:
        if _CHANGED not in str(error):
            raise
        raise InputError(
            "the network changes a tensor in place that its backward pass needs as it was, so PyTorch cannot train it; "
            "use operations that are not in place there"
        ) from error
