"""The order of samples as a function of seed and epoch, and what stands in for bad records.

Raw 64-bit words of numpy's PCG64, seeded by a SeedSequence, are the same in every numpy version; the shuffles of its
Generator may change, and a resumed run would then go on with other samples.
"""

import numpy as np

# numpy takes (1, 2) and (1, 2, 0) for the same seed: what a seed is for comes first
_EPOCH, _CANDIDATE = 1, 2


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: every index once, by sorting as many random words. It takes 16 bytes an index while it runs."""
    words = np.random.PCG64(np.random.SeedSequence((_EPOCH, seed, epoch))).random_raw(count)
    return np.argsort(words, kind="stable")


def candidate(seed: int, epoch: int, index: int, attempt: int, count: int) -> int:
    """What is tried at the ``attempt``-th time instead of a bad record: an index below ``count``."""
    word = np.random.PCG64(np.random.SeedSequence((_CANDIDATE, seed, epoch, index, attempt))).random_raw()
    return int(word) % count
