"""The records of a step's global batch, of sets with an index and of streams, and what stands in for bad ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.order import candidate, permutation
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.sources import Source, Stream

_END = object()


@dataclass(frozen=True)
class IndexedBatch:
    """Places of a global batch in a set with an index: (epoch, index) of each."""

    source: Source
    seed: int
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def index(self, place: int, attempt: int = 0) -> int:
        epoch, index = self.places[place]
        return candidate(self.seed, epoch, index, attempt, len(self.source)) if attempt else index

    def where(self, place: int, attempt: int = 0) -> str:
        return self.source.where(self.index(place, attempt))

    def record(self, place: int, attempt: int = 0) -> dict:
        """The record, or what stands in for it at the ``attempt``-th time. Raises BadRecord."""
        return self.source[self.index(place, attempt)]


@dataclass(frozen=True)
class StreamedBatch:
    """Records of a global batch, each after its position in the stream; others of the batch stand in for bad ones."""

    name: str
    seed: int
    first: int
    found: tuple[tuple[int, dict | BadRecord], ...]

    def __len__(self) -> int:
        return len(self.found)

    def index(self, place: int, attempt: int = 0) -> int:
        return candidate(self.seed, 0, self.first + place, attempt, len(self)) if attempt else place

    def where(self, place: int, attempt: int = 0) -> str:
        return f"{self.name}:{self.found[self.index(place, attempt)][0]}"

    def record(self, place: int, attempt: int = 0) -> dict:
        """The record, or what stands in for it at the ``attempt``-th time. Raises BadRecord."""
        record = self.found[self.index(place, attempt)][1]
        if isinstance(record, BadRecord):
            raise record
        return record


class IndexedReader:
    """Global batches of a set with an index. It keeps two epochs' order, 8 bytes a record each.

    Args:
        once: stop at the end of the first epoch.
    """

    def __init__(self, source: Source, *, seed: int, shuffle: bool, once: bool) -> None:
        if not len(source):
            raise FinetuneError(f"{source.name} has no records")
        self.source, self.seed, self.shuffle, self.once = source, seed, shuffle, once
        self.length: int | None = len(source)
        self._orders: dict[int, np.ndarray] = {}

    def places(self, first: int, count: int) -> tuple[tuple[int, int], ...]:
        """(epoch, index) of the samples from the ``first``-th of the run on."""
        last = min(first + count, self.length) if self.once else first + count
        return tuple(self._place(position) for position in range(first, last))

    def batch(self, first: int, count: int) -> IndexedBatch:
        return IndexedBatch(self.source, self.seed, self.places(first, count))

    def _place(self, position: int) -> tuple[int, int]:
        epoch, at = divmod(position, self.length)
        return epoch, int(self._order(epoch)[at]) if self.shuffle else at

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            kept = {other: order for other, order in self._orders.items() if other == epoch - 1}
            self._orders = {**kept, epoch: permutation(self.seed, epoch, self.length)}
        return self._orders[epoch]

    def __getstate__(self) -> dict:
        # made again by the worker that gets it
        return {**self.__dict__, "_orders": {}}


class StreamReader:
    """Global batches of a stream, which begins again where it ends.

    What is asked for next is what comes next; anything else opens the stream once more and skips.
    """

    def __init__(self, stream: Stream, *, seed: int, once: bool) -> None:
        self.stream, self.seed, self.once = stream, seed, once
        self.length: int | None = None
        self._records: Iterator | None = None
        # of the next record: in the run and in the stream, and where that was opened
        self._next = self._at = self._opened = 0

    def places(self, first: int, count: int) -> tuple[tuple[int, int], ...]:
        """(0, position) of the samples from the ``first``-th of the run on."""
        return tuple((0, position) for position in range(first, first + count))

    def batch(self, first: int, count: int) -> StreamedBatch:
        found = []
        for position in range(first, first + count):
            record = self._read(position)
            if record is _END:
                break
            found.append((self._at - 1, record))
        return StreamedBatch(self.stream.name, self.seed, first, tuple(found))

    def _read(self, position: int):
        if self._records is None or position != self._next:
            self._open(position)
        record = next(self._records, _END)
        if record is _END and not self.once:
            self._open(position % self._counted())
            record = next(self._records, _END)
        self._next, self._at = position + 1, self._at + 1
        return record

    def _open(self, position: int) -> None:
        self._records = iter(self.stream.skip(position) if position else self.stream)
        self._opened = self._at = position

    def _counted(self) -> int:
        """The stream's length, once it has ended."""
        if self.length is None:
            # ended at once, it may be shorter than what was skipped
            ended_at_once = self._opened == self._at > 0
            self.length = sum(1 for _ in self.stream) if ended_at_once else self._at
        if not self.length:
            raise FinetuneError(f"{self.stream.name} has no records")
        return self.length

    def __getstate__(self) -> dict:
        # an open iterator stays where it is
        return {**self.__dict__, "_records": None}


Reader = IndexedReader | StreamReader
Batch = IndexedBatch | StreamedBatch


def open_reader(source: Source | Stream, *, seed: int, shuffle: bool, once: bool) -> Reader:
    """A reader of either kind; streams come in their own order."""
    if isinstance(source, Source):
        return IndexedReader(source, seed=seed, shuffle=shuffle, once=once)
    return StreamReader(source, seed=seed, once=once)


def walk(source: Source | Stream, indices: Sequence[int] | None = None) -> Iterator[tuple[str, dict | BadRecord]]:
    """(where, record) in order, once; a bad record as its BadRecord.

    Args:
        indices: these records alone, rising for a stream.
    """
    reader = open_reader(source, seed=0, shuffle=False, once=True)
    position = 0
    while indices is None or position < len(indices):
        batch = reader.batch(position if indices is None else indices[position], 1)
        if not len(batch):
            return
        where = batch.where(0)
        try:
            yield where, batch.record(0)
        except BadRecord as error:
            yield where, error.at(where)
        position += 1
