"""How a checkpoint's own code sizes images and makes arrays of them."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.records import BadRecord

PATCH_SIZE = 14
MERGE_SIZE = 2
TOKEN_PIXELS = PATCH_SIZE * MERGE_SIZE


class Images(Protocol):
    """The image side of a checkpoint."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels after the resize: multiples of 28."""

    def array(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """(3, height, width) float32, normalised."""


@dataclass(frozen=True)
class NoImages:
    """Of a checkpoint without image processing."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        raise BadRecord("", "the record has an image, but the checkpoint has no image processor")

    array = size


@dataclass(frozen=True)
class MistralImages:
    """mistral-common's resize: over white, bicubic by OpenCV; sizes are rounded.

    Attributes:
        max_size: the longest side in pixels before it is padded up to whole image tokens.
    """

    max_size: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        ratio = max(height / self.max_size, width / self.max_size)
        if ratio > 1:
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        return _whole(height), _whole(width)

    def array(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        from mistral_common.tokens.tokenizers.image import transform_image

        return np.ascontiguousarray(transform_image(image, (size[1], size[0])), dtype=np.float32)


@dataclass(frozen=True)
class ProcessorImages:
    """A Hugging Face image processor's resize; sizes are floored."""

    processor: object
    max_size: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        ratio = max(height / self.max_size, width / self.max_size)
        if ratio > 1:
            width, height = math.floor(width / ratio), math.floor(height / ratio)
        if not width or not height:
            raise BadRecord("", f"an image so narrow that a side is 0 once the other is {self.max_size} pixels")
        return _whole(height), _whole(width)

    def array(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        token = {"height": TOKEN_PIXELS, "width": TOKEN_PIXELS}
        made = self.processor(
            [image.convert("RGB")], size={"longest_edge": self.max_size}, patch_size=token, return_tensors="np"
        )
        return np.ascontiguousarray(np.asarray(made["pixel_values"][0]), dtype=np.float32)


def limited(own: int, wanted: int | None) -> int:
    """The longest side: the checkpoint's own, or a lower one that is wanted.

    Raises:
        FinetuneError: more than the checkpoint's own, or less than one image token.
    """
    if wanted is None:
        return own
    if not TOKEN_PIXELS <= wanted <= own:
        raise FinetuneError(
            f"dataset.max_image_size={wanted}; allowed: {TOKEN_PIXELS} to {own}, the limit of the checkpoint"
        )
    return wanted


def check_grid(patch_size: int, merge_size: int, file: str) -> None:
    """Raises FinetuneError for image tokens of other than 28 pixels a side."""
    if (patch_size, merge_size) != (PATCH_SIZE, MERGE_SIZE):
        raise FinetuneError(
            f"{file} has image patches of {patch_size} pixels merged {merge_size} x {merge_size}; Ministral 3 has "
            f"{PATCH_SIZE} and {MERGE_SIZE}: take the tokenizer and processor files of the checkpoint itself"
        )


def image_tokens(size: tuple[int, int], *, image: int, row_end: int, end: int) -> list[int]:
    """The ids of one image, row by row, of (height, width) in pixels."""
    row = [image] * (size[1] // TOKEN_PIXELS) + [row_end]
    return [*(row * (size[0] // TOKEN_PIXELS))[:-1], end]


def _whole(pixels: int) -> int:
    return -(-pixels // TOKEN_PIXELS) * TOKEN_PIXELS
