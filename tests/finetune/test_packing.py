"""Which samples share a forward: all of them once, within the room, as few rounds as can be, and balanced."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3kernels.models.finetune.data.packing import fill, narrowest, share_out, spread

LENGTHS = st.lists(st.integers(1, 100), max_size=40)
RANKS = st.integers(1, 5)


def tokens_of(lengths, samples) -> int:
    return sum(lengths[n] for n in samples)


def waited_for(lengths, dealt) -> int:
    """What all ranks take together when each round is as long as its fullest micro batch."""
    return sum(max(tokens_of(lengths, samples) for samples in one_round) for one_round in zip(*dealt))


def greedy(lengths, ranks, capacity):
    """The usual way: best-fit decreasing, bins to ranks in turn."""
    bins = fill(lengths, capacity)
    bins += [()] * (-len(bins) % ranks)
    return [bins[rank::ranks] for rank in range(ranks)]


def check(lengths, dealt, ranks):
    assert len(dealt) == ranks
    assert len({len(own) for own in dealt}) == 1 and len(dealt[0]) >= 1
    assert sorted(n for own in dealt for samples in own for n in samples) == list(range(len(lengths)))


@settings(deadline=None, max_examples=150)
@given(LENGTHS, RANKS, st.integers(100, 300))
def test_packed_bins(lengths, ranks, capacity):
    dealt = share_out(lengths, ranks=ranks, capacity=capacity)
    check(lengths, dealt, ranks)
    assert all(tokens_of(lengths, samples) <= capacity for own in dealt for samples in own)
    assert len(dealt[0]) == max(1, math.ceil(len(fill(lengths, capacity)) / ranks))
    assert waited_for(lengths, dealt) <= waited_for(lengths, greedy(lengths, ranks, capacity))
    totals = [sum(tokens_of(lengths, samples) for samples in own) for own in dealt]
    assert max(totals) - min(totals) <= max(tokens_of(lengths, samples) for own in dealt for samples in own)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, RANKS, st.integers(1, 6))
def test_unpacked_groups(lengths, ranks, samples):
    dealt = share_out(lengths, ranks=ranks, samples=samples)
    check(lengths, dealt, ranks)
    assert all(len(group) <= samples for own in dealt for group in own)
    assert len(dealt[0]) == max(1, math.ceil(math.ceil(len(lengths) / samples) / ranks))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 4))
def test_no_rank_waits_more_than_a_fifth_over_the_best_division(lengths, ranks):
    """Against the best of all divisions where each rank has one bin: MULTIFIT's bound is 13/11."""
    dealt = share_out(lengths, ranks=ranks, capacity=sum(lengths))
    assert waited_for(lengths, dealt) <= 13 / 11 * best_division(lengths, ranks) + 1


def best_division(lengths, ranks) -> int:
    loads = {(0,) * ranks}
    for length in lengths:
        loads = {tuple(sorted((*load[:n], load[n] + length, *load[n + 1 :]))) for load in loads for n in range(ranks)}
    return min(max(load) for load in loads)


def test_short_samples_go_to_all_ranks():
    """Best fit alone would fill two ranks' bins to the brim and leave two ranks without a sample."""
    lengths = [100] * 32
    assert [tokens_of(lengths, samples) for samples in fill(lengths, 1600)] == [1600, 1600]
    dealt = share_out(lengths, ranks=4, capacity=1600)
    assert [[tokens_of(lengths, samples) for samples in own] for own in dealt] == [[800]] * 4


def test_equal_tokens_are_balanced_by_attention():
    """Two full bins a round: the one long sample costs more attention than eight short ones, so each rank gets one."""
    lengths = [80, 80, *[10] * 16]
    dealt = share_out(lengths, ranks=2, capacity=80)
    assert [sorted(len(samples) for samples in own) for own in dealt] == [[1, 8], [1, 8]]


def test_tight_bins_stay_as_best_fit_made_them():
    """Spreading runs out of room where best fit does not, and then must not add a round."""
    lengths = [6, 5, 4, 3, 2, 2, 2]
    assert spread(lengths, 3, capacity=8) is None
    assert max(tokens_of(lengths, samples) for samples in narrowest(lengths, 3, 8)) == 8
    dealt = share_out(lengths, ranks=3, capacity=8)
    assert [tokens_of(lengths, own[0]) for own in dealt] == [8, 8, 8]


def test_no_samples_is_an_empty_bin_for_each_rank():
    assert share_out([], ranks=2, capacity=8) == (((),), ((),))
    assert share_out([], ranks=2, samples=1) == (((),), ((),))


def test_a_sample_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into 8"):
        share_out([3, 9], ranks=1, capacity=8)
    with pytest.raises(ValueError, match="either capacity"):
        share_out([3], ranks=1)


def test_the_best_of_the_ways_is_taken():
    """Two rounds on two ranks: (9, 9) then (4, 1) waits for 13 tokens, best fit's (9, 9) then (5) for 14."""
    lengths = [9, 9, 4, 1]
    assert narrowest(lengths, 4, 12) == [(0,), (1,), (2, 3)]
    assert waited_for(lengths, share_out(lengths, ranks=2, capacity=12)) == 13


def test_the_fullest_of_a_round_goes_to_the_rank_with_the_fewest_tokens():
    assert share_out([10, 7, 6, 5], ranks=2, capacity=10) == (((0,), (3,)), ((1,), (2,)))


def test_of_equals_the_one_without_idle_ranks_is_taken():
    assert share_out([40, 1, 1, 1], ranks=4, capacity=50) == (((0,),), ((1,),), ((2,),), ((3,),))
