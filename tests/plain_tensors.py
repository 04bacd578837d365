"""The tensor ruler counted another way: a plain training loop on real tensors, and C++'s own word on which still live.

Nothing of slt_planner is used here. A storage counts from the first operator that takes or gives it; whether it is
still there is asked of torch's weak pointers to storages after every operator.
"""

import copy
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plain_measure import backward


def plain_tensor_peak(
    module: nn.Module,
    batch: int,
    shape: tuple[int, ...] = (3, 32, 32),
    classes: int = 10,
    optimizer: str = "sgd",
    precision: str = "fp32",
    memory_format: str = "contiguous",
    set_to_none: bool = True,
    foreach: bool = False,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    micro_batch: int | None = None,
) -> int:
    """The most bytes of live storages after any operator of the second step."""
    number = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    module = copy.deepcopy(module).to(number).train()
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    updates: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(trained, 0.1, momentum, weight_decay=weight_decay, foreach=foreach),
        "adam": lambda: torch.optim.Adam(trained, 0.1, weight_decay=weight_decay, foreach=foreach),
        "adamw": lambda: torch.optim.AdamW(trained, 0.1, weight_decay=weight_decay, foreach=foreach),
    }[optimizer]()

    def step() -> None:
        images = torch.randn(batch, *shape)
        labels = torch.randint(classes, (batch,))
        taken = images.to(number).contiguous(memory_format=layout) if len(shape) == 3 else images.to(number)
        del images
        updates.zero_grad(set_to_none=set_to_none)
        loss = backward(module, taken, labels, micro_batch, autocast=precision == "autocast")
        updates.step()
        del loss

    step()
    states = [value for state in updates.state.values() for value in state.values()]
    ruler = _Ruler([*module.parameters(), *module.buffers(), *states])
    ruler.see([parameter.grad for parameter in trained])
    del states
    gc.disable()  # what is in a reference cycle lives on, or all would depend on when Python looks
    try:
        with ruler:
            step()
    finally:
        gc.enable()
    return ruler.peak


class _Ruler(TorchDispatchMode):
    """Sums up live storages after each operator."""

    def __init__(self, lasting: list[Any]) -> None:
        """`lasting` are tensors that stay during the whole step."""
        super().__init__()
        storages = [value.untyped_storage() for value in lasting if isinstance(value, Tensor)]
        self._lasting = {storage._cdata: storage.nbytes() for storage in storages}
        self._coming: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self._base = sum(self._lasting.values())

    def see(self, values: Iterable[Any]) -> None:
        """Storages of tensors, wherever they are in lists; while one is watched no other has its address."""
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._lasting and storage._cdata not in self._coming:
                    self._coming[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            elif isinstance(value, list | tuple):
                self.see(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self.see([*args, *kwargs.values(), outputs])
        self._coming = {address: entry for address, entry in self._coming.items() if not entry[0].expired()}
        self.peak = max(self.peak, self._base + sum(size for _, size in self._coming.values()))
        return outputs
