"""Reading allocation histories: of this machine's CPU, and of a CUDA device as its allocator reports them."""

from types import SimpleNamespace

import pytest
import torch
from torch._C._profiler import _EventType

from slt_planner.memory import recording
from slt_planner.memory.cuda import AllocatorBytes
from slt_planner.memory.measure import _as_allocator_says, _History
from slt_planner.memory.recording import Allocation, Mark, SpanEnd
from slt_planner.memory.timeline import Change, find_peak, timeline

BLOCK = 512


def block(time, address, size, device="cuda"):
    where = SimpleNamespace(type=device)
    fields = SimpleNamespace(ptr=address, alloc_size=size, device=where)
    return SimpleNamespace(tag=_EventType.Allocation, start_time_ns=time, extra_fields=fields, children=[])


def call(name, begin, end, *children):
    return SimpleNamespace(
        tag=_EventType.TorchOp, name=name, start_time_ns=begin, end_time_ns=end, children=list(children)
    )


# A step of one weight as CUDA's allocator tells it: blocks are multiples of 512 bytes, kernels' scratch lives and dies
# in one operator, and the host's own allocations are in the same tree.
HISTORY = [
    block(1, 10, 2 * BLOCK),  # the first step leaves the library's workspace
    block(2, 11, BLOCK),  # an old gradient
    call("slt::step", 3, 3),
    call("slt::span 0", 4, 9, block(5, 20, 4 * BLOCK), block(6, 90, 64, "cpu"), block(7, 90, -64, "cpu")),
    call("slt::saved 20 1", 10, 10),
    call("slt::span 1", 12, 20, block(13, 21, 8 * BLOCK), block(14, 22, BLOCK), block(15, 21, -8 * BLOCK)),
    block(21, 20, -4 * BLOCK),
    call("slt::span 2", 22, 30, block(23, 23, BLOCK)),
    block(31, 22, -BLOCK),
    call("slt::end", 40, 40),
]


def recorded_step():
    return SimpleNamespace(
        resident={"weights": 2000, "buffers": 0},
        unaccounted=48,  # four blocks hold 2000 bytes
        known={"gradients": {11, 23}},
        spans=SimpleNamespace(operators=[("aten::mm", 1), ("aten::convolution", 2), ("aten::mm", 1)]),
    )


@pytest.fixture
def history():
    events = sorted(recording._flatten(HISTORY, recording.NO_SPAN, "cuda"), key=lambda event: event.time_ns)
    return _History(recorded_step(), events)


def test_a_cuda_history_is_read_by_device_span_and_mark():
    events = list(recording._flatten(HISTORY, recording.NO_SPAN, "cuda"))
    sizes = [(event.span, event.size // BLOCK) for event in events if isinstance(event, Allocation)]
    assert sizes == [(-1, 2), (-1, 1), (0, 4), (1, 8), (1, 1), (1, -8), (-1, -4), (2, 1), (-1, -1)]
    assert [event.name for event in events if isinstance(event, Mark)] == ["step", "saved 20 1", "end"]
    assert [event.span for event in events if isinstance(event, SpanEnd)] == [0, 1, 2]
    on_host = list(recording._flatten(HISTORY, recording.NO_SPAN, "cpu"))
    assert [event.size for event in on_host if isinstance(event, Allocation)] == [64, -64]


def test_its_peak_is_broken_down(history):
    assert history.resident["weights"] == 2000
    assert history.resident["workspace"] == 48 + 2 * BLOCK
    assert history.resident["gradients"] == BLOCK
    peak = find_peak(history.resident, history.changes)
    assert peak.size == (4 + 2 + 1 + 4 + 8 + 1) * BLOCK
    assert (peak.operator, peak.unit) == ("aten::convolution", 2)
    assert peak.breakdown["activations"] == 4 * BLOCK
    assert peak.breakdown["temporaries"] == BLOCK
    assert peak.breakdown["workspace"] == 48 + (2 + 8) * BLOCK
    assert sum(peak.breakdown.values()) == peak.size
    assert history.saved_by_unit() == {1: 4 * BLOCK}
    assert max(point.live_bytes for point in timeline(history.resident, history.changes)) == peak.size


def test_the_allocators_own_peak_has_the_last_word(history):
    peak = find_peak(history.resident, history.changes)
    told = _as_allocator_says(peak, peak.size + 100)
    assert sum(told.breakdown.values()) == told.size == peak.size + 100
    with pytest.raises(RuntimeError, match="the allocator's peak"):
        _as_allocator_says(peak, peak.size - 1)
    assert AllocatorBytes(10, 8, 20).above(AllocatorBytes(4, 3, 20)) == AllocatorBytes(6, 5, 20)


def test_what_is_alive_at_the_begin_can_be_the_peak():
    peak = find_peak({"weights": 100}, [Change(-50, "weights", "aten::a", 1), Change(20, "batch", "aten::b", 1)])
    assert (peak.size, peak.breakdown["weights"], peak.operator) == (100, 100, "(none)")


def test_growth_is_from_the_begin_and_at_the_highest():
    def work():
        torch.zeros(1000)
        kept.append(torch.zeros(100))
        torch.zeros(500)

    kept = []
    assert recording.peak_growth(recording.record(work)) == 4000
    kept.clear()
    assert recording.peak_growth([]) == 0


def test_numbers_that_a_dispatch_mode_doubles_are_counted_once():
    """x / 3 makes 3 a tensor of 8 bytes once without a mode; with one looking on, outside and inside the span."""
    from slt_planner.memory.measure import _Spans, _without_doubled_numbers

    x = torch.ones(1000)

    def plain():
        recording.mark("step")
        x / 3.0

    def looked_at():
        recording.mark("step")
        with _Spans(None):
            x / 3.0

    def growth(work):
        return recording.peak_growth(_without_doubled_numbers(recording.record(work)))

    assert growth(plain) == growth(looked_at)
    assert recording.peak_growth(recording.record(looked_at)) == growth(looked_at) + 8
