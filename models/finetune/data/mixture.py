"""Several sources as one, by weights."""

import math
from collections.abc import Sequence

import numpy as np

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.tables import combined


class Mixture:
    """Sources mixed so that any stretch holds them by their weights.

    An epoch is as long as it takes to see every record of every source once; the others repeat in it, each only after
    all its records have come. What stands at an index follows from the seed alone.

    Args:
        weights: how often each source comes, relative to each other; their sizes by default, so that none repeats.

    Raises:
        FinetuneError: an empty source, or weights that are not as many as sources or not above 0.
    """

    def __init__(self, sources: Sequence, *, weights: Sequence[float] = (), seed: int = 0) -> None:
        self.sources, self.seed = tuple(sources), seed
        sizes = [len(source) for source in self.sources]
        for source, size in zip(self.sources, sizes):
            if not size:
                raise FinetuneError(f"{source.name} has no records")
        weights = [float(w) for w in weights or sizes]
        if len(weights) != len(sizes) or not all(0 < w < math.inf for w in weights):
            raise FinetuneError(
                f"dataset.weights={tuple(weights)} for {len(sizes)} sources; one number above 0 is needed for each"
            )
        rounds = max(size / weight for size, weight in zip(sizes, weights))
        counts = [max(size, round(weight * rounds)) for size, weight in zip(sizes, weights)]
        self.source_of, self.index_of = self._order(sizes, counts)
        self.name = "+".join(source.name for source in self.sources)
        self.fingerprint = combined([*(source.fingerprint for source in self.sources), repr(counts), str(seed)])

    def _order(self, sizes: list[int], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(epoch,) arrays: which source, and which of its records."""
        which, index, at = [], [], []
        for n, (size, count) in enumerate(zip(sizes, counts)):
            passes = [np.random.default_rng([self.seed, n, k]).permutation(size) for k in range(-(-count // size))]
            index.append(np.concatenate(passes)[:count])
            which.append(np.full(count, n, dtype=np.int32))
            at.append((np.arange(count) + 0.5) / count)
        order = np.argsort(np.concatenate(at), kind="stable")
        return np.concatenate(which)[order], np.concatenate(index)[order]

    def __len__(self) -> int:
        return len(self.source_of)

    def locate(self, i: int) -> tuple[int, int]:
        """(source, index in it) of a record."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return int(self.source_of[i]), int(self.index_of[i])

    def __getitem__(self, i: int) -> dict:
        source, index = self.locate(i)
        return self.sources[source][index]

    def where(self, i: int) -> str:
        source, index = self.locate(i)
        return self.sources[source].where(index)
