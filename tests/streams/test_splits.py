from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clmerge.streams import StreamDataModule
from clmerge.streams.splits import derived_seed, dirichlet_parts, stratified_cut


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    fraction=st.floats(0.0, 0.95),
    seed=st.integers(0, 5),
)
def test_cut_is_a_partition_that_keeps_every_class(counts, fraction, seed):
    targets = [label for label, count in enumerate(counts) for _ in range(count)]
    kept, held = stratified_cut(targets, fraction, seed=seed)
    assert sorted(kept + held) == list(range(len(targets)))
    assert kept == sorted(kept)
    assert held == sorted(held)
    by_class = Counter(targets[i] for i in held)
    for label, count in enumerate(counts):
        assert by_class[label] < count
        if fraction > 0 and count > 1:
            assert by_class[label] == min(max(round(fraction * count), 1), count - 1)


def test_cut_is_stable_and_depends_on_the_seed():
    targets = [0, 1] * 50
    assert stratified_cut(targets, 0.2, seed=3) == stratified_cut(targets, 0.2, seed=3)
    assert stratified_cut(targets, 0.2, seed=3) != stratified_cut(targets, 0.2, seed=4)


def test_cut_of_one_class_does_not_depend_on_the_others():
    alone = stratified_cut([7] * 20, 0.25, seed=1)[1]
    beside = stratified_cut([7] * 20 + [8] * 20, 0.25, seed=1)[1]
    assert [i for i in beside if i < 20] == alone


def test_bound_on_the_held_out_part():
    assert len(stratified_cut([0, 1] * 500, 0.5, seed=0, max_held=100)[1]) == 100


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"expected a held-out fraction in \[0, 1\)"):
        stratified_cut([0, 0], fraction, seed=0)


def test_negative_bound():
    with pytest.raises(ValueError, match="upper bound"):
        stratified_cut([0, 0], 0.5, seed=0, max_held=-1)


def test_derived_seeds_tell_parts_apart():
    seeds = {derived_seed(*parts) for parts in [(0,), ("0",), (0, 1), (1, 0), (0, "a"), ("0a",), (0, "a", 1)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_dirichlet_parts_hold_every_image_once_and_enough_of_them(alpha):
    targets = [index % 5 for index in range(400)]
    parts = dirichlet_parts(targets, 4, alpha, seed=3)
    assert sorted(position for part in parts for position in part) == list(range(400))
    assert min(map(len, parts)) >= 10
    assert parts == dirichlet_parts(targets, 4, alpha, seed=3)
    assert parts != dirichlet_parts(targets, 4, alpha, seed=4)


def test_a_small_alpha_concentrates_and_a_large_one_deals_evenly():
    targets = [index % 10 for index in range(2000)]

    def largest_share(alpha):
        parts = dirichlet_parts(targets, 5, alpha, seed=0)
        counts = [[sum(targets[p] == label for p in part) for label in range(10)] for part in parts]
        return sum(max(row) / sum(row) for row in counts) / 5

    shares = [largest_share(alpha) for alpha in (0.05, 0.5, 1e6)]
    assert shares[0] > 1.5 * shares[1] > 1.5 * shares[2]
    assert shares[2] == pytest.approx(0.1, abs=0.01)


def test_impossible_parts_are_refused():
    with pytest.raises(ValueError, match="two samples or more for each of 4 parts, got 6"):
        dirichlet_parts([0] * 6, 4, 0.5, seed=0)
    with pytest.raises(ValueError, match="above 0, got 0"):
        dirichlet_parts([0] * 60, 4, 0, seed=0)
    with pytest.raises(ValueError, match="dirichlet above 0, got -1"):
        StreamDataModule(dirichlet=-1.0)
