"""Random pictures and words, for trying out a run."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from m3kernels.models.finetune.data.records import question

ROWS = 1000
SIDE = 256
WORDS = (10, 30)
VOCABULARY = (
    "a the of and in on under over beside behind red green blue yellow small large round square old new bright dark "
    "cat dog house tree river street table chair window door book lamp boat bridge cloud mountain garden stone field "
    "stands lies runs sits shows holds crosses covers reflects"
).split()


class MockSource(Sequence):
    """1,000 random 256 x 256 images, each with a sentence of 10 to 30 random words; each follows from its index."""

    name = "mock"

    def __init__(self, *, rows: int = ROWS, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed
        self.fingerprint = f"mock-{rows}-{seed}"

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.rows:
            raise IndexError(i)
        rng = np.random.default_rng([self.seed, i])
        image = Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))
        words = rng.choice(VOCABULARY, size=rng.integers(WORDS[0], WORDS[1] + 1))
        return question([image], "Describe this image.", " ".join(words.tolist()))

    def where(self, i: int) -> str:
        return f"{self.name}:{i}"


def make_mock_dataset(*, path: str | None = None, split: str = "train", streaming: bool = False) -> MockSource:
    """The mock set; its splits are the same, and it is never read from anywhere."""
    return MockSource()
