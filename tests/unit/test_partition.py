from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slt_planner.data.partition import _draw_counts, partition
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
