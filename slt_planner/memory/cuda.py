"""What CUDA's caching allocator says of a piece of work, and whether there is a device at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slt_planner.errors import InputError


@dataclass(frozen=True)
class AllocatorBytes:
    """Bytes of blocks that are live, of what was asked for, and of device memory that is held."""

    allocated: int
    requested: int
    reserved: int

    def above(self, before: "AllocatorBytes") -> "AllocatorBytes":
        """What is live beyond an earlier moment; what is held is held by all."""
        return AllocatorBytes(self.allocated - before.allocated, self.requested - before.requested, self.reserved)


def check(device: str) -> None:
    """Raises InputError where a step's device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA device here; use cpu")


def live_now() -> AllocatorBytes:
    """What is live at this moment, with what the matrix library of this thread keeps for ever; nothing else is held."""
    keep_libraries()
    torch.cuda.empty_cache()  # of what earlier work left, blocks would be other ones
    return _read("current")


def keep_libraries() -> None:
    """Start CUDA and its matrix library, whose workspace (32 MiB on Hopper) is then there for the whole process."""
    torch.cuda.init()
    torch.cuda.current_blas_handle()


def peaks_during(work: Callable[[], None]) -> AllocatorBytes:
    """Run `work` and read its peaks."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what earlier work left reserved is not this one's
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return _read("peak")


def _read(what: str) -> AllocatorBytes:
    stats = torch.cuda.memory_stats()
    return AllocatorBytes(*[stats[f"{kind}_bytes.all.{what}"] for kind in ("allocated", "requested", "reserved")])


@contextmanager
def cap(more_bytes: int) -> Iterator[None]:
    """Let the allocator reserve no more than it has now and `more_bytes`, while this lasts."""
    keep_libraries()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
