"""Hugging Face's padded batches as prompts, and new tokens as transformers' padded rows."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from m3kernels.models.generation.prompt import GenerationError, Prompt
from m3kernels.models.ministral3.config import Config


def prompts_of(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    image_sizes: Tensor | Sequence | None,
    config: Config,
    *,
    pad: int | None = None,
    stops: Sequence[int] = (),
) -> list[Prompt]:
    """Each row's tokens without its padding, wherever that stands, and its images.

    Args:
        input_ids: (batch, seq) integers.
        attention_mask: (batch, seq), 0 where there is padding; None finds ``pad`` where that is no end of a sequence,
            as transformers does.
        pixel_values: (images, channels, height, width), for the image tokens in their order.
        image_sizes: (images, 2), height and width of each in pixels; None: the whole canvas.

    Raises:
        GenerationError: shapes that do not fit together, a row of padding alone, or image tokens that do not fit the images.
    """
    check_ids(input_ids)
    if attention_mask is None:
        infers = pad is not None and pad not in stops
        kept = input_ids != pad if infers else torch.ones_like(input_ids, dtype=torch.bool)
    elif not isinstance(attention_mask, Tensor):
        raise GenerationError(
            f"attention_mask is a {type(attention_mask).__name__}; allowed: a tensor like input_ids, 0 where there is padding"
        )
    elif attention_mask.shape != input_ids.shape:
        raise GenerationError(
            f"attention_mask is {list(attention_mask.shape)} for input_ids {list(input_ids.shape)}; allowed: the same, of padding"
        )
    else:
        kept = attention_mask.to(input_ids.device) != 0
    rows = [ids[mask] for ids, mask in zip(input_ids.cpu().numpy(), kept.cpu().numpy())]
    for number, row in enumerate(rows):
        if not len(row):
            raise GenerationError(
                f"row {number} of the attention mask is 0 everywhere: there is no token to go on from"
            )
    images = images_of(pixel_values, image_sizes)
    shares = _shares(rows, images, config)
    return [Prompt(tuple(row.tolist()), share) for row, share in zip(rows, shares)]


def check_ids(input_ids: Tensor) -> None:
    """Raises GenerationError for what is no batch of ids."""
    if not isinstance(input_ids, Tensor):
        raise GenerationError(
            f"input_ids are a {type(input_ids).__name__}; allowed: a tensor of (batch, seq) integers, as "
            'tokenizer(..., return_tensors="pt") gives it'
        )
    no_ids = input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool
    if input_ids.dim() != 2 or no_ids or not input_ids.numel():
        raise GenerationError(
            f"input_ids are {list(input_ids.shape)} {input_ids.dtype}; allowed: (batch, seq) integers, 1 and more of both"
        )


def images_of(pixels: Tensor | None, sizes: Tensor | Sequence | None) -> list[np.ndarray]:
    """Each image's own part of the canvas, (channels, height, width) float32."""
    if pixels is None:
        return []
    if not isinstance(pixels, Tensor):
        raise GenerationError(
            f"pixel_values are a {type(pixels).__name__}; allowed: a tensor (images, channels, height, width)"
        )
    if pixels.dim() != 4:
        raise GenerationError(f"pixel_values are {list(pixels.shape)}; allowed: (images, channels, height, width)")
    sizes = (
        [tuple(pixels.shape[2:])] * len(pixels) if sizes is None else [tuple(int(n) for n in size) for size in sizes]
    )
    if len(sizes) != len(pixels) or any(h > pixels.shape[2] or w > pixels.shape[3] for h, w in sizes):
        raise GenerationError(
            f"image_sizes are {sizes} for pixel_values {list(pixels.shape)}; give (height, width) of each"
        )
    whole = pixels.detach().float().cpu().numpy()
    return [np.ascontiguousarray(image[:, :h, :w]) for image, (h, w) in zip(whole, sizes)]


def _shares(rows: Sequence[np.ndarray], images: list[np.ndarray], config: Config) -> list[tuple[np.ndarray, ...]]:
    """The images of each row: those whose tokens it has, in their order over the batch."""
    if not images:
        return [()] * len(rows)
    if config.vision is None:
        raise GenerationError("pixel_values for a language model alone: it has no vision tower; leave them out")
    side = config.vision.patch_size * config.vision.spatial_merge_size
    counts = [(image.shape[1] // side) * (image.shape[2] // side) for image in images]
    found = [int((row == config.image_token).sum()) for row in rows]
    shares, at = [], 0
    for number, tokens in enumerate(found):
        first, left = at, tokens
        while left > 0 and at < len(images):
            left -= counts[at]
            at += 1
        if left:
            raise GenerationError(
                f"row {number} of input_ids has {tokens} image tokens; images have {counts} tokens, "
                f"of which it starts with image {first}"
            )
        shares.append(tuple(images[first:at]))
    if at < len(images):
        raise GenerationError(
            f"there are {len(images)} images for {sum(found)} image tokens; images have {counts} tokens"
        )
    return shares


def padded(input_ids: Tensor, rows: Sequence[Sequence[int]], pad: int | None) -> Tensor:
    """(batch, seq + new): the rows as they came, with their new tokens, filled with ``pad`` to the longest."""
    longest = max(map(len, rows))
    new = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=input_ids.dtype)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)
