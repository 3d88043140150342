"""Kernels of :mod:`m3kernels.ops.sample`: the least logit that filters leave, found in rounds, and the race of what is left.

The least logit allowed is where the count (top-k) or the probability (top-p) of all logits above it crosses a bound. A round
cuts an interval that holds it by pivots, and counts and adds up what lies above each, a stretch of the vocabulary in
each program. After two rounds, what lies in the interval is copied to one place, and one program finds the crossing there.
Sums are in a fixed order.
"""

from m3kernels.ops._triton import tl, triton

FLT_MAX = tl.constexpr(3.4028234663852886e38)
# filters leave nothing that is e^-28 = 7e-13 times as likely as the likeliest: it is never drawn
SPAN = tl.constexpr(28.0)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """With OVERLAP a kernel is launched before the one that it reads from has ended."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def scaled_logits(p_logits, mask, temperature):
    """fp32 logits over the temperature (as they are where it is 0); NaN is -inf."""
    hot = temperature > 0
    x = tl.load(p_logits, mask=mask, other=-float("inf")).to(tl.float32)
    x = tl.div_rn(x, tl.zeros_like(x) + tl.where(hot, temperature, 1.0))
    x = tl.where(x == x, x, -float("inf"))
    # two infinities have no difference
    return tl.where(hot, tl.minimum(x, FLT_MAX), x)


@triton.jit
def order_of(bits):
    """fp32 bits as int32 to int32 in the floats' order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def gumbel(word):
    """-log(E), E exponentially distributed by 32 random bits; fine where E is small, which is what wins."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    small = u * (1.0 + u * (0.5 + u * 0.33333334))
    return -tl.log(tl.where(u < 0.00390625, small, -tl.log(1.0 - tl.where(u < 0.00390625, 0.5, u))))


@triton.jit
def row_settings(p_temperature, p_top_k, p_top_p, temperature_stride, top_k_stride, top_p_stride):
    """(temperature, k, p, whether a filter applies) of this program's row."""
    row = tl.program_id(1)
    temperature = tl.load(p_temperature + row * temperature_stride)
    k = tl.minimum(tl.load(p_top_k + row * top_k_stride).to(tl.int64), 1 << 30).to(tl.int32)
    p = tl.maximum(tl.load(p_top_p + row * top_p_stride), 0.0)
    return temperature, k, p, (temperature > 0) & ((k > 0) | (p < 1.0))


@triton.jit
def row_top(p_top, filtered, splits, SPLITS: tl.constexpr):
    """The row's largest logit, out of those of its stretches; -inf for one without a filter."""
    o_split = tl.arange(0, SPLITS)
    mask = o_split < tl.where(filtered, splits, 0)
    top = tl.load(p_top + tl.program_id(1) * splits + o_split, mask=mask, other=-float("inf"))
    return tl.max(top, axis=0)


@triton.jit
def load_sums(p_count, p_mass, splits, SPLITS: tl.constexpr, PIVOTS: tl.constexpr):
    """(splits, pivots) counts, and (pivots,) probabilities times the sum of all, of logits from each pivot on."""
    o_split, o_pivot = tl.arange(0, SPLITS), tl.arange(0, PIVOTS)
    at = tl.program_id(1).to(tl.int64) * splits * PIVOTS + o_split[:, None] * PIVOTS + o_pivot[None, :]
    mask = (o_split < splits)[:, None] & (o_pivot < PIVOTS)[None, :]
    counts = tl.load(p_count + at, mask=mask, other=0)
    return counts, tl.sum(tl.load(p_mass + at, mask=mask, other=0.0), axis=0)


@triton.jit
def pick(values, j, PIVOTS: tl.constexpr):
    """values[j], 0 for j = -1."""
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == j, values, 0), axis=0)


