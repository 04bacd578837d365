"""How many federated rounds each stage gets."""

from collections.abc import Sequence

from slt_planner.errors import InputError


def rounds_fractions(trainable_parameters: Sequence[int]) -> list[float]:
    """Each stage's share of the rounds, in proportion to its trainable parameters."""
    total = sum(trainable_parameters)
    return [parameters / total for parameters in trainable_parameters]


def deal_rounds(rounds: int, fractions: Sequence[float]) -> list[int]:
    """One round a stage, the rest in proportion by largest remainder.

    >>> deal_rounds(10, [0.1, 0.3, 0.6])
    [2, 3, 5]

    Raises:
        InputError: fewer rounds than stages.
    """
    stages = len(fractions)
    if rounds < stages:
        raise InputError(f"{rounds} rounds for a schedule of {stages} stages; give at least {stages}, one a stage")
    return [1 + share for share in largest_remainder(rounds - stages, fractions)]


def largest_remainder(total: int, fractions: Sequence[float]) -> list[int]:
    """Whole parts of `total` in proportion to `fractions`; equal remainders go to the earlier part.

    >>> largest_remainder(10, [1, 1, 1])
    [4, 3, 3]
    """
    exact = [total * fraction / sum(fractions) for fraction in fractions]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
