"""Recording allocations on CPU: what PyTorch's allocator gave out and took back during a piece of work, in order.

Frees of blocks that were allocated before a recording are not reported by the profiler; work whose frees matter must
therefore allocate inside the recording too.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "slt::"


@dataclass(frozen=True)
class Allocation:
    """`size` bytes given out (negative: taken back) at address `address`, inside the operator call `call`.

    `call` identifies the outermost ATen operator around it and `operator` is its name; both are empty outside any.
    """

    time_ns: int
    address: int
    size: int
    call: int
    operator: str


@dataclass(frozen=True)
class Mark:
    """A point in time that the recorded work named by `mark`."""

    time_ns: int
    name: str


def mark(name: str) -> None:
    """Name this point in time in the recording under way."""
    with record_function(_MARK + name):
        pass


def record(work: Callable[[], None]) -> tuple[list[Allocation], list[Mark]]:
    """Run `work` and return its allocations and marks, each in order of time.

    Python's garbage collector waits meanwhile: what it freed of earlier work would be taken for this one's.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    finally:
        if collecting:
            gc.enable()
    assert profiler.profiler is not None
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = sorted(_flatten(tree, 0, ""), key=lambda event: event.time_ns)
    allocations = [event for event in events if isinstance(event, Allocation)]
    return allocations, [event for event in events if isinstance(event, Mark)]


def _flatten(tree: Sequence[Any], call: int, operator: str) -> Iterator[Allocation | Mark]:
    for event in tree:
        if event.tag == _EventType.Allocation:
            block = event.extra_fields
            if block.device.type == "cpu":
                yield Allocation(event.start_time_ns, block.ptr, block.alloc_size, call, operator)
            continue
        if event.name.startswith(_MARK):
            yield Mark(event.start_time_ns, event.name.removeprefix(_MARK))
        outermost = not operator and event.name.startswith("aten::")
        inside = (event.id, event.name) if outermost else (call, operator)
        yield from _flatten(event.children, *inside)