@triton.jit
def crossing(counts, masses, k, p, by_k, mass, PIVOTS: tl.constexpr):
    """(first, last): the least logit allowed is at least pivot ``last``, and below pivot ``first`` - 1.

    ``mass`` is that of the top k where ``by_k`` is not set; else it is known once k's own crossing is.
    """
    k_last = tl.minimum(tl.sum((counts < k).to(tl.int32), axis=0), PIVOTS - 1)
    least = tl.where(by_k, pick(masses, k_last - 1, PIVOTS), mass)
    p_first = tl.minimum(tl.sum((masses < p * least).to(tl.int32), axis=0), PIVOTS - 1)
    first = tl.where(p < 1.0, p_first, PIVOTS - 1)
    return tl.where(by_k, tl.minimum(first, k_last), first), tl.where(by_k, k_last, first)


@triton.jit
def sample_top_kernel(
    p_logits, p_temperature, p_top_k, p_top_p, p_top,
    logits_stride, temperature_stride, top_k_stride, top_p_stride, vocab, chunk,
    GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The largest logit of a stretch."""
    begin(OVERLAP)
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    settings = row_settings(p_temperature, p_top_k, p_top_p, temperature_stride, top_k_stride, top_p_stride)
    if settings[3]:
        p_logits += row * logits_stride
        top = tl.full([GROUP], -float("inf"), tl.float32)
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), GROUP):
            o = start + tl.arange(0, GROUP)
            top = tl.maximum(top, scaled_logits(p_logits + o, o < vocab, settings[0]))
        tl.store(p_top + row * tl.num_programs(0) + split, tl.max(top, axis=0))


@triton.jit
def sample_bins_kernel(
    p_logits, p_temperature, p_top_k, p_top_p, p_top, p_last_pivot, p_last_count, p_last_mass, p_pivot, p_count, p_mass,
    p_by_k, p_whole, logits_stride, temperature_stride, top_k_stride, top_p_stride, vocab, chunk,
    FIRST: tl.constexpr, PIVOTS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A round: pivots in the interval that the round before (none in the FIRST) has found, and what lies from each on."""
    begin(OVERLAP)
    split, splits, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    temperature, k, p, filtered = row_settings(
        p_temperature, p_top_k, p_top_p, temperature_stride, top_k_stride, top_p_stride
    )
    top = row_top(p_top, filtered, splits, SPLITS)
    if top > -float("inf"):
        o_pivot = tl.arange(0, PIVOTS)
        if FIRST:
            high, low = top, top - SPAN
        else:
            tile, masses = load_sums(p_last_count, p_last_mass, splits, SPLITS, PIVOTS)
            counts, whole = tl.sum(tile, axis=0), pick(masses, PIVOTS - 1, PIVOTS)
            by_k = (k > 0) & (k <= pick(counts, PIVOTS - 1, PIVOTS))
            first, last = crossing(counts, masses, k, p, by_k, whole, PIVOTS)
            high = tl.load(p_last_pivot + row * PIVOTS + tl.maximum(first - 1, 0))
            low = tl.load(p_last_pivot + row * PIVOTS + last)
            if split == 0:
                tl.store(p_by_k + row, by_k.to(tl.int32))
                tl.store(p_whole + row, whole)
        pivot = tl.maximum(high - (high - low) * (o_pivot.to(tl.float32) / (PIVOTS - 1)), low)
        pivot = tl.where(o_pivot == PIVOTS - 1, low, pivot)
        if split == 0:
            tl.store(p_pivot + row * PIVOTS + o_pivot, pivot)
        p_logits += row * logits_stride
        above = tl.zeros([PIVOTS, BLOCK], tl.int32)
        mass = tl.zeros([PIVOTS, BLOCK], tl.float32)
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), GROUP):
            for block in tl.static_range(0, GROUP, BLOCK):
                o = start + block + tl.arange(0, BLOCK)
                x = scaled_logits(p_logits + o, o < vocab, temperature)
                seen = x[None, :] >= pivot[:, None]
                above += seen.to(tl.int32)
                mass += tl.where(seen, tl.exp(x - top)[None, :], 0.0)
        at = (row * splits + split) * PIVOTS + o_pivot
        tl.store(p_count + at, tl.sum(above, axis=1))
        tl.store(p_mass + at, tl.sum(mass, axis=1))


