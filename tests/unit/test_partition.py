import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from slt_planner.data.partition import Partition, _draw_counts, counts_by_class, load_partition, partition
from slt_planner.errors import InputError

SCHEMES = ["iid", "dirichlet:0.1", "dirichlet:1", "dirichlet:100", "dirichlet:1e-300", "dirichlet:1.7e308"]


def balanced(classes=10, each=500):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))


def class_shares(labels, parts):
    """(clients, classes): the share of each class among a client's samples."""
    classes = labels.max() + 1
    return np.stack([np.bincount(labels[part], minlength=classes) / len(part) for part in parts])


@settings(max_examples=80, deadline=None)
@given(
    clients=st.integers(1, 12),
    extra=st.integers(0, 60),
    classes=st.integers(1, 6),
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 2**40),
)
def test_every_sample_is_at_exactly_one_client_and_sizes_are_equal(clients, extra, classes, scheme, seed):
    labels = np.random.default_rng(seed).integers(classes, size=2 * clients + extra)
    parts = partition(labels, clients, scheme, seed)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.dtype == np.int64 for part in parts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_decides(scheme):
    labels = balanced()
    first, again, other = (partition(labels, 20, scheme, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
def test_tensors_and_arrays_give_the_same_parts(scheme):
    labels = balanced(each=20)
    arrays, tensors = partition(labels, 5, scheme, 0), partition(torch.from_numpy(labels), 5, scheme, 0)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, tensors, strict=True))


def test_iid_clients_have_the_mix_of_the_whole():
    labels = balanced()
    shares = class_shares(labels, partition(labels, 10, "iid", 0))
    # 500 samples of 10 classes: standard deviation of a share 0.0127 (hypergeometric).
    assert np.abs(shares - 0.1).max() < 0.06
    assert shares.std() == pytest.approx(0.0127, abs=0.003)


def test_a_large_alpha_tends_to_the_mix_of_iid():
    # 5 of 10 clients' worth of samples are left in every class when these are drawn, so none runs out.
    labels = balanced()
    iid = class_shares(labels, partition(labels, 10, "iid", 0))
    even = class_shares(labels, list(partition(labels, 10, "dirichlet:1e9", 0))[:5])
    assert np.abs(even - iid[:5]).max() < 0.08
    assert even.std() < 0.02


def test_a_small_alpha_gives_few_classes_a_client():
    labels = balanced()
    largest = {
        scheme: class_shares(labels, partition(labels, 100, scheme, 0)).max(axis=1).mean()
        for scheme in ("dirichlet:1e-6", "dirichlet:0.1", "dirichlet:1", "iid")
    }
    assert largest["dirichlet:1e-6"] > 0.95
    assert largest["dirichlet:1e-6"] > largest["dirichlet:0.1"] > largest["dirichlet:1"] > largest["iid"]


def test_first_clients_have_the_moments_of_a_dirichlet_draw():
    # E[p_i^2] of a symmetric Dirichlet over k classes is (alpha + 1) / (k (k alpha + 1)); drawing n samples
    # by it adds (1/k - E[p_i^2]) / n. The first client of many cannot run out of a class.
    classes, alpha, size = 4, 0.5, 50
    labels = np.repeat(np.arange(classes), 400)
    clients = len(labels) // size
    squares = []
    for seed in range(300):
        first = partition(labels, clients, f"dirichlet:{alpha}", seed)[0]
        squares.append(((np.bincount(labels[first], minlength=classes) / size) ** 2).mean())
    second_moment = (alpha + 1) / (classes * (classes * alpha + 1))
    expected = second_moment + (1 / classes - second_moment) / size
    assert np.mean(squares) == pytest.approx(expected, abs=4 * np.std(squares) / np.sqrt(len(squares)))


def sample_by_sample(size, left, mix, rng):
    """The rule as written down: draw one, renormalise over the classes that still have samples."""
    taken = np.zeros_like(left)
    for _ in range(size):
        weights = np.where(taken < left, mix, 0.0)
        taken[rng.choice(len(left), p=weights / weights.sum())] += 1
    return taken


