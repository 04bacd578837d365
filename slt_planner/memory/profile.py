"""What a measurement says: MemoryProfile and its rows. Records only, no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from slt_planner.config import Record

if TYPE_CHECKING:
    import pandas as pd

Category = Literal["weights", "buffers", "gradients", "optimizer", "activations", "temporaries", "workspace", "batch"]
CATEGORIES: tuple[Category, ...] = (
    "weights",
    "buffers",
    "gradients",
    "optimizer",
    "activations",
    "temporaries",
    "workspace",
    "batch",
)


class UnitRow(Record):
    """One freeze unit's part of a training step: bytes held, and multiply-adds of its forward pass a sample."""

    index: int = Field(ge=1)
    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    weights_bytes: int
    activations_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    forward_multiply_adds: int


class TimelinePoint(Record):
    """Live bytes after one allocation or release, and the operator it happened in."""

    time_us: float
    live_bytes: int
    operator: str


class MemoryProfile(Record):
    """Peak memory of one steady training step.

    `peak_bytes` is on the allocator ruler: everything PyTorch's allocator had given out at the worst moment, kernels'
    scratch included. `breakdown` is by category at that moment and adds up to it exactly.
    """

    peak_bytes: int
    peak_operator: str
    device: str
    source: Literal["MEASURED"] = "MEASURED"
    batch_size: int
    breakdown: dict[Category, int]
    units: tuple[UnitRow, ...] = ()
    timeline: tuple[TimelinePoint, ...] = ()

    def frame(self) -> "pd.DataFrame":
        """The unit rows as a table, a column a field of `UnitRow`."""
        import pandas as pd

        return pd.DataFrame([row.model_dump() for row in self.units])