@triton.jit
def sample_compact_kernel(
    p_logits, p_temperature, p_top_k, p_top_p, p_top, p_pivot, p_count, p_mass, p_by_k, p_whole, p_candidates,
    logits_stride, temperature_stride, top_k_stride, top_p_stride, vocab, chunk,
    PIVOTS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The logits of the last round's interval, one after the other."""
    begin(OVERLAP)
    split, splits, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    temperature, k, p, filtered = row_settings(
        p_temperature, p_top_k, p_top_p, temperature_stride, top_k_stride, top_p_stride
    )
    if row_top(p_top, filtered, splits, SPLITS) > -float("inf"):
        tile, masses = load_sums(p_count, p_mass, splits, SPLITS, PIVOTS)
        by_k, whole = tl.load(p_by_k + row) != 0, tl.load(p_whole + row)
        first, last = crossing(tl.sum(tile, axis=0), masses, k, p, by_k, whole, PIVOTS)
        o_split, o_pivot = tl.arange(0, SPLITS), tl.arange(0, PIVOTS)[None, :]
        inside = tl.sum(tl.where(o_pivot == last, tile, 0) - tl.where(o_pivot == first - 1, tile, 0), axis=1)
        at = tl.sum(tl.where(o_split < split, inside, 0), axis=0)
        low = tl.load(p_pivot + row * PIVOTS + last)
        high = tl.load(p_pivot + row * PIVOTS + tl.maximum(first - 1, 0))
        high = tl.where(first == 0, float("inf"), high)
        p_logits += row * logits_stride
        p_candidates += row * vocab
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), GROUP):
            o = start + tl.arange(0, GROUP)
            x = scaled_logits(p_logits + o, o < vocab, temperature)
            taken = (x >= low) & (x < high)
            tl.store(p_candidates + at + tl.cumsum(taken.to(tl.int32), axis=0) - 1, x, mask=taken)
            at += tl.sum(taken.to(tl.int32), axis=0)


