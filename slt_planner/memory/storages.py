"""All storages of a step as columns, and the most that is live."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from slt_planner.memory.profile import CATEGORIES
from slt_planner.memory.watch import Storage

Column: TypeAlias = NDArray[np.int64]
_NUMBER = {category: number for number, category in enumerate(CATEGORIES)}
TEMPORARIES, ACTIVATIONS = _NUMBER["temporaries"], _NUMBER["activations"]


@dataclass(frozen=True, eq=False)
class Storages:
    """Storages of a step, an entry each: `size` in bytes, the operator it comes with (`begin`, below 0: it was there)
    and the one before which it goes (`end`), its number in CATEGORIES, and whether it is a number's, no tensor's.
    """

    size: Column
    begin: Column
    end: Column
    category: Column
    is_number: NDArray[np.bool_]

    @classmethod
    def of(cls, records: Sequence[Storage]) -> "Storages":
        """Those that were followed; what is saved for backward and nothing else is an activation."""
        return cls(
            np.array([own.size for own in records], dtype=np.int64),
            np.array([own.begin for own in records], dtype=np.int64),
            np.array([own.end for own in records], dtype=np.int64),
            np.array([_category_of(own) for own in records], dtype=np.int64),
            np.array([own.is_number for own in records], dtype=np.bool_),
        )

    @cached_property
    def resident(self) -> NDArray[np.bool_]:
        """Which are there before the step."""
        return self.begin < 0

    def in_blocks(self, block: int) -> "Storages":
        """As an allocator has them that gives out multiples of `block` bytes."""
        return Storages(-(-self.size // block) * block, self.begin, self.end, self.category, self.is_number)

    def tensor_peak(self, calls: int) -> int:
        """The most bytes of tensors that are live at the end of one of so many operators."""
        tensors = ~self.is_number
        changes = _summed(np.maximum(self.begin, 0), np.where(tensors, self.size, 0), calls)
        changes -= _summed(self.end, np.where(tensors, self.size, 0), calls)
        return int(changes[:calls].cumsum().max())

    def born(self, calls: int) -> Column:
        """Bytes that come with each operator."""
        return _summed(self.begin, np.where(self.resident, 0, self.size), calls)[:calls]

    def gone(self, calls: int) -> Column:
        """Bytes that go before each operator."""
        return _summed(self.end, self.size, calls)[:calls]

    def by_category(self, which: NDArray[np.bool_]) -> Column:
        """Bytes of some of them, in the order of CATEGORIES."""
        return _summed(self.category[which], self.size[which], len(CATEGORIES) - 1)


def _category_of(record: Storage) -> int:
    """Its number in CATEGORIES."""
    saved = record.saved_by is not None and record.category == "temporaries"
    return ACTIVATIONS if saved else _NUMBER[record.category]


def _summed(places: Column, sizes: Column, last: int) -> Column:
    """Sums by place, 0 to `last`; what is beyond counts with the last."""
    sums = np.bincount(np.clip(places, 0, last), weights=sizes, minlength=last + 1)
    return sums.astype(np.int64)  # exact: below 2**53
