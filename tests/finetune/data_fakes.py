"""Records, an encoder and streams small enough to know every token of."""

from dataclasses import dataclass, field

import numpy as np

from m3kernels.models.finetune.data.encode import Encoded
from m3kernels.models.finetune.data.records import BadRecord

EOS = 2
IMAGE = 10


@dataclass
class FakeSource:
    """Record i has ``lengths[i]`` tokens of id 100 + i, the last half supervised.

    Attributes:
        refused, unreadable, undecodable: records that are bad when read, when encoded, and when their image is decoded.
        images: records with an image of 28 x 28 pixels of value i.
    """

    lengths: list[int]
    refused: set[int] = field(default_factory=set)
    unreadable: set[int] = field(default_factory=set)
    undecodable: set[int] = field(default_factory=set)
    images: set[int] = field(default_factory=set)
    name: str = "fake"
    fingerprint: str = "fake"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict:
        if i in self.refused:
            raise BadRecord("", "no record")
        return {
            "id": i,
            "length": self.lengths[i],
            "unreadable": i in self.unreadable,
            "undecodable": i in self.undecodable,
            "image": i in self.images or i in self.undecodable,
        }

    def where(self, i: int) -> str:
        return f"fake:{i}"


@dataclass
class FakeStream:
    source: FakeSource
    start: int = 0
    name: str = "stream"
    fingerprint: str = "stream"
    opened: list[int] = field(default_factory=list)

    def __iter__(self):
        self.opened.append(self.start)
        for i in range(self.start, len(self.source)):
            try:
                yield self.source[i]
            except BadRecord as error:
                yield error

    def skip(self, n: int) -> "FakeStream":
        return FakeStream(self.source, self.start + n, opened=self.opened)


class FakeEncoder:
    eos_token, fingerprint = EOS, "encoder"

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def encode(self, record: dict, *, seq_length: int | None = None) -> Encoded:
        if record["unreadable"]:
            raise BadRecord("", "empty answer")
        length, cut = record["length"], 0
        if seq_length is not None and length > seq_length:
            length, cut = seq_length, 1
        tokens = np.full(length, 100 + record["id"], dtype=np.int64)
        supervised = np.arange(length) >= length // 2
        images, sizes = (), ()
        if record["image"]:
            images, sizes = (record,), ((28, 28),)
            tokens[0] = IMAGE
        return Encoded(tokens, supervised, images, sizes, cut)

    def pixels(self, encoded: Encoded) -> list[np.ndarray]:
        for record in encoded.images:
            self.decoded.append(record["id"])
            if record["undecodable"]:
                raise BadRecord("", "image is corrupt")
        return [np.full((3, *size), record["id"], np.float32) for record, size in zip(encoded.images, encoded.sizes)]

    def prompt(self, record: dict) -> Encoded:
        whole = self.encode(record)
        half = len(whole.tokens) // 2
        return Encoded(whole.tokens[:half], np.zeros(half, bool), whole.images, whole.sizes)

    def answer(self, record: dict) -> str:
        return f"answer {record['id']}"


def ids_of(batch) -> list[int]:
    """The ids of a rank's samples, from their places."""
    return [int(where.split(":")[1]) for micro in batch.micro_batches for where in micro.samples]
