"""What a measurement or a prediction says: MemoryProfile and its rows. Records only, no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from slt_planner.config import Config, Record, StepSpec
from slt_planner.files import read_record, write_text
from slt_planner.units import LARGEST_BYTES

if TYPE_CHECKING:
    import pandas as pd

Phase = Literal["forward", "backward", "optimizer"]
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


Bytes = Annotated[int, Field(ge=0, le=LARGEST_BYTES)]
Count = Annotated[int, Field(ge=0, le=10**24)]


class UnitRow(Record):
    """One freeze unit's part of a training step; bytes are of the whole batch, multiply-adds and FLOPs of one sample.

    `activations_bytes` are the most that is saved at once: of one micro-batch where there are several.
    In `forward_multiply_adds` a multiply and its add are one, in `training_flops` they are two; both are counted by
    torch.utils.flop_counter: convolutions and matrix products. A frozen unit trains with its forward pass alone.
    """

    index: int = Field(ge=1)
    name: str
    kind: str
    output_shape: tuple[Count, ...]
    parameters: Count
    weights_bytes: Bytes
    activations_bytes: Bytes
    gradients_bytes: Bytes
    optimizer_bytes: Bytes
    forward_multiply_adds: Count
    training_flops: Count | None = None


class TimelinePoint(Record):
    """Live bytes after one allocation or release, what it was, and the operator and unit (0: none) it happened in.

    `time_us` counts from the step's begin; a prediction has no times.
    """

    time_us: float | None = None
    live_bytes: Bytes
    change_bytes: int = Field(ge=-LARGEST_BYTES, le=LARGEST_BYTES)
    category: Category
    operator: str
    unit: Count


class ProcessMemory(Record):
    """Resident set of a fresh process that did nothing but one step: when everything was imported, and at its most."""

    before_bytes: Bytes
    peak_bytes: Bytes


class StepCosts(Record):
    """What a configuration costs beside memory.

    `upload_bytes` are the trained parameters and the running statistics of their norms, if there are any: what a client
    sends back. `download_bytes` are all parameters and buffers of the sub-model. `train_flops_per_sample` counts a
    multiply and an add as two; the frozen part runs forward only.
    """

    trainable_parameters: Count
    upload_bytes: Bytes
    download_bytes: Bytes
    train_flops_per_sample: Count


class MemoryProfile(Record):
    """Peak memory of one steady training step.

    `peak_bytes` is on the allocator ruler: everything PyTorch's allocator had given out at the worst moment, kernels'
    scratch included. `breakdown` is by category at that moment and adds up to it exactly; `resident` is the same at the
    step's begin, before the batch. `tensor_peak_bytes` is on the tensor ruler: live storages at the end of an operator.

    `peak_operator`, `peak_unit` (0: none, or not followed) and `peak_phase` say where in the step that moment is.

    A prediction is `exact` when every operator's scratch memory is known on this device; otherwise `peak_bytes` is the
    tensor peak, and `missing` names the operators.

    On CUDA `requested_bytes` are what tensors and kernels asked for, `peak_bytes` the blocks they got, and
    `reserved_bytes` what the allocator holds of the device; the workspace that cuBLAS keeps is only among the last.
    """

    schema_version: Literal[1] = 1
    model: str | None = None
    config: Config | None = None
    spec: StepSpec | None = None
    peak_bytes: Bytes
    tensor_peak_bytes: Bytes | None = None
    peak_operator: str
    peak_unit: Count = 0
    peak_phase: Phase | None = None
    device: str
    source: Literal["MEASURED", "PREDICTED"] = "MEASURED"
    exact: bool = True
    missing: tuple[str, ...] = ()
    batch_size: Count
    breakdown: dict[Category, Bytes]
    resident: dict[Category, Bytes] | None = None
    requested_bytes: Bytes | None = None
    reserved_bytes: Bytes | None = None
    process: ProcessMemory | None = None
    environment: dict[str, str] | None = None
    units: tuple[UnitRow, ...] = ()
    timeline: tuple[TimelinePoint, ...] = ()

    @model_validator(mode="after")
    def _sums_hold(self) -> "MemoryProfile":
        if sum(self.breakdown.values()) != self.peak_bytes:
            raise ValueError("the breakdown does not add up to the peak")
        return self

    def frame(self) -> "pd.DataFrame":
        """The unit rows as a table, a column a field of `UnitRow`."""
        import pandas as pd

        return pd.DataFrame([row.model_dump() for row in self.units])

    def unit_name(self, index: int) -> str:
        """A unit's name by its number; "" where the profile has no rows or the number is no unit's."""
        return next((row.name for row in self.units if row.index == index), "")

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the profile as JSON, whole or not at all.

        Raises:
            InputError: the file exists and `force` is False, or its folder cannot be written.
        """
        write_text(path, self.model_dump_json(exclude_none=True) + "\n", force=force)


def load_profile(path: str | Path) -> MemoryProfile:
    """Read and check a saved profile.

    Raises:
        InputError: missing, not JSON, or not a valid profile; the message names the first offending field.
    """
    return read_record(path, MemoryProfile, "profile", "slt profile")
