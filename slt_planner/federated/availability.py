"""Which of the chosen clients answer: dropped-out clients and stragglers, simulated by chance."""

from typing import Literal

import numpy as np

Answer = Literal["in_time", "late", "never", "failed"]
"""A client that fails was reached and has told so; that is never simulated."""

_STREAM = 0x616E7377  # keeps these draws apart from those made for (seed, round, client)


def answer(seed: int, round_number: int, client: int, client_dropout: float, stragglers: float) -> Answer:
    """How a chosen client answers in a round: never with probability `client_dropout`, else late with `stragglers`.

    Derived from (seed, round, client) alone, so that it is the same whoever asks, and in whatever order.

    >>> answer(seed=0, round_number=1, client=5, client_dropout=0.0, stragglers=0.0)
    'in_time'
    """
    lost, slow = np.random.default_rng([seed, _STREAM, round_number, client]).random(2)
    if lost < client_dropout:
        return "never"
    return "late" if slow < stragglers else "in_time"
