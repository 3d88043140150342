"""Conversations to token ids, the mask of those that the loss counts, and normalised images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example.

    Attributes:
        tokens: (T,) int64 ids.
        supervised: (T,) bool: whether a token is a target of the loss: those of assistant turns and the end of each.
            The first never is.
        images: in the order of their tokens, not decoded.
        sizes: (height, width) of each in pixels after the resize, multiples of 28: (h / 28) * (w / 28) image tokens.
        cut_turns: messages cut off at the end to fit.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    images: tuple
    sizes: tuple[tuple[int, int], ...]
    cut_turns: int = 0


class Encoder:
    eos_token: int
    pad_token: int
    image_token: int
    fingerprint: str
    backend: str

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        max_image_size: int | None = None,
        backend: Literal["auto", "mistral", "processor", "plain"] = "auto",
        system_prompt: str | None = None,
    ) -> "Encoder":
        raise NotImplementedError

    def encode(self, record: dict, *, seq_length: int | None = None) -> Encoded:
        raise NotImplementedError

    def pixels(self, encoded: Encoded) -> list[np.ndarray]:
        raise NotImplementedError

    def prompt(self, record: dict) -> Encoded:
        raise NotImplementedError

    def answer(self, record: dict) -> str:
        raise NotImplementedError

    def decode(self, tokens) -> str:
        raise NotImplementedError
