"""Which client holds which training images."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.errors import InputError

Indices = NDArray[np.int64]

_STREAM = 0x70617274  # beside the seed, keeps these draws apart from those made for (seed, round, client)
_LARGEST_ALPHA = 1e300  # even mixes to the last bit; beyond it the sum of the gamma draws overflows


def partition(labels: Tensor | NDArray[np.integer], clients: int, scheme: str, seed: int) -> list[Indices]:
    """Indices of each client's samples: every sample at exactly one client, sizes that differ by at most one.

    `labels` is (N,), integers; for ``iid`` also (N, ...), such as those of pixels. `scheme` is ``iid`` (shuffled)
    or ``dirichlet:ALPHA``: each client's mix of classes is drawn from a symmetric Dirichlet distribution over the
    classes there are, and its samples are drawn by that mix without replacement; once a class runs out, its
    probability goes to the others in proportion. Small ALPHA: few classes a client; large ALPHA: even mixes, as
    far as samples last. The same `seed` (0 or more) gives the same parts; each is an int64 array in shuffled order.

    Raises:
        InputError: an unknown scheme, an ALPHA that is not a positive finite number, no client, fewer than two
            samples a client, or ``dirichlet`` with labels that are not one class a sample.
    """
    if clients < 1:
        raise InputError(f"partition over {clients} clients; give at least 1")
    alpha = _parse_scheme(scheme)
    samples = np.asarray(labels)
    if alpha is not None and samples.ndim > 1:
        shape = "x".join(str(size) for size in samples.shape[1:])
        raise InputError(
            f"partition {scheme!r} goes by the class of each image, and here each has labels of {shape}, not one "
            "class; use iid"
        )
    if len(samples) < 2 * clients:
        raise InputError(
            f"{len(samples)} training samples are too few for {clients} clients, which need at least 2 each; "
            f"give at most {len(samples) // 2} clients"
        )
    rng = np.random.default_rng([seed, _STREAM])
    if alpha is None:
        return np.array_split(rng.permutation(len(samples)), clients)
    return _dirichlet(samples, clients, alpha, rng)


def _parse_scheme(scheme: str) -> float | None:
    """ALPHA of ``dirichlet:ALPHA``, None for ``iid``."""
    if scheme == "iid":
        return None
    kind, _, number = scheme.partition(":")
    if kind != "dirichlet":
        raise InputError(f"unknown partition {scheme!r}; known are iid and dirichlet:ALPHA, such as dirichlet:0.1")
    try:
        alpha = float(number)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise InputError(f"partition {scheme!r}: ALPHA must be a positive finite number, such as 0.1, not {number!r}")
    return alpha


def _dirichlet(labels: NDArray[np.integer], clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """`partition` by class mixes: client after client takes its samples from shuffled piles, one a class."""
    classes, pile_sizes = np.unique(labels, return_counts=True)
    piles = [rng.permutation(np.flatnonzero(labels == name)) for name in classes]
    left = pile_sizes.astype(np.int64)
    parts = []
    for client in range(clients):
        size = len(labels) // clients + (client < len(labels) % clients)
        taken = _draw_counts(size, left, min(alpha, _LARGEST_ALPHA), rng)
        ends = zip(piles, left - taken, left, strict=True)
        parts.append(rng.permutation(np.concatenate([pile[start:stop] for pile, start, stop in ends])))
        left = left - taken
    return parts


def _draw_counts(size: int, left: NDArray[np.int64], alpha: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many samples of each class a client of `size` samples takes, of the `left` ones.

    Draws `size` classes at once, drops those drawn beyond what is left, and draws again for the missing ones:
    the same law as sample by sample, since only draws of a class that has run out are dropped.
    """
    mix = rng.dirichlet(np.full(len(left), alpha))
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        available = taken < left
        if not mix[available].any():
            # A small alpha rounds the rest to 0; part of a Dirichlet draw, scaled to 1, is such a draw too.
            mix[available] = rng.dirichlet(np.full(int(available.sum()), alpha))
        mix = np.where(available, mix, 0.0)
        mix /= mix.sum()
        taken = np.minimum(taken + rng.multinomial(missing, mix), left)
    return taken
