"""Tensors without values: all that is said of one, and tensors that look like one and own no memory."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._prims_common import (
    compute_required_storage_length,
    make_channels_last_strides_for,
    make_contiguous_strides_for,
    suggest_memory_format,
)

_contiguous = lru_cache(maxsize=10_000)(make_contiguous_strides_for)  # which takes a while, and shapes come again


@lru_cache(maxsize=10_000)
def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    taken_as = suggest_memory_format(torch.empty_strided(shape, stride, device="meta"))
    usual = _contiguous(shape) if taken_as == torch.contiguous_format else make_channels_last_strides_for(shape)
    return tuple(own if size > 1 else like for size, own, like in zip(shape, stride, usual, strict=True))


@dataclass(frozen=True)
class TensorSpec:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor like this that owns its storage."""
        return compute_required_storage_length(self.shape, self.stride, 0) * self.dtype.itemsize

    @property
    def layout(self) -> tuple[int, ...]:
        """The strides as far as they mean something, equal for tensors that kernels take alike.

        Those of dimensions of one entry only say whether an image is one with channels last, where nothing else does.

        >>> TensorSpec.of(torch.empty_strided((2, 1, 4), (4, 7, 1))).layout
        (4, 4, 1)
        """
        return _layout(self.shape, self.stride) if 1 in self.shape else self.stride

    def zeros(self) -> Tensor:
        """A real tensor like this."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).zero_()

    def __str__(self) -> str:
        """Such as ``float32[2, 3]`` when contiguous, else with strides; the device where it is not the CPU.

        >>> print(TensorSpec.of(torch.zeros(2, 3)), TensorSpec.of(torch.zeros(2, 3).T))
        float32[2, 3] float32[3, 2]/[1, 3]
        """
        text = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        if self.layout != _contiguous(self.shape):
            text += f"/{list(self.layout)}"
        return text if self.device.type == "cpu" else f"{text}@{self.device.type}"


class Hollow(Tensor):
    """A tensor without values; it looks like one of its device, and owns a storage of no memory.

    Operators on it are answered by a dispatch mode: outside of one there are none.

    >>> hollow = Hollow.of(TensorSpec.of(torch.zeros(2, 3)))
    >>> hollow.shape, hollow.device, hollow.untyped_storage().nbytes()
    (torch.Size([2, 3]), device(type='cpu'), 24)
    """

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, *call: Any, **_: Any) -> Any:
        """Refuse: there is nothing to compute with."""
        raise RuntimeError(f"{call[0]}: a tensor without values is not for computing")

    @staticmethod
    def of(spec: TensorSpec, storage_bytes: int | None = None) -> "Hollow":
        """A new one; its storage is as large as it must be, or as said."""
        return torch.Tensor._make_wrapper_subclass(
            Hollow, spec.shape, strides=spec.stride, dtype=spec.dtype, device=spec.device, storage_size=storage_bytes
        )

    @staticmethod
    def alias(tensor: Tensor, spec: TensorSpec, offset: int) -> "Hollow":
        """Another tensor in the storage of one."""
        with torch._C._DisableTorchDispatch():
            plain = torch.as_strided(tensor, spec.shape, spec.stride, offset)
            return torch.Tensor._make_subclass(Hollow, plain)


def make_hollow(module: nn.Module, device: torch.device) -> None:
    """Turn parameters and buffers on the meta device into hollow ones on another, shared ones staying shared."""
    made: dict[int, Hollow] = {}

    def hollow(tensor: Tensor) -> Hollow:
        if id(tensor) not in made:
            made[id(tensor)] = own = Hollow.of(replace(TensorSpec.of(tensor), device=device))
            own.requires_grad_(tensor.requires_grad)
            if isinstance(tensor, nn.Parameter):
                own._is_param = True  # as nn.Parameter does with a tensor of another class
        return made[id(tensor)]

    for part in module.modules():
        own: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = hollow(tensor)
