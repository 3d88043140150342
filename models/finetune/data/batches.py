"""What a step computes: packed micro batches, and the records that were bad."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.encode import Encoded

IGNORED = -100
LISTED = 20
# a share of fewer records says nothing, unless so many of them are bad
JUDGED_READ, JUDGED_BAD = 100, 10


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples of one forward, one after the other.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, not shifted, -100 where nothing is predicted; the first of each sample is -100.
        cu_seqlens: (samples + 1) boundaries.
        pixel_values: (images, 3, H, W) float32, zeros beyond each image's own size; None without images.
        image_sizes: (height, width) of each image in pixels, in the order of the image tokens.
        samples: where each sample comes from.
        supervised: labels that are not -100.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: tuple[int, ...]
    pixel_values: Tensor | None
    image_sizes: tuple[tuple[int, int], ...]
    samples: tuple[str, ...]
    supervised: int

    def inputs(self, device: torch.device | str, dtype: torch.dtype) -> dict:
        """Keyword arguments of ``Ministral3.forward``: ids and labels (1, T), pixels in ``dtype``."""
        images = {}
        if self.pixel_values is not None:
            images = {"pixel_values": self.pixel_values.to(device, dtype), "image_sizes": self.image_sizes}
        return {
            "input_ids": self.input_ids[None].to(device),
            "labels": self.labels[None].to(device),
            "cu_seqlens": self.cu_seqlens,
            **images,
        }


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One rank's part of a step's global batch.

    Attributes:
        step: from 0.
        micro_batches: equally many on every rank; one without samples is a single token without a label.
        tokens, supervised: of this rank's samples.
        capacity: tokens that there is room for: micro batches times seq_length, and times their samples unpacked.
        read: records that were looked at for this rank's samples, those that were bad included.
        bad: (where, reason) of the bad ones.
        samples: of all ranks; 0 behind the end of a set that is read once.
        cut: samples of this rank whose last turns were cut off to fit.
        agreed: a number made from the lengths of all samples: ranks that differ in it have read other data.
    """

    step: int
    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    supervised: int
    capacity: int
    read: int
    bad: tuple[tuple[str, str], ...]
    samples: int
    cut: int
    agreed: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model is asked, and the answer that the data has.

    Attributes:
        where: the record's place.
        tokens: ids up to where the answer begins.
        pixel_values, image_sizes: as a MicroBatch's.
        answer: text.
    """

    where: str
    tokens: list[int]
    pixel_values: Tensor | None
    image_sizes: tuple[tuple[int, int], ...]
    answer: str


def micro_batch(samples: Sequence[tuple[str, Encoded]], pixels: Sequence[np.ndarray], *, filler: int) -> MicroBatch:
    """Samples and the (3, height, width) arrays of all their images as one row; a single ``filler`` token without any."""
    if not samples:
        ids, labels = torch.tensor([filler]), torch.tensor([IGNORED])
        return MicroBatch(ids, labels, (0, 1), None, (), (), 0)
    ids = np.concatenate([encoded.tokens for _, encoded in samples])
    supervised = np.concatenate([encoded.supervised for _, encoded in samples])
    bounds = np.cumsum([0, *(len(encoded.tokens) for _, encoded in samples)])
    # the token before it belongs to another sample
    supervised[bounds[:-1]] = False
    labels = np.where(supervised, ids, IGNORED)
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        cu_seqlens=tuple(bounds.tolist()),
        pixel_values=stack_pixels(pixels),
        image_sizes=tuple(size for _, encoded in samples for size in encoded.sizes),
        samples=tuple(where for where, _ in samples),
        supervised=int(supervised.sum()),
    )


def stack_pixels(pixels: Sequence[np.ndarray]) -> Tensor | None:
    """(images, 3, H, W) float32 with zeros at right and bottom of smaller images; None without images."""
    if not pixels:
        return None
    height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
    stacked = torch.zeros(len(pixels), 3, height, width)
    for row, image in zip(stacked, pixels):
        row[:, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
    return stacked


@dataclass
class BadRecords:
    """How many records were read, and which of them were bad.

    Attributes:
        read, count: records looked at, and how many times one was bad.
        reasons: by place; a record that is met again is there once.
    """

    read: int = 0
    count: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, batch: StepBatch) -> None:
        self.read += batch.read
        self.count += len(batch.bad)
        self.reasons.update(batch.bad)

    def share(self) -> float:
        return self.count / max(self.read, 1)

    def raise_if_over(self, limit: float) -> None:
        """Raises FinetuneError where more than this share of the records was bad, once there are enough to tell."""
        if self.share() <= limit or (self.read < JUDGED_READ and self.count < JUDGED_BAD):
            return
        listed = [f"  {where}: {reason}" for where, reason in list(self.reasons.items())[:LISTED]]
        more = len(self.reasons) - len(listed)
        raise FinetuneError(
            "\n".join(
                [
                    f"{self.count} of {self.read} records read were bad ({self.share():.1%}); dataset.max_bad_share "
                    f"allows {limit:.1%}. Mend them or raise it; m3kernels data validate lists them all:",
                    *listed,
                    *([f"  and {more} more"] if more else []),
                ]
            )
        )