class GivenMix:
    """A generator whose Dirichlet draw is given."""

    def __init__(self, mix, rng):
        self.mix, self.multinomial = np.array(mix), rng.multinomial

    def dirichlet(self, _):
        return self.mix.copy()


def test_running_out_of_a_class_follows_the_law_of_drawing_sample_by_sample():
    left, mix, size, runs = np.array([2, 1, 4]), [0.6, 0.3, 0.1], 4, 6000
    rng = np.random.default_rng(0)
    batched = Counter(tuple(_draw_counts(size, left, 1.0, GivenMix(mix, rng))) for _ in range(runs))
    single = Counter(tuple(sample_by_sample(size, left, mix, rng)) for _ in range(runs))
    assert set(batched) == set(single)
    for counts in single:
        share = (batched[counts] + single[counts]) / (2 * runs)
        deviation = np.sqrt(2 * share * (1 - share) / runs)  # of the difference of two such shares
        assert abs(batched[counts] - single[counts]) / runs < 4 * deviation


def test_labels_need_not_start_at_zero_or_be_dense():
    labels = np.array([7, 7, 7, -1, -1, 40, 40, 40])
    parts = partition(labels, 3, "dirichlet:0.01", 3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(8))


@pytest.mark.parametrize("scheme", ["", "IID", "shard:2", "iid:1", "dirichle:1", "natural:writer"])
def test_unknown_schemes_are_refused_by_name(scheme):
    with pytest.raises(
        InputError, match=r"unknown partition .*known are iid, dirichlet:ALPHA .* shards:N .* and natural$"
    ) as error:
        partition(balanced(), 10, scheme, 0)
    assert repr(scheme) in str(error.value)


@pytest.mark.parametrize("number", ["", "0", "-0.1", "nan", "inf", "1e999", "a lot"])
def test_alpha_must_be_a_positive_finite_number(number):
    with pytest.raises(InputError, match="positive finite number"):
        partition(balanced(), 10, f"dirichlet:{number}", 0)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:1"])
def test_two_samples_a_client_are_enough_and_fewer_are_refused(scheme):
    labels = np.arange(20) % 3
    assert [len(part) for part in partition(labels, 10, scheme, 0)] == [2] * 10
    with pytest.raises(InputError, match=r"^19 training samples are too few for 10 clients.*at most 9 clients$"):
        partition(labels[:19], 10, scheme, 0)


@pytest.mark.parametrize("clients", [0, -3])
def test_at_least_one_client(clients):
    with pytest.raises(InputError, match=f"over {clients} clients; give at least 1"):
        partition(balanced(), clients, "iid", 0)


def test_labels_a_pixel_are_split_iid_by_image():
    masks = torch.zeros(11, 4, 6, dtype=torch.uint8)
    parts, plain = partition(masks, 3, "iid", 5), partition(np.zeros(11, dtype=np.int64), 3, "iid", 5)
    assert all(np.array_equal(a, b) for a, b in zip(parts, plain, strict=True))
    assert sorted(np.concatenate(parts).tolist()) == list(range(11))


@pytest.mark.parametrize("labels", [np.zeros((20, 4, 6), dtype=np.uint8), torch.zeros(20, 4, 6, dtype=torch.uint8)])
def test_class_mixes_need_a_class_an_image(labels):
    message = r"^partition 'dirichlet:0\.5' goes by the class of each image, .* labels of 4x6, .*use iid$"
    with pytest.raises(InputError, match=message):
        partition(labels, 2, "dirichlet:0.5", 0)


# shards


