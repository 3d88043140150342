"""Which samples of a step share a forward, and which rank computes it."""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence

Bin = tuple[int, ...]


def share_out(
    lengths: Sequence[int], *, ranks: int, capacity: int | None = None, samples: int | None = None
) -> tuple[tuple[Bin, ...], ...]:
    """The micro batches of each rank, as indices into ``lengths``: every rank has as many, and as few as there can be.

    There are as many as best-fit decreasing needs. Samples are then spread over all of them, so that no rank waits for
    another: the sum of the fullest micro batch of each round is what is kept low, then the attention's cost (the sum of
    squared lengths). The k-th micro batches of all ranks are of similar size, and totals differ by at most the
    fullest one.

    Args:
        lengths: tokens of each sample.
        ranks: data-parallel ranks.
        capacity: the most tokens of a micro batch; None without packing.
        samples: the most samples of one; None with packing.

    Returns:
        (ranks) tuples of equally many micro batches, the fullest first; empty where there are too few samples.
    """
    if (capacity is None) == (samples is None):
        raise ValueError("give either capacity, to pack by tokens, or samples")
    if capacity is not None:
        fullest = fill(lengths, capacity)
        rounds = max(1, math.ceil(len(fullest) / ranks))
        slots = rounds * ranks
        # the first of equals leaves the fewest ranks without a sample
        found = [spread(lengths, slots, capacity=capacity), narrowest(lengths, slots, capacity), fullest]
    else:
        rounds = max(1, math.ceil(len(lengths) / samples / ranks))
        found = [spread(lengths, rounds * ranks, samples=samples)]
    best = min((bins for bins in found if bins is not None), key=lambda bins: _waiting(lengths, bins, ranks))
    return _deal(lengths, best, ranks, rounds)


def fill(lengths: Sequence[int], capacity: int) -> list[Bin]:
    """Best-fit decreasing: the longest sample first, each into the fullest bin that has room for it.

    Raises:
        ValueError: a sample longer than ``capacity``.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for sample in _longest_first(lengths):
        length = lengths[sample]
        if length > capacity:
            raise ValueError(f"a sample of {length} tokens does not fit into {capacity}")
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            room, which = capacity, len(bins)
            bins.append([])
        else:
            room, which = rooms.pop(at)
        bins[which].append(sample)
        insort(rooms, (room - length, which))
    return [tuple(sample) for sample in bins]


def narrowest(lengths: Sequence[int], slots: int, capacity: int) -> list[Bin]:
    """At most ``slots`` bins by best-fit decreasing with the least capacity that bisection finds (MULTIFIT)."""
    low = max([math.ceil(sum(lengths) / slots), *lengths])
    best, high = fill(lengths, capacity), capacity
    while low < high:
        middle = (low + high) // 2
        tried = fill(lengths, middle)
        if len(tried) <= slots:
            best, high = tried, middle
        else:
            low = middle + 1
    return best


def spread(
    lengths: Sequence[int], slots: int, *, capacity: int | None = None, samples: int | None = None
) -> list[Bin] | None:
    """``slots`` bins: the longest sample first, each into the emptiest bin; None where that runs out of room."""
    bins: list[list[int]] = [[] for _ in range(slots)]
    tokens = [(0, which) for which in range(slots)]
    for sample in _longest_first(lengths):
        if not tokens:
            return None
        filled, which = tokens.pop(0)
        if capacity is not None and filled + lengths[sample] > capacity:
            return None
        bins[which].append(sample)
        if samples is None or len(bins[which]) < samples:
            insort(tokens, (filled + lengths[sample], which))
    return [tuple(sample) for sample in bins]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))


def _cost(lengths: Sequence[int], samples: Bin) -> tuple[int, int]:
    return sum(lengths[n] for n in samples), sum(lengths[n] ** 2 for n in samples)


def _waiting(lengths: Sequence[int], bins: Sequence[Bin], ranks: int) -> tuple[int, int]:
    """(tokens, squares) that are waited for: the costliest micro batch of each round, added up."""
    costs = sorted((_cost(lengths, samples) for samples in bins), reverse=True)[::ranks]
    return sum(tokens for tokens, _ in costs), sum(squares for _, squares in costs)


def _deal(lengths: Sequence[int], bins: Sequence[Bin], ranks: int, rounds: int) -> tuple[tuple[Bin, ...], ...]:
    """One bin a round to each rank, the fullest of a round to the rank with the fewest tokens so far."""
    ordered = sorted(bins, key=lambda samples: (*(-cost for cost in _cost(lengths, samples)), samples))
    ordered += [()] * (rounds * ranks - len(ordered))
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    totals = [(0, 0, rank) for rank in range(ranks)]
    for start in range(0, len(ordered), ranks):
        for n, (samples, (tokens, squares, rank)) in enumerate(zip(ordered[start : start + ranks], sorted(totals))):
            dealt[rank].append(samples)
            more, more_squares = _cost(lengths, samples)
            totals[n] = (tokens + more, squares + more_squares, rank)
    return tuple(tuple(own) for own in dealt)
