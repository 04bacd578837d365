"""Which client holds which training images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slt_planner.errors import InputError
from slt_planner.files import write_bytes

Indices = NDArray[np.int64]
Labels = Tensor | NDArray[np.integer]

_STREAM = 0x70617274  # beside the seed, keeps these draws apart from those made for (seed, round, client)
_LARGEST_ALPHA = 1e300  # even mixes to the last bit; beyond it the sum of the gamma draws overflows
_KNOWN = "iid, dirichlet:ALPHA (such as dirichlet:0.1), shards:N (such as shards:2) and natural"


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples of each client, as two arrays however many clients there are.

    `order` is (N,), int64: indices of samples, client after client, none twice. `offsets` is (clients + 1,), int64:
    client c holds ``order[offsets[c]:offsets[c + 1]]``, which is what ``partition[c]`` gives, as a view. `left_out`
    counts the groups of a ``natural`` partition that had too few samples to be a client.

    >>> parts = Partition(order=np.array([4, 0, 2, 1]), offsets=np.array([0, 1, 4]))
    >>> len(parts), parts[1].tolist(), parts.sizes.tolist()
    (2, [0, 2, 1], [1, 3])

    Raises:
        InputError: arrays of another type or shape, offsets that do not ascend from 0 to N, an index that is negative
            or there twice.
    """

    order: Indices
    offsets: Indices
    left_out: int = 0

    def __post_init__(self) -> None:
        """Check the arrays."""
        for name, array in (("order", self.order), ("offsets", self.offsets)):
            if array.ndim != 1 or array.dtype != np.int64:
                raise InputError(
                    f"{name} of a partition is {array.dtype} of shape {array.shape}; it must be int64 (N,)"
                )
        if len(self.offsets) < 2 or (np.diff(self.offsets) < 0).any():
            raise InputError("offsets of a partition must ascend, one more than there are clients")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.order):
            raise InputError(
                f"offsets of a partition go from {self.offsets[0]} to {self.offsets[-1]}; they must go from 0 to "
                f"{len(self.order)}, the number of samples"
            )
        ascending = np.sort(self.order)
        if len(ascending) and ascending[0] < 0:
            raise InputError(f"sample {ascending[0]} of a partition is negative; samples count from 0")
        twice = np.flatnonzero(ascending[1:] == ascending[:-1])
        if len(twice):
            raise InputError(f"sample {ascending[twice[0]]} is in a partition twice; a sample has one client")

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> Indices:
        """The samples of one client, a view."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def __iter__(self) -> Iterator[Indices]:
        """The samples of each client."""
        return (self[client] for client in range(len(self)))

    @property
    def sizes(self) -> Indices:
        """Samples of each client, (clients,), int64."""
        return np.diff(self.offsets)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write a safetensors file with the arrays `order` and `offsets`; `load_partition` reads it.

        Raises:
            InputError: the file exists and `force` is False, or it cannot be written.
        """
        from safetensors.numpy import save

        arrays = {"order": self.order, "offsets": self.offsets}
        write_bytes(path, save(arrays, metadata={"left_out": str(self.left_out)}), force=force)


