"""Python's numbers that autograd keeps: x * 2.0 saves the 2.0, as a tensor of 8 bytes, until its backward is done.

A dispatch mode sees a number there, not a tensor; so they are no part of the tensor ruler, but of the allocator's.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

NUMBER_BYTES = 8
SAVING = ("aten::mul", "aten::mul_", "aten::div", "aten::div_")
"""Operators that save a number which they are given as an operand."""

_FUNCTIONS = tuple(getattr(torch.ops.aten, name.removeprefix("aten::")).Tensor for name in SAVING)


class SavedNumbers:
    """Counts the numbers that are kept, operator by operator."""

    def __init__(self) -> None:
        self._kept: Counter[int] = Counter()  # by the sequence number of the node that keeps them
        self._running: int | None = None

    def change(self, function: Any, args: Sequence[Any]) -> int:
        """By how many they become more as this operator is called; negative where a node's backward is done."""
        more = 0
        if self._kept:
            node = torch._C._current_autograd_node()
            number = None if node is None else node._sequence_nr()
            if number != self._running:
                more -= self._kept.pop(self._running, 0)  # type: ignore[arg-type]
                self._running = number
        if (
            function in _FUNCTIONS
            and type(args[1]) in (int, float)
            and args[0].requires_grad
            and torch.is_grad_enabled()
        ):
            self._kept[torch.autograd._get_sequence_nr() - 1] += 1
            more += 1
        return more

    def forget(self) -> int:
        """Nothing is kept any more; gives how many were."""
        kept = self._kept.total()
        self._kept.clear()
        return kept
