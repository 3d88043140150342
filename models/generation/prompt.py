"""What generation takes: prompts as token ids with the pixels of their images, and how tokens are drawn."""

import hashlib
import math
import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# what stands for an image token in a prompt's keys; ids are not negative
_IMAGE = 1 << 62


class GenerationError(ValueError):
    """A prompt, an option or a checkpoint that nothing can be generated from; the message says what is allowed."""


def whole(name: str, value) -> int:
    """An option's value as int; raises GenerationError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise GenerationError(f"{name}={value!r}; allowed: a whole number") from None


def real(name: str, value) -> float:
    """An option's value as float; raises GenerationError for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise GenerationError(f"{name}={value!r}; allowed: a number") from None


@dataclass(frozen=True, eq=False)
class Prompt:
    """One sequence to go on from.

    Attributes:
        tokens: ids without padding, image tokens in their places.
        images: of each image in the order of its tokens, (3, height, width) float32, normalised; sides are multiples of
            what one image token covers.
    """

    tokens: tuple[int, ...]
    images: tuple[np.ndarray, ...] = ()

    @cached_property
    def digests(self) -> tuple[int, ...]:
        """62 bits of each image's content."""
        return tuple(
            int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest(), "little") % _IMAGE
            for image in self.images
        )

    def keys(self, image_token: int, counts: tuple[int, ...]) -> np.ndarray:
        """(T,) int64, equal where two prompts have the same token of the same image, or the same text.

        Args:
            counts: how many image tokens each image has.
        """
        keys = np.array(self.tokens, dtype=np.int64)
        which = np.repeat(np.array([-1 - digest for digest in self.digests], dtype=np.int64), counts)
        keys[keys == image_token] = which
        return keys


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when to stop.

    Attributes:
        max_new_tokens: at most so many after each prompt.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0: all.
        top_p: draw among the fewest likeliest tokens whose probabilities reach p together; 1: all.
        seed: of the draws; a row's draws depend on it, the row's number and the step alone.
        stop_tokens: ids that end a sequence.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("max_new_tokens", "top_k", "seed"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens={self.max_new_tokens}; allowed: 1 and more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError(f"temperature={self.temperature}; allowed: 0 (the likeliest token) and more")
        if self.top_k < 0:
            raise GenerationError(f"top_k={self.top_k}; allowed: 0 (all tokens) and more")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p={self.top_p}; allowed: above 0, up to 1 (all tokens)")
        if not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed={self.seed}; allowed: 0 to 2^63 - 1")