def load_partition(path: str | Path) -> Partition:
    """Read what `Partition.save` wrote.

    Raises:
        InputError: the file is missing, damaged, or not a partition.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            left_out = (file.metadata() or {}).get("left_out", "")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise InputError(f"partition {path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, TypeError) as error:  # TypeError: a number type that numpy lacks
        raise InputError(f"partition {path}: not a safetensors file of a partition, or damaged") from error
    if arrays.keys() != {"order", "offsets"} or not (left_out.isascii() and left_out.isdigit()):
        raise InputError(f"partition {path}: not a partition; it must hold order, offsets and left_out")
    try:
        return Partition(arrays["order"], arrays["offsets"], int(left_out[:18]))
    except InputError as error:
        raise InputError(f"partition {path}: {error}") from error


def counts_by_class(partition: Partition, labels: Labels, num_classes: int, clients: int) -> Indices:
    """How many samples of each class the first clients hold: (at most `clients`, `num_classes`), int64.

    `labels` is (N,), classes 0..num_classes-1 of all samples that were split.

    >>> parts = Partition(order=np.array([3, 0, 2, 1]), offsets=np.array([0, 2, 4]))
    >>> counts_by_class(parts, np.array([0, 1, 1, 0]), num_classes=2, clients=10).tolist()
    [[2, 0], [0, 2]]

    Raises:
        InputError: labels that are not one class a sample.
    """
    classes = np.asarray(labels)
    _check_one_class("counts by class go", classes, "such labels have no class of their own")
    rows = min(clients, len(partition))
    owners = np.repeat(np.arange(rows), partition.sizes[:rows])
    own = classes[partition.order[: partition.offsets[rows]]]
    return np.bincount(owners * num_classes + own, minlength=rows * num_classes).reshape(rows, num_classes)


def partition(
    labels: Labels,
    clients: int | None,
    scheme: str,
    seed: int,
    *,
    groups: Labels | None = None,
    minimum: int = 2,
) -> Partition:
    """Split samples over clients, each at one client at most.

    `labels` is (N,), integers; for ``iid`` and ``natural`` also (N, ...), such as those of pixels. The same `seed` (0
    or more) gives the same parts; a client's samples are in shuffled order. Schemes:

    ``iid``: shuffled; sizes differ by at most one.

    ``dirichlet:ALPHA``: each client's mix of classes is drawn from a symmetric Dirichlet distribution over the classes
    there are, and its samples are drawn by that mix without replacement; once a class runs out, its probability goes to
    the others in proportion (the way of Hsu et al. 2019, arXiv 1909.06335). Small ALPHA: few classes a client; large
    ALPHA: even mixes, as far as samples last. Sizes differ by at most one.

    ``shards:N``: samples sorted by class are cut into clients * N runs of equal length (to one), and each client gets N
    of them by chance (McMahan et al. 2017, arXiv 1602.05629, section 3, where N is 2).

    ``natural``: a client for each group, `groups` being (N,), integers, such as who wrote a letter. Groups of fewer
    than `minimum` samples are left out and counted. `clients` None takes all others, a smaller number draws so many.

    >>> [part.tolist() for part in partition(np.array([0, 1, 0, 1]), 2, "shards:1", seed=0)]
    [[3, 1], [0, 2]]

    Raises:
        InputError: an unknown scheme or a wrong number in it; no client; fewer than `minimum` samples for a client;
            ``dirichlet`` or ``shards`` with labels that are not one class a sample; ``natural`` without groups, or
            with fewer of them than clients.
    """
    if minimum < 1:
        raise InputError(f"a minimum of {minimum} samples a client; give at least 1")
    if clients is not None and clients < 1:
        raise InputError(f"partition over {clients} clients; give at least 1")
    kind, number = _parse_scheme(scheme)
    samples = np.asarray(labels)
    rng = np.random.default_rng([seed, _STREAM])
    if kind == "natural":
        return _natural(None if groups is None else np.asarray(groups), clients, minimum, rng)
    if clients is None:
        raise InputError(f"partition {scheme!r} needs a number of clients; only natural brings its own")
    if kind != "iid":
        _check_one_class(f"partition {scheme!r} goes", samples, "use iid")
    if len(samples) < minimum * clients:
        most = len(samples) // minimum
        advice = f"give at most {most} clients" if most else "give more samples"
        raise InputError(
            f"{len(samples)} training samples are too few for {clients} clients, which need at least {minimum} each; "
            f"{advice}"
        )
    if kind == "shards":
        return _shards(samples, clients, int(number), minimum, rng)
    offsets = _offsets(_even_sizes(len(samples), clients))
    order = rng.permutation(len(samples)) if kind == "iid" else _dirichlet(samples, offsets, number, rng)
    return Partition(order, offsets)


def _parse_scheme(scheme: str) -> tuple[str, float]:
    """The kind and the number after its colon, 0 where there is none."""
    kind, _, number = scheme.partition(":")
    if scheme in ("iid", "natural"):
        return scheme, 0
    if kind == "shards":
        if not (number.isascii() and number.isdigit() and 0 < int(number[:20]) < 10**9):
            raise InputError(f"partition {scheme!r}: N must be a whole number from 1, such as 2, not {number!r}")
        return kind, int(number)
    if kind != "dirichlet":
        raise InputError(f"unknown partition {scheme!r}; known are {_KNOWN}")
    try:
        alpha = float(number)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise InputError(f"partition {scheme!r}: ALPHA must be a positive finite number, such as 0.1, not {number!r}")
    return kind, alpha


def _check_one_class(what: str, labels: NDArray[np.integer], advice: str) -> None:
    if labels.ndim > 1:
        shape = "x".join(str(size) for size in labels.shape[1:])
        raise InputError(
            f"{what} by the class of each image, and here each has labels of {shape}, not one class; {advice}"
        )


def _even_sizes(total: int, parts: int) -> Indices:
    """`total` as `parts` numbers that differ by at most one, the larger ones first."""
    return total // parts + (np.arange(parts) < total % parts)


def _offsets(sizes: Indices) -> Indices:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _by_owner(owners: Indices, clients: int, rng: np.random.Generator, left_out: int = 0) -> Partition:
    """Each sample to its owner, shuffled within; samples of owner `clients` go to nobody."""
    shuffled = rng.permutation(len(owners))
    order = shuffled[np.argsort(owners[shuffled], kind="stable")]
    offsets = _offsets(np.bincount(owners, minlength=clients)[:clients])
    return Partition(order[: offsets[-1]], offsets, left_out)


def _shards(
    labels: NDArray[np.integer], clients: int, per_client: int, minimum: int, rng: np.random.Generator
) -> Partition:
    shards = clients * per_client
    if shards > len(labels):
        raise InputError(
            f"partition 'shards:{per_client}' cuts {shards} shards for {clients} clients, of {len(labels)} training "
            f"samples; give at most {len(labels) // per_client} clients, or fewer shards each"
        )
    shuffled = rng.permutation(len(labels))  # which samples of a class share a shard is chance, too
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner_of_shard = rng.permutation(shards) // per_client
    owners = np.empty(len(labels), dtype=np.int64)
    owners[by_class] = np.repeat(owner_of_shard, _even_sizes(len(labels), shards))
    parts = _by_owner(owners, clients, rng)
    if (smallest := int(parts.sizes.min())) < minimum:
        raise InputError(
            f"partition 'shards:{per_client}' over {clients} clients leaves one with {smallest} samples, which needs "
            f"at least {minimum}; use fewer clients"
        )
    return parts


def _natural(groups: Indices | None, clients: int | None, minimum: int, rng: np.random.Generator) -> Partition:
    if groups is None:
        raise InputError(
            "partition 'natural' goes by the writer of each image, and this data set names none; use femnist:DIR, "
            "or parquet:DIR with a column writer_id, client_id or user_id"
        )
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    large = np.flatnonzero(sizes >= minimum)
    left_out = len(sizes) - len(large)
    if len(large) < (clients or 1):
        without = f" ({left_out} more have fewer)" if left_out else ""
        advice = f"give at most {len(large)} clients" if len(large) else "use iid"
        raise InputError(
            f"partition 'natural' over {clients or 'all'} clients: only {len(large)} writers have at least {minimum} "
            f"training samples{without}; {advice}"
        )
    chosen = large if clients in (None, len(large)) else np.sort(rng.choice(large, clients, replace=False))
    client_of_group = np.full(len(sizes), len(chosen))  # nobody's
    client_of_group[chosen] = np.arange(len(chosen))
    return _by_owner(client_of_group[group_of], len(chosen), rng, left_out)


def _dirichlet(labels: NDArray[np.integer], offsets: Indices, alpha: float, rng: np.random.Generator) -> Indices:
    """The order of samples by class mixes: client after client takes its own from shuffled piles, one a class."""
    classes, pile_sizes = np.unique(labels, return_counts=True)
    piles = [rng.permutation(np.flatnonzero(labels == name)) for name in classes]
    left = pile_sizes.astype(np.int64)
    order = np.empty(len(labels), dtype=np.int64)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        taken = _draw_counts(stop - start, left, min(alpha, _LARGEST_ALPHA), rng)
        own = [piles[pile][left[pile] - taken[pile] : left[pile]] for pile in np.flatnonzero(taken)]
        order[start:stop] = rng.permutation(np.concatenate(own))
        left -= taken
    return order


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