def by_hand(labels, clients, per_client, owner_of_shard):
    """The counts (clients, classes) of McMahan et al.: samples in order of class, cut, and dealt shard by shard."""
    shards = np.array_split(np.sort(labels), clients * per_client)
    counts = np.zeros((clients, labels.max() + 1), dtype=int)
    for shard, owner in zip(shards, owner_of_shard, strict=True):
        for label in shard:
            counts[owner, label] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 9),
    per_client=st.integers(1, 4),
    extra=st.integers(0, 50),
    classes=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_shards_are_runs_of_the_samples_in_order_of_class(clients, per_client, extra, classes, seed):
    labels = np.random.default_rng(seed).integers(classes, size=2 * clients * per_client + extra)
    parts = partition(labels, clients, f"shards:{per_client}", seed)
    assert sorted(np.concatenate(list(parts)).tolist()) == list(range(len(labels)))
    assert parts.sizes.max() - parts.sizes.min() <= per_client
    # Which shard went to whom is found by the same draws; what is then in them is counted by hand.
    rng = np.random.default_rng([seed, 0x70617274])
    rng.permutation(len(labels))
    owners = rng.permutation(clients * per_client) // per_client
    assert Counter(owners.tolist()) == dict.fromkeys(range(clients), per_client)
    expected = by_hand(labels, clients, per_client, owners)
    assert counts_by_class(parts, labels, int(labels.max()) + 1, clients).tolist() == expected.tolist()


@pytest.mark.parametrize("per_client", [1, 2, 3])
def test_shards_within_a_class_give_as_many_classes_at_most(per_client):
    labels = balanced(classes=10, each=60)  # 10, 20 or 30 clients' shards, none across two classes
    parts = partition(labels, 10, f"shards:{per_client}", 1)
    assert all(len(np.unique(labels[part])) <= per_client for part in parts)
    assert set(parts.sizes) == {60}


def test_a_shard_has_chance_samples_of_its_class():
    labels = np.zeros(1000, dtype=np.int64)
    first = partition(labels, 2, "shards:1", 0)[0]
    assert 400 < first.mean() < 600  # neither half of the file: 499.5 with a deviation of 9


def test_more_shards_than_samples_are_refused():
    message = r"^partition 'shards:3' cuts 30 shards for 10 clients, of 29 training samples; give at most 9 clients"
    with pytest.raises(InputError, match=message):
        partition(np.zeros(29, dtype=int), 10, "shards:3", 0)


def test_shards_too_small_for_the_minimum_are_refused():
    # 20 shards of 35 samples: 15 of two and 5 of one; some client can get two of the smaller ones.
    outcomes = set()
    for seed in range(40):
        smallest = int(partition(np.zeros(35, dtype=int), 10, "shards:2", seed).sizes.min())
        outcomes.add(smallest)
        if smallest == 3:
            assert partition(np.zeros(35, dtype=int), 10, "shards:2", seed, minimum=3).sizes.min() == 3
        else:
            with pytest.raises(InputError, match="over 10 clients leaves one with 2 samples, which needs at least 3;"):
                partition(np.zeros(35, dtype=int), 10, "shards:2", seed, minimum=3)
    assert outcomes == {2, 3}


@pytest.mark.parametrize("number", ["", "0", "-1", "1.5", "two", "9" * 30, "\u0662"])
def test_shards_must_be_a_whole_number(number):
    with pytest.raises(InputError, match="N must be a whole number from 1"):
        partition(balanced(), 10, f"shards:{number}", 0)


# natural


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(-3, 8), min_size=1, max_size=60),
    minimum=st.integers(1, 4),
    fewer=st.integers(0, 5),
    seed=st.integers(0, 2**40),
)
def test_natural_clients_are_groups(groups, minimum, fewer, seed):
    groups = np.array(groups)
    counts = Counter(groups.tolist())
    large = {group for group, count in counts.items() if count >= minimum}
    if not large:
        with pytest.raises(InputError, match=f"only 0 writers have at least {minimum} training samples"):
            partition(groups, None, "natural", seed, groups=groups, minimum=minimum)
        return
    clients = max(1, len(large) - fewer) if fewer else None
    parts = partition(np.zeros((len(groups), 2, 2)), clients, "natural", seed, groups=groups, minimum=minimum)
    assert len(parts) == (clients or len(large))
    assert parts.left_out == len(counts) - len(large)
    owners = [set(groups[part].tolist()) for part in parts]
    assert all(len(owner) == 1 for owner in owners)
    chosen = [owner.pop() for owner in owners]
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= large
    for group, part in zip(chosen, parts, strict=True):
        assert sorted(part.tolist()) == np.flatnonzero(groups == group).tolist()


