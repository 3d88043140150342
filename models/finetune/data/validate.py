"""Reads a whole set once, as a training would, and tells what is wrong with which record."""

import math
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np
from torch.utils.data import DataLoader, Dataset

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.loader import begin_worker
from m3kernels.models.finetune.data.packing import fill
from m3kernels.models.finetune.data.reading import walk
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.sources import Source, Stream

PERCENTILES = (50, 90, 99)
# what differs between records that are bad for the same reason: quoted text, paths and URLs, file names, numbers
_VARYING = re.compile(r"""(?<!\w)'[^']*'(?!\w)|"[^"]*"|\S*/\S*|\S+\.\w{2,5}\b|\d+""")


@dataclass(frozen=True)
class Checked:
    """A record that was encoded and whose images were decoded.

    Attributes:
        where: its place.
        reason: what is wrong with it; None of a good one, and only then the numbers say anything.
        tokens, supervised, images, image_tokens, cut_turns: of a good one.
    """

    where: str
    reason: str | None = None
    tokens: int = 0
    supervised: int = 0
    images: int = 0
    image_tokens: int = 0
    cut_turns: int = 0


@dataclass
class Report:
    """What a set has.

    Attributes:
        name: of the set.
        seq_length: the most tokens of a sample.
        bad: those that cannot be trained on.
        lengths: tokens of each good sample, in order.
        supervised, images, image_tokens: totals.
        cut: (where, messages) of samples that were cut at a turn to fit.
    """

    name: str
    seq_length: int
    bad: list[Checked] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    images: int = 0
    image_tokens: int = 0
    cut: list[tuple[str, int]] = field(default_factory=list)

    def add(self, checked: Checked) -> None:
        if checked.reason is not None:
            self.bad.append(checked)
            return
        self.lengths.append(checked.tokens)
        self.supervised += checked.supervised
        self.images += checked.images
        self.image_tokens += checked.image_tokens
        if checked.cut_turns:
            self.cut.append((checked.where, checked.cut_turns))

    @property
    def read(self) -> int:
        return len(self.lengths) + len(self.bad)

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, how many are bad for it), the most frequent first; what differs between them stands as …"""
        same = {}
        for bad in self.bad:
            general = re.sub(r"…(\s+…)+", "…", _VARYING.sub("…", bad.reason))
            same.setdefault(general, Counter())[bad.reason] += 1
        counts = Counter({next(iter(own)) if len(own) == 1 else general: own.total() for general, own in same.items()})
        return counts.most_common()

    def percentiles(self) -> dict[str, int]:
        """Tokens of a sample: min, p50, p90, p99, max."""
        if not self.lengths:
            return {}
        found = np.percentile(self.lengths, PERCENTILES, method="higher").tolist()
        return {
            "min": min(self.lengths),
            **{f"p{p}": int(value) for p, value in zip(PERCENTILES, found)},
            "max": max(self.lengths),
        }

    def packed(self, global_batch_size: int) -> dict[str, float]:
        """Steps until each good sample was seen, forwards a step on one rank, and the share of their room that is filled."""
        if not self.lengths:
            return {"steps_per_epoch": 0, "forwards_per_step": 0.0, "filled": 0.0}
        steps = math.ceil(len(self.lengths) / global_batch_size)
        batches = [self.lengths[n * global_batch_size : (n + 1) * global_batch_size] for n in range(steps)]
        forwards = sum(len(fill(batch, self.seq_length)) for batch in batches)
        return {
            "steps_per_epoch": steps,
            "forwards_per_step": forwards / steps,
            "filled": sum(self.lengths) / (forwards * self.seq_length),
        }

    def to_dict(self, global_batch_size: int) -> dict:
        return {
            "name": self.name,
            "records": self.read,
            "samples": len(self.lengths),
            "tokens": sum(self.lengths),
            "supervised": self.supervised,
            "images": self.images,
            "image_tokens": self.image_tokens,
            "seq_length": self.seq_length,
            "length": self.percentiles(),
            "global_batch_size": global_batch_size,
            **self.packed(global_batch_size),
            "cut": [{"where": where, "messages": messages} for where, messages in self.cut],
            "bad": [
                {key: value for key, value in asdict(bad).items() if key in ("where", "reason")} for bad in self.bad
            ],
            "reasons": [{"reason": reason, "records": count} for reason, count in self.reasons()],
        }


def check_record(record: dict | BadRecord, where: str, encoder: Encoder, *, seq_length: int) -> Checked:
    """Encodes a record and decodes its images."""
    try:
        if isinstance(record, BadRecord):
            raise record
        encoded = encoder.encode(record, seq_length=seq_length)
        encoder.pixels(encoded)
    except BadRecord as error:
        return Checked(error.where or where, error.reason)
    return Checked(
        where,
        None,
        tokens=len(encoded.tokens),
        supervised=int(encoded.supervised.sum()),
        images=len(encoded.sizes),
        image_tokens=int((encoded.tokens == encoder.image_token).sum()),
        cut_turns=encoded.cut_turns,
    )


def validate(
    source: Source | Stream,
    encoder: Encoder,
    *,
    seq_length: int,
    limit: int | None = None,
    num_workers: int = 0,
    advance: Callable[[Checked], None] = lambda checked: None,
) -> Report:
    """Reads every record once.

    Args:
        source: a stream is read by this process alone.
        encoder: of the checkpoint.
        seq_length: the most tokens of a sample.
        limit: read the first so many records alone.
        num_workers: processes that encode and decode.
        advance: is called with each record, in order.

    Raises:
        FinetuneError: what no record can help, such as a chat template that does not end answers.
        RuntimeError: another exception, such as a defect of a maker, with the record's place.
    """
    report = Report(source.name, seq_length)
    for checked in _checked(source, encoder, seq_length, limit, num_workers):
        report.add(checked)
        advance(checked)
    return report


def _checked(source, encoder, seq_length: int, limit: int | None, num_workers: int) -> Iterator[Checked]:
    if not isinstance(source, Source):
        for where, record in islice(walk(source), limit):
            yield check_record(record, where, encoder, seq_length=seq_length)
        return
    count = len(source) if limit is None else min(limit, len(source))
    records = _Records(source, encoder, seq_length, count)
    loader = records
    if num_workers:
        loader = DataLoader(records, batch_size=None, num_workers=num_workers, worker_init_fn=begin_worker)
    for checked in loader:
        if isinstance(checked, _Failure):
            raise FinetuneError(checked.text) if checked.is_ours else RuntimeError(checked.text)
        yield checked


@dataclass(frozen=True)
class _Failure:
    text: str
    is_ours: bool


class _Records(Dataset):
    def __init__(self, source: Source, encoder: Encoder, seq_length: int, count: int) -> None:
        self.source, self.encoder, self.seq_length, self.count = source, encoder, seq_length, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Checked | _Failure:
        if i >= self.count:
            raise IndexError(i)
        where = self.source.where(i)
        try:
            try:
                record = self.source[i]
            except BadRecord as error:
                record = error
            return check_record(record, where, self.encoder, seq_length=self.seq_length)
        except FinetuneError as error:
            return _Failure(f"{where}: {error}", True)
        except Exception:
            return _Failure(f"{where} cannot be checked:\n{traceback.format_exc()}", False)
