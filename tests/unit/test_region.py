"""Regions against numpy: which entries a reshape, a concatenation and a meeting of widths keep."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slt_planner.graph.region import Axis, Dimension, common, concatenated, reshaped
from slt_planner.graph.widths import Needs


def entries(region):
    """The flat numbers of the entries that a region keeps, in its own order."""
    numbers = np.arange(math.prod(d.size for d in region)).reshape([d.size for d in region])
    return numbers[np.ix_(*[list(d.indices) for d in region])]


@st.composite
def kept_of(draw, size):
    kept = draw(st.one_of(st.none(), st.sets(st.integers(0, size - 1), min_size=1).map(sorted)))
    return Dimension(size) if kept is None else Dimension(size).keeping(tuple(kept))


@st.composite
def reshapes(draw):
    """Two shapes of the same entries, and what comes in the first."""
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def grouped():
        sizes, group = [], 1
        for factor in factors:
            group *= factor
            if draw(st.booleans()):
                sizes.append(group)
                group = 1
        return [*sizes, group] if group > 1 or not sizes else sizes

    first, second = grouped(), grouped()
    if math.prod(first) != math.prod(second):
        first, second = factors, [math.prod(factors)]
    return tuple(draw(kept_of(size)) for size in first), tuple(Dimension(size) for size in second)


@given(reshapes())
def test_a_reshape_keeps_the_same_entries_in_the_same_order(case):
    given_region, sizes = case
    try:
        taken, output, _ = reshaped(given_region, sizes)
    except ValueError:
        return  # told, not guessed: what is kept fills no box
    assert all(set(t.indices) <= set(g.indices) for t, g in zip(taken, given_region, strict=True))
    assert np.array_equal(entries(taken).ravel(), entries(output).ravel())


@given(reshapes())
def test_what_fills_a_box_of_the_new_shape_comes_through_whole(case):
    given_region, sizes = case
    everything = entries(given_region).ravel()
    boxes = [
        sorted({int(i) for i in np.unravel_index(everything, [d.size for d in sizes])[k]}) for k in range(len(sizes))
    ]
    if math.prod(map(len, boxes)) != len(everything):
        return
    taken, output, _ = reshaped(given_region, sizes)
    assert np.array_equal(entries(taken), entries(given_region))
    assert [list(d.indices) for d in output] == boxes


def test_the_batch_comes_first_or_not_at_all():
    heads = Dimension(4).keeping(range(2))
    batch = Dimension(1, batched=True)
    _, (merged, _), _ = reshaped((batch, heads, Dimension(5)), (Dimension(4, batched=True), Dimension(5)))
    assert (merged.indices, merged.batched) == (range(2), True)
    with pytest.raises(ValueError, match="mixed with the batch"):
        reshaped((heads, batch, Dimension(5)), (Dimension(4, batched=True), Dimension(5)))


@given(st.lists(st.integers(1, 6).flatmap(kept_of), min_size=1, max_size=4))
def test_a_concatenation_keeps_every_part(parts):
    numbers, offset = [], 0
    for part in parts:
        numbers += [offset + i for i in part.indices]
        offset += part.size
    joined = concatenated(parts)
    assert (joined.size, list(joined.indices)) == (offset, numbers)


@given(st.integers(1, 8).flatmap(lambda size: st.lists(kept_of(size), min_size=1, max_size=4)))
def test_what_meets_keeps_what_all_have(dimensions):
    shared = set.intersection(*(set(d.indices) for d in dimensions))
    if shared:
        assert list(common(dimensions).indices) == sorted(shared)


def test_prefixes_are_ranges_and_everything_is_whole():
    assert Dimension(4).keeping((0, 1)).kept == range(2)
    assert Dimension(4).keeping((1, 2)).kept == (1, 2)
    assert Dimension(4).keeping((0, 1, 2, 3)).whole


def layout_of(size, *needs):
    own = Needs()
    for need in needs:
        need(own)
    return own.layout("maker", size)


def axis(size, stride=1, *more):
    return Dimension(size, axis=Axis(frozenset(("maker", *more)), stride))


def test_steps_are_those_that_all_users_can_take():
    plain = layout_of(24)
    assert [list(plain.kept(s)) for s in (0.01, 0.5)] == [[0], list(range(12))]
    both = layout_of(24, lambda n: n.steps(axis(24), 4), lambda n: n.steps(axis(24), 12))
    assert list(both.kept(0.9)) == list(range(12))
    assert list(both.kept(0.1)) == list(range(12))  # never less than one step
    clashing = layout_of(24, lambda n: n.steps(axis(24), 8), lambda n: n.steps(axis(24), 12))
    assert list(clashing.kept(0.5)) == list(range(24))  # not scaled


def test_queries_keys_and_values_keep_the_same_heads():
    _, sizes, splits = reshaped((axis(24),), (Dimension(3), Dimension(4), Dimension(2)))
    layout = layout_of(24, lambda n: n.split(splits[0]), lambda n: n.whole(sizes[0]), lambda n: n.whole(sizes[2]))
    assert list(layout.kept(0.5)) == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]


def test_who_meets_has_the_same_steps():
    own = Needs()
    own.join((axis(24, 1, "other"),))
    own.steps(Dimension(24, axis=Axis(frozenset(("other",)))), 6)
    assert list(own.layout("maker", 24).kept(0.3)) == list(range(6))
