"""What every step of a run computes, as a function of the seed and the step alone."""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.batches import BadRecords, MicroBatch, Prompt, StepBatch, micro_batch, stack_pixels
from m3kernels.models.finetune.data.encode import Encoded, Encoder
from m3kernels.models.finetune.data.loader import step_batches
from m3kernels.models.finetune.data.packing import share_out
from m3kernels.models.finetune.data.reading import Batch, open_reader, walk
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.sources import Source, Stream

__all__ = ["BadRecords", "MicroBatch", "Plan", "Prompt", "StepBatch"]

REPLACEMENTS = 16


@dataclass(frozen=True, eq=False)
class Sample:
    """A place of a global batch and what fills it.

    Attributes:
        place: in the global batch.
        attempt: 0 for the record itself, else how often another was looked for.
        where: the record's.
        encoded: None where no record was good.
        read, bad: as a StepBatch's.
    """

    place: int
    attempt: int
    where: str
    encoded: Encoded | None
    read: int = 0
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Layout:
    """A step's samples, encoded, and which rank computes which.

    Attributes:
        batch: their records.
        samples: by place.
        bins: of each rank, then each of its micro batches, the places in it.
    """

    batch: Batch
    samples: tuple[Sample, ...]
    bins: tuple[tuple[tuple[int, ...], ...], ...]


