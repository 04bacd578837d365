"""Recording allocations: what PyTorch's allocator gave out and took back during a piece of work, in order.

Frees of blocks that were allocated before a recording are not reported by the profiler; work whose frees matter must
therefore allocate inside the recording too. On CUDA sizes are those of the blocks that the caching allocator gave.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType, _RecordFunctionFast
from torch.profiler import ProfilerActivity, profile

_ALL = "slt recording"
_MARK = "slt::"
_SPAN = "slt::span "
NO_SPAN = -1


@dataclass(frozen=True)
class Allocation:
    """`size` bytes given out (negative: taken back) at `address`, within the span `span` (NO_SPAN: outside any)."""

    time_ns: int
    address: int
    size: int
    span: int


@dataclass(frozen=True)
class Mark:
    """A point in time that the recorded work named."""

    time_ns: int
    name: str


@dataclass(frozen=True)
class SpanEnd:
    """The end of the span with this number."""

    time_ns: int
    span: int


Event = Allocation | Mark | SpanEnd


def mark(name: str) -> None:
    """Name this point in time in the recording under way."""
    with _RecordFunctionFast(_MARK + name):
        pass


def span(number: int) -> AbstractContextManager[None]:
    """While this lasts, allocations belong to the span with this number."""
    return _RecordFunctionFast(f"{_SPAN}{number}")


def record(work: Callable[[], None], device: str = "cpu") -> list[Event]:
    """Run `work` and return the allocations on a device, the marks and the ends of spans, in order of time.

    Python's garbage collector waits meanwhile: what it freed of earlier work would be taken for this one's.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        # In one thread and in one event: of what happens outside of events, the profiler's tree has the CPU's alone.
        with (
            torch.autograd.set_multithreading_enabled(False),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
            _RecordFunctionFast(_ALL),
        ):
            work()
    finally:
        if collecting:
            gc.enable()
    assert profiler.profiler is not None
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    return sorted(_flatten(tree, NO_SPAN, device), key=lambda event: event.time_ns)


def peak_growth(events: Iterable[Event]) -> int:
    """The most that live bytes rise above where they began."""
    live = peak = 0
    for event in events:
        if isinstance(event, Allocation):
            live += event.size
            peak = max(peak, live)
    return peak


def _flatten(tree: Sequence[Any], span: int, device: str) -> Iterator[Event]:
    for event in tree:
        if event.tag == _EventType.Allocation:
            block = event.extra_fields
            if block.device.type == device:
                yield Allocation(event.start_time_ns, block.ptr, block.alloc_size, span)
            continue
        inside = span
        if event.name.startswith(_SPAN):
            inside = int(event.name.removeprefix(_SPAN))
            yield SpanEnd(event.end_time_ns, inside)
        elif event.name.startswith(_MARK):
            yield Mark(event.start_time_ns, event.name.removeprefix(_MARK))
        yield from _flatten(event.children, inside, device)