@triton.jit
def sums_from(p_candidates, n, pivot, top, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """(WAYS,) counts and masses of the candidates from each pivot (in ``order_of``) on."""
    above = tl.zeros([WAYS, BLOCK], tl.int32)
    mass = tl.zeros([WAYS, BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(p_candidates + o, mask=o < n, other=-float("inf"))
        seen = (order_of(x.to(tl.int32, bitcast=True))[None, :] >= pivot[:, None]) & (o < n)[None, :]
        above += seen.to(tl.int32)
        mass += tl.where(seen, tl.exp(x - top)[None, :], 0.0)
    return tl.sum(above, axis=1), tl.sum(mass, axis=1)


@triton.jit
def sample_least_kernel(
    p_temperature, p_top_k, p_top_p, p_top, p_pivot, p_count, p_mass, p_by_k, p_whole, p_candidates, p_least,
    temperature_stride, top_k_stride, top_p_stride, vocab, splits,
    PIVOTS: tl.constexpr, SPLITS: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The least logit allowed in a row: the crossing among the candidates, first that of k, then that of p."""
    begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    temperature, k, p, filtered = row_settings(
        p_temperature, p_top_k, p_top_p, temperature_stride, top_k_stride, top_p_stride
    )
    top = row_top(p_top, filtered, splits, SPLITS)
    least = -float("inf")
    if top > -float("inf"):
        tile, masses = load_sums(p_count, p_mass, splits, SPLITS, PIVOTS)
        counts, by_k, mass = tl.sum(tile, axis=0), tl.load(p_by_k + row) != 0, tl.load(p_whole + row)
        first, last = crossing(counts, masses, k, p, by_k, mass, PIVOTS)
        count_before, mass_before = pick(counts, first - 1, PIVOTS), pick(masses, first - 1, PIVOTS)
        n = pick(counts, last, PIVOTS) - count_before
        p_candidates += row * vocab
        floor = order_of(tl.load(p_pivot + row * PIVOTS + last).to(tl.int32, bitcast=True)).to(tl.int64)
        above = tl.load(p_pivot + row * PIVOTS + tl.maximum(first - 1, 0))
        ceiling = order_of(tl.where(first == 0, top, above).to(tl.int32, bitcast=True)).to(tl.int64)
        ceiling += (first == 0).to(tl.int64)
        o_way = tl.arange(0, WAYS)
        # what lies from low on reaches the bound, what lies from high on does not
        low, high = floor, tl.where(by_k, ceiling, floor)
        while high - low > 1:
            pivot = low + (high - low) * o_way // WAYS
            found, _ = sums_from(p_candidates, n, pivot.to(tl.int32), top, WAYS, BLOCK)
            reaches = (count_before + found >= k) | (o_way == 0)
            low, high = (
                tl.max(tl.where(reaches, pivot, low), axis=0),
                tl.min(tl.where(reaches, high, pivot), axis=0),
            )
        if p < 1.0:
            if by_k:
                pivot = (o_way * 0 + low).to(tl.int32)
                _, found_mass = sums_from(p_candidates, n, pivot, top, WAYS, BLOCK)
                mass = mass_before + tl.max(found_mass, axis=0)
            high = ceiling
            while high - low > 1:
                pivot = low + (high - low) * o_way // WAYS
                _, found_mass = sums_from(p_candidates, n, pivot.to(tl.int32), top, WAYS, BLOCK)
                reaches = (mass_before + found_mass >= p * mass) | (o_way == 0)
                low, high = (
                    tl.max(tl.where(reaches, pivot, low), axis=0),
                    tl.min(tl.where(reaches, high, pivot), axis=0),
                )
        least = order_of(low.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(p_least + row, least)


@triton.jit
def sample_race_kernel(
    p_logits, p_temperature, p_seed, p_step, p_least, p_score, p_id, logits_stride, temperature_stride, vocab, chunk,
    LANES: tl.constexpr, DRAWS: tl.constexpr, FILTERS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The best of a stretch: the largest logit plus Gumbel noise, of the lowest id among equals."""
    begin(OVERLAP)
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, least = 0.0, -float("inf")
    if DRAWS:
        temperature = tl.load(p_temperature + row * temperature_stride)
        seed, step = tl.load(p_seed), tl.load(p_step).to(tl.int64)
    if FILTERS:
        least = tl.load(p_least + row)
    p_logits += row * logits_stride
    o_lane = tl.arange(0, LANES)
    best, best_id = tl.full([LANES], -float("inf"), tl.float32), tl.full([LANES], vocab, tl.int32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, vocab), 4 * LANES):
        if DRAWS:
            call = (start // 4 + o_lane).to(tl.uint32)
            zero = call * 0
            words = tl.philox(
                seed, call, zero + row.to(tl.uint32), zero + step.to(tl.uint32), zero + (step >> 32).to(tl.uint32)
            )
        for j in tl.static_range(4):
            o = start + j * LANES + o_lane
            x = scaled_logits(p_logits + o, o < vocab, temperature)
            score = x
            if DRAWS:
                score = tl.where(temperature > 0, x + gumbel(words[j]), x)
            if FILTERS:
                score = tl.where(x >= least, score, -float("inf"))
            better = score > best
            best, best_id = tl.where(better, score, best), tl.where(better, o, best_id)
    top = tl.max(best, axis=0)
    at = row * tl.num_programs(0) + split
    tl.store(p_score + at, top)
    tl.store(p_id + at, tl.min(tl.where(best == top, best_id, vocab), axis=0))


@triton.jit
def sample_pick_kernel(p_score, p_id, p_out, splits, vocab, SPLITS: tl.constexpr, OVERLAP: tl.constexpr):
    """The best of a row's stretches; 0 where nothing can be drawn."""
    begin(OVERLAP)
    row, o_split = tl.program_id(0), tl.arange(0, SPLITS)
    mask = o_split < splits
    score = tl.load(p_score + row * splits + o_split, mask=mask, other=-float("inf"))
    found = tl.load(p_id + row * splits + o_split, mask=mask, other=0)
    best = tl.min(tl.where(mask & (score == tl.max(score, axis=0)), found, vocab), axis=0)
    tl.store(p_out + row, tl.where(best < vocab, best, 0).to(tl.int64))
