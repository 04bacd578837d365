"""What CUDA's caching allocator says of a piece of work, and whether there is a device at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slt_planner.errors import InputError


@dataclass(frozen=True)
class AllocatorPeaks:
    """The most that was live during a piece of work, in bytes: of blocks, of what was asked for, of device memory."""

    allocated: int
    requested: int
    reserved: int


def check(device: str) -> None:
    """Raises InputError where a step's device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA device here; use cpu")


def allocated() -> int:
    """Bytes of the blocks that are live now."""
    return torch.cuda.memory_allocated()


def peaks_during(work: Callable[[], None]) -> AllocatorPeaks:
    """Run `work` and read its peaks."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what earlier work left reserved is not this one's
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return AllocatorPeaks(
        allocated=stats["allocated_bytes.all.peak"],
        requested=stats["requested_bytes.all.peak"],
        reserved=stats["reserved_bytes.all.peak"],
    )


@contextmanager
def cap(more_bytes: int) -> Iterator[None]:
    """Let the allocator reserve no more than it has now and `more_bytes`, while this lasts."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