def test_the_seed_draws_the_writers():
    groups = torch.arange(100).repeat_interleave(3)
    drawn = [
        {int(groups[part[0]]) for part in partition(groups, 30, "natural", seed, groups=groups)} for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(writers) == 30 for writers in drawn)


def test_more_clients_than_writers_are_refused_with_how_many_there_are():
    groups = np.array([0, 0, 1, 1, 2])
    message = r"over 3 clients: only 2 writers have at least 2 training samples \(1 more have fewer\); give at most 2"
    with pytest.raises(InputError, match=message):
        partition(groups, 3, "natural", 0, groups=groups)


def test_natural_needs_groups_and_others_a_number():
    with pytest.raises(InputError, match="this data set names none; use femnist:DIR, or parquet:DIR with a column"):
        partition(balanced(), 10, "natural", 0)
    with pytest.raises(InputError, match="'iid' needs a number of clients"):
        partition(balanced(), None, "iid", 0)


# all schemes


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:1", "shards:1", "natural"])
@pytest.mark.parametrize("minimum", [1, 2, 5])
def test_no_client_has_fewer_than_the_minimum(scheme, minimum):
    labels = np.arange(60) % 3
    parts = partition(labels, 12, scheme, 0, groups=np.arange(60) % 12, minimum=minimum)
    assert parts.sizes.min() >= minimum
    with pytest.raises(InputError, match=r"60 training samples are too few for 12 clients|over 12 clients: only 0 wr"):
        partition(labels, 12, scheme, 0, groups=np.arange(60) % 12, minimum=6)
    with pytest.raises(InputError, match="a minimum of 0 samples a client; give at least 1"):
        partition(labels, 12, scheme, 0, groups=np.arange(60) % 12, minimum=0)


@pytest.mark.parametrize("scheme", ["shards:2", "natural"])
def test_the_seed_decides_here_too(scheme):
    labels = balanced()
    first, again, other = (partition(labels, 10, scheme, seed, groups=labels) for seed in (1, 1, 2))
    assert np.array_equal(first.order, again.order)
    assert not np.array_equal(first.order, other.order)


def as_first_made(labels, clients, scheme, seed):
    """The parts client by client, by lists: what runs that are published name by their seed."""
    rng = np.random.default_rng([seed, 0x70617274])
    if scheme == "iid":
        return [part.tolist() for part in np.array_split(rng.permutation(len(labels)), clients)]
    piles = [rng.permutation(np.flatnonzero(labels == name)).tolist() for name in np.unique(labels)]
    parts = []
    for client in range(clients):
        size = len(labels) // clients + (client < len(labels) % clients)
        left = np.array([len(pile) for pile in piles])
        own = []
        for pile, count in zip(piles, _draw_counts(size, left, float(scheme[len("dirichlet:") :]), rng), strict=True):
            own += pile[len(pile) - count :]
            del pile[len(pile) - count :]
        parts.append(rng.permutation(own).tolist())
    return parts


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.1", "dirichlet:5", "dirichlet:1e-300"])
def test_parts_of_a_seed_stay_what_they_were(scheme):
    labels = balanced()
    assert [part.tolist() for part in partition(labels, 33, scheme, 7)] == as_first_made(labels, 33, scheme, 7)


@pytest.mark.parametrize("scheme", ["iid", "shards:2", "natural"])
def test_a_hundred_thousand_clients_take_no_time(scheme):
    samples = 400_000
    labels, groups = np.arange(samples) % 10, np.arange(samples) % 100_000
    start = time.process_time()
    parts = partition(labels, 100_000, scheme, 0, groups=groups)
    assert time.process_time() - start < 2  # loops over clients take longer
    assert set(parts.sizes) == {4}


# the record


def small():
    return Partition(np.array([4, 0, 7, 2, 1]), np.array([0, 2, 2, 5]), left_out=3)


def test_a_partition_is_a_sequence_of_views():
    parts = small()
    assert len(parts) == 3
    assert [part.tolist() for part in parts] == [[4, 0], [], [7, 2, 1]]
    assert parts[2].base is parts.order
    assert parts.sizes.tolist() == [2, 0, 3]
    for client in (-1, 3):
        with pytest.raises(IndexError, match=f"client {client} of 3"):
            parts[client]