class Plan:
    """Batches of a run. There is no state: any step can be asked for, by any rank, at any time.

    Step k's global batch has the samples from k * global_batch_size on of one epoch after the other, each in an order of
    its own that follows from the seed. Neither ranks, packing nor micro batches change which samples these are. Every
    rank encodes all of them, from text and image headers, so that all agree on the bins, and decodes the images of its
    own bins alone.

    A bad record is replaced by up to 16 candidates that follow from seed, epoch and index; where none is good, its place
    stays empty. An image that cannot be decoded is found by one rank only, when the bins are made: there a candidate must
    not be longer than the sample that it replaces.

    Args:
        source: a Source, or a Stream, whose records are taken as they come, and again from the beginning at its end.
        encoder: of the checkpoint.
        seed: of the order; not negative.
        global_batch_size: samples a step, over all ranks.
        micro_batch_size: samples of a forward without packing.
        seq_length: the most tokens of a sample, and of a forward with packing.
        pack: whether forwards are filled up to ``seq_length``.
        shuffle: whether epochs have an order of their own; a stream shuffles itself.

    Attributes:
        steps_per_epoch: until each sample was seen; None for a stream.
        fingerprint: changes when a step would have other samples or tokens.

    Raises:
        FinetuneError: sizes below 1, or no records.
    """

    def __init__(
        self,
        source: Source | Stream,
        encoder: Encoder,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int = 1,
        seq_length: int,
        pack: bool = True,
        shuffle: bool = True,
    ) -> None:
        sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "seq_length": seq_length}
        for name, size in sizes.items():
            if size < 1:
                raise FinetuneError(f"{name}={size}; it must be at least 1")
        if seed < 0:
            raise FinetuneError(f"rng.seed={seed}; it must not be negative")
        self.source, self.encoder, self.seed, self.shuffle = source, encoder, seed, shuffle
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.seq_length, self.pack = seq_length, pack
        self._reader = open_reader(source, seed=seed, shuffle=shuffle, once=False)
        self._attempts = 1 + REPLACEMENTS
        self.is_stream = not isinstance(source, Source)
        self.steps_per_epoch = None if self.is_stream else math.ceil(len(source) / global_batch_size)
        parts = (source.fingerprint, encoder.fingerprint, seed, global_batch_size, seq_length, shuffle)
        self.fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def indices(self, step: int) -> list[int]:
        """Records of a step's global batch; positions in a stream."""
        first = step * self.global_batch_size
        return [index for _, index in self._reader.places(first, self.global_batch_size)]

    def batch(self, step: int, rank: int, ranks: int) -> StepBatch:
        """A data-parallel rank's part of a step's global batch."""
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        layout = self.layout(step, ranks)
        counted = [sample for sample in layout.samples if sample.encoded is None] if rank == 0 else []
        micro_batches, cut = [], 0
        for places in layout.bins[rank]:
            found = [self._decoded(layout.batch, layout.samples[place]) for place in places]
            counted += [sample for sample, _ in found]
            kept = [(sample, pixels) for sample, pixels in found if sample.encoded is not None]
            cut += sum(sample.encoded.cut_turns > 0 for sample, _ in kept)
            pairs = [(sample.where, sample.encoded) for sample, _ in kept]
            images = [image for _, pixels in kept for image in pixels]
            micro_batches.append(micro_batch(pairs, images, filler=self.encoder.eos_token))
        room = self.seq_length * (1 if self.pack else self.micro_batch_size)
        return StepBatch(
            step=step,
            micro_batches=tuple(micro_batches),
            tokens=sum(micro.input_ids.numel() for micro in micro_batches if micro.samples),
            supervised=sum(micro.supervised for micro in micro_batches),
            capacity=len(micro_batches) * room,
            read=sum(sample.read for sample in counted),
            bad=tuple(pair for sample in counted for pair in sample.bad),
            samples=len(layout.samples),
            cut=cut,
            agreed=zlib.crc32(repr([_length(sample) for sample in layout.samples]).encode()),
        )

    def layout(self, step: int, ranks: int) -> Layout:
        """A step's samples and bins, the same on every rank."""
        batch = self._reader.batch(step * self.global_batch_size, self.global_batch_size)
        samples = tuple(self._encoded(batch, Sample(place, -1, "", None)) for place in range(len(batch)))
        places = [sample.place for sample in samples if sample.encoded is not None]
        limit = {"capacity": self.seq_length} if self.pack else {"samples": self.micro_batch_size}
        bins = share_out([_length(samples[place]) for place in places], ranks=ranks, **limit)
        named = tuple(tuple(tuple(places[n] for n in micro) for micro in own) for own in bins)
        return Layout(batch, samples, named)

    def eval_batches(self, iters: int, rank: int = 0, ranks: int = 1, *, num_workers: int = 0) -> Iterator[StepBatch]:
        """A rank's part of the first ``iters`` global batches, every sample at most once; the last may be smaller.

        Bad records are left out.
        """
        once = self._once()
        last = iters if self.steps_per_epoch is None else min(iters, self.steps_per_epoch)
        for batch in step_batches(once, 0, last, rank=rank, ranks=ranks, num_workers=num_workers):
            if not batch.samples:
                return
            yield batch

    def prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` records that are good, without their last answers."""
        found = []
        for where, record in walk(self.source) if count else ():
            if isinstance(record, BadRecord):
                continue
            try:
                # the whole must fit, as in training
                self.encoder.encode(record, seq_length=self.seq_length)
                prompt, answer = self.encoder.prompt(record), self.encoder.answer(record)
                pixels = stack_pixels(self.encoder.pixels(prompt))
            except BadRecord:
                continue
            found.append(Prompt(where, prompt.tokens.tolist(), pixels, prompt.sizes, answer))
            if len(found) == count:
                break
        return found

    def _once(self) -> "Plan":
        """The same until the end of the first epoch, without replacements."""
        options = ("seed", "global_batch_size", "micro_batch_size", "seq_length", "pack", "shuffle")
        plan = Plan(self.source, self.encoder, **{name: getattr(self, name) for name in options})
        plan._reader = open_reader(self.source, seed=self.seed, shuffle=self.shuffle, once=True)
        plan._attempts = 1
        return plan

    def _encoded(self, batch: Batch, sample: Sample, *, room: int | None = None) -> Sample:
        """The first good record for a place after those that were tried, of at most ``room`` tokens."""
        read, bad = sample.read, list(sample.bad)
        for attempt in range(sample.attempt + 1, self._attempts):
            where = batch.where(sample.place, attempt)
            read += 1
            try:
                encoded = self.encoder.encode(batch.record(sample.place, attempt), seq_length=self.seq_length)
            except BadRecord as error:
                error = error.at(where)
                bad.append((error.where, error.reason))
                continue
            if room is None or len(encoded.tokens) <= room:
                return Sample(sample.place, attempt, where, encoded, read, tuple(bad))
        return Sample(sample.place, self._attempts, "", None, read, tuple(bad))

    def _decoded(self, batch: Batch, sample: Sample) -> tuple[Sample, list[np.ndarray]]:
        """A sample with its images, or the first candidate of no more tokens whose images can be decoded."""
        room = _length(sample)
        while sample.encoded is not None:
            try:
                return sample, self.encoder.pixels(sample.encoded)
            except BadRecord as error:
                bad = (*sample.bad, (error.where or sample.where, error.reason))
                sample = self._encoded(batch, dataclasses.replace(sample, bad=bad), room=room)
        return sample, []


def _length(sample: Sample) -> int:
    return 0 if sample.encoded is None else len(sample.encoded.tokens)
