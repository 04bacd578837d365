"""Looking on at what autograd saves for the backward pass, which must stay as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from slt_planner.errors import InputError

_CHANGED = "modified by an inplace operation"
_REFUSED = (_CHANGED, "is being modified inplace", "is being used in an in-place operation")  # torch's words


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
            shape = "x".join(map(str, tensor.shape))
            raise RuntimeError(f"a tensor of {shape} that is needed for gradient computation has been {_CHANGED}")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(save, give)


@contextmanager
def changes_in_place_refused() -> Iterator[None]:
    """Autograd's refusals of what is changed in place, in our words.

    Raises:
        InputError: that is what happened.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _REFUSED):
            raise
        raise InputError(
            f"autograd refuses a change in place: {str(error).splitlines()[0].partition('. ')[0]}; use operations that "
            "are not in place there"
        ) from error