@pytest.mark.parametrize(
    ("order", "offsets", "message"),
    [
        (np.array([0, 1], dtype=np.int32), np.array([0, 2]), "order of a partition is int32"),
        (np.array([[0, 1]]), np.array([0, 1]), r"order .* shape \(1, 2\)"),
        (np.array([0, 1]), np.array([0.0, 2.0]), "offsets of a partition is float64"),
        (np.array([], dtype=np.int64), np.array([0]), "must ascend, one more"),
        (np.array([0, 1]), np.array([0, 2, 1, 2]), "must ascend"),
        (np.array([0, 1]), np.array([0, 1]), "go from 0 to 1; they must go from 0 to 2"),
        (np.array([0, 1]), np.array([1, 2]), "go from 1 to 2"),
        (np.array([0, -1]), np.array([0, 2]), "sample -1 of a partition is negative"),
        (np.array([3, 1, 3]), np.array([0, 1, 3]), "sample 3 is in a partition twice"),
    ],
)
def test_arrays_that_are_no_partition(order, offsets, message):
    with pytest.raises(InputError, match=message):
        Partition(order, offsets)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    path = tmp_path / "partition.safetensors"
    small().save(path)
    loaded = load_partition(path)
    assert [part.tolist() for part in loaded] == [part.tolist() for part in small()]
    assert loaded.left_out == 3
    with pytest.raises(InputError, match="exists"):
        small().save(path)
    Partition(np.arange(3), np.array([0, 3])).save(path, force=True)
    assert load_partition(path)[0].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arrays", "left_out", "message"),
    [
        ({"order": np.arange(3)}, "0", "not a partition; it must hold order, offsets and left_out"),
        ({"order": np.arange(3), "offsets": np.array([0, 3]), "more": np.arange(3)}, "0", "not a partition"),
        ({"order": np.arange(3), "offsets": np.array([0, 3])}, "", "not a partition"),
        ({"order": np.arange(3), "offsets": np.array([0, 3])}, "-1", "not a partition"),
        ({"order": np.arange(3), "offsets": np.array([0, 2])}, "0", "offsets of a partition go from 0 to 2"),
        ({"order": np.array([1, 1, 2]), "offsets": np.array([0, 3])}, "0", "sample 1 is in a partition twice"),
    ],
)
def test_files_that_are_no_partition(tmp_path, arrays, left_out, message):
    path = tmp_path / "p.safetensors"
    save_file(arrays, path, metadata={"left_out": left_out})
    with pytest.raises(InputError, match=message) as error:
        load_partition(path)
    assert str(error.value).startswith(f"partition {path}: ")


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(InputError, match=r"p.safetensors: cannot be read"):
        load_partition(path)
    for damage in (lambda content: b"", lambda content: b"no tensors here", lambda content: content[:-9]):
        small().save(path, force=True)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(InputError, match="not a safetensors file of a partition, or damaged"):
            load_partition(path)
    save_tensors({"order": torch.zeros(3, dtype=torch.bfloat16)}, path)  # which numpy has not
    with pytest.raises(InputError, match=r"p.safetensors: not a "):
        load_partition(path)


def test_counts_by_class_are_those_of_a_loop():
    labels = torch.from_numpy(balanced())
    parts = partition(labels, 40, "dirichlet:0.3", 0)
    expected = [[int((labels[part] == name).sum()) for name in range(12)] for part in parts]
    table = counts_by_class(parts, labels, 12, 40)
    assert table.dtype == np.int64
    assert table.tolist() == expected
    assert counts_by_class(parts, labels, 12, 7).tolist() == expected[:7]
    assert counts_by_class(parts, labels, 12, 99).tolist() == expected


def test_counts_by_class_need_a_class_an_image():
    with pytest.raises(InputError, match="labels of 4x6, not one class"):
        counts_by_class(small(), np.zeros((8, 4, 6), dtype=np.uint8), 3, 3)
