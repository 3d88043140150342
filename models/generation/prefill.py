"""Prompts into a cache: images once, tokens in packed chunks, what prompts share computed for one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.models.generation.prompt import GenerationError, Prompt, Sampling
from m3kernels.models.ministral3 import Config, Ministral3
from m3kernels.models.ministral3.cache import KVCache
from m3kernels.models.ministral3.layers import Sequences
from m3kernels.models.ministral3.tokens import Tokens
from m3kernels.models.ministral3.vision import Grids
from m3kernels.parallel import all_gather_tokens

# patches of all images that go through the vision tower at once
MAX_PATCHES = 50_000
# what prompts share is worth a second round of chunks from so many tokens on
WORTH_SHARING = 64


@dataclass(frozen=True)
class Plan:
    """One prompt, checked.

    Attributes:
        prompt: as given.
        grids: rows and columns of patches of each image.
        counts: image tokens of each image.
        keys: see ``Prompt.keys``.
    """

    prompt: Prompt
    grids: Grids
    counts: tuple[int, ...]
    keys: np.ndarray

    @classmethod
    def of(cls, prompt: Prompt, config: Config, name: str) -> "Plan":
        """Raises GenerationError for a prompt that the model does not take."""
        ids = np.asarray(prompt.tokens, dtype=np.int64)
        if not ids.size:
            raise GenerationError(f"{name} is empty; give at least one token")
        if ids.min() < 0 or ids.max() >= config.text.vocab_size:
            raise GenerationError(
                f"{name} has ids from {ids.min()} to {ids.max()}; the model has {config.text.vocab_size}: "
                "are tokenizer and weights of one checkpoint?"
            )
        if prompt.images and config.vision is None:
            raise GenerationError(f"{name} has images, but the checkpoint is a language model alone")
        grids, counts = _grids(prompt, config, name)
        found = 0 if config.image_token is None or config.vision is None else int((ids == config.image_token).sum())
        if found != sum(counts):
            raise GenerationError(f"{name} has {found} image tokens for images that make {sum(counts)}")
        return cls(prompt, grids, counts, prompt.keys(-1 if config.image_token is None else config.image_token, counts))


def planned(prompt: Prompt, config: Config, sampling: Sampling, name: str) -> Plan:
    """A prompt of which there is room for all that ``sampling`` may add; no weight is needed to say so.

    Raises:
        GenerationError: one that the model does not take, or more tokens than it has positions.
    """
    made, most = Plan.of(prompt, config, name), config.text.max_positions
    total = len(made.keys) + sampling.max_new_tokens
    if total > most:
        fits = most - len(made.keys)
        raise GenerationError(
            f"{name} has {len(made.keys)} tokens, and max_new_tokens is {sampling.max_new_tokens}: together {total}, and the "
            f"model has {most} positions; shorten the prompt" + (f", or take max_new_tokens={fits}" if fits > 0 else "")
        )
    return made


def _grids(prompt: Prompt, config: Config, name: str) -> tuple[Grids, tuple[int, ...]]:
    if not prompt.images:
        return (), ()
    vision = config.vision
    side = vision.patch_size * vision.spatial_merge_size
    for image in prompt.images:
        if image.ndim != 3 or image.shape[0] != vision.num_channels or any(n % side or not n for n in image.shape[1:]):
            raise GenerationError(
                f"{name} has an image of shape {tuple(image.shape)}; allowed: ({vision.num_channels}, height, width), "
                f"both multiples of {side}"
            )
    grids = tuple((image.shape[1] // vision.patch_size, image.shape[2] // vision.patch_size) for image in prompt.images)
    return grids, tuple(rows * columns // vision.spatial_merge_size**2 for rows, columns in grids)


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many keys two sequences begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def leaders(plans: Sequence[Plan], held: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Rows that begin as an earlier row does, which is no such row itself: {row: (that row, tokens)}.

    Args:
        held: tokens of each row that are in the cache already.
    """
    found: dict[int, tuple[int, int]] = {}
    for row, plan in enumerate(plans):
        best = (0, -1)
        for other in range(row):
            if other not in found:
                shared = min(common(plan.keys, plans[other].keys), len(plan.keys) - 1)
                best = max(best, (shared, -1 - other))
        if best[0] >= held[row] + WORTH_SHARING:
            found[row] = (-1 - best[1], best[0])
    return found


class Prefill:
    """Fills a cache with what prompts have beyond what it holds of them."""

    def __init__(self, model: Ministral3, chunk: int):
        self.model, self.chunk = model, chunk
        self.group = None if model.layout is None else model.layout.tp_group

    def __call__(self, plans: Sequence[Plan], cache: KVCache) -> Tensor:
        """(B, V) logits of each prompt's last token, fp32 or wider. ``cache.lengths`` says what is there already."""
        features = self.image_features(plans, cache.lengths)
        followers = leaders(plans, cache.lengths)
        last: dict[int, Tensor] = {}
        self._fill([row for row in range(len(plans)) if row not in followers], plans, features, cache, last)
        if followers:
            rows = list(followers)
            cache.take(cache, rows, *(list(x) for x in zip(*followers.values())))
            self._fill(rows, plans, features, cache, last)
        x_BD = torch.stack([last[row] for row in range(len(plans))])
        logits_BV = self.model.whole_vocabulary(self.model.lm_head(x_BD), self.group)
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))

    def image_features(self, plans: Sequence[Plan], held: Sequence[int]) -> dict[int, Tensor]:
        """Features (image tokens, D) by the image's digest, of those images that are not in the cache as a whole.

        ``held``: tokens of each row in the cache.
        """
        missing: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
        for plan, length in zip(plans, held):
            there = int((plan.keys[:length] < 0).sum())
            for image, digest, grid, count in zip(plan.prompt.images, plan.prompt.digests, plan.grids, plan.counts):
                if there < count:
                    missing.setdefault(digest, (image, grid))
                there = max(there - count, 0)
        features: dict[int, Tensor] = {}
        at, entries = 0, list(missing.items())
        while at < len(entries):
            patches, stop = 0, at
            while stop < len(entries) and (stop == at or patches + _size(entries[stop][1][1]) <= MAX_PATCHES):
                patches += _size(entries[stop][1][1])
                stop += 1
            images, grids = zip(*(entry for _, entry in entries[at:stop]))
            made = self.model.model.image_features(_canvas(images).to(self.model.device), grids)
            counts = [_size(grid) // self.model.config.vision.spatial_merge_size**2 for grid in grids]
            features |= {digest: part for (digest, _), part in zip(entries[at:stop], made.split(counts))}
            at = stop
        return features

    def _fill(
        self,
        rows: Sequence[int],
        plans: Sequence[Plan],
        features: dict[int, Tensor],
        cache: KVCache,
        last: dict[int, Tensor],
    ) -> None:
        """Chunk after chunk of the rows' tokens; ``last`` gets the hidden state of each row's last one."""
        todo = [(row, len(plans[row].keys) - cache.lengths[row]) for row in rows]
        while todo:
            taken, space = [], self.chunk
            while todo and space:
                row, count = todo.pop(0)
                taken.append((row, min(count, space)))
                if count > space:
                    todo.insert(0, (row, count - space))
                space -= taken[-1][1]
            x_TD = self._forward(taken, plans, features, cache)
            ends = np.cumsum([count for _, count in taken]) - 1
            for (row, _), end in zip(taken, ends.tolist()):
                if cache.lengths[row] == len(plans[row].keys):
                    # a view would keep the chunk's other hidden states
                    last[row] = x_TD[end].clone()

    def _forward(
        self, taken: list[tuple[int, int]], plans: Sequence[Plan], features: dict[int, Tensor], cache: KVCache
    ) -> Tensor:
        """(T, D) hidden states of so many tokens of each row, after those in the cache."""
        device = self.model.device
        ids, positions, pictures = [], [], []
        for row, count in taken:
            start, plan = cache.lengths[row], plans[row]
            ids.append(np.asarray(plan.prompt.tokens[start : start + count], dtype=np.int64))
            positions.append(np.arange(start, start + count))
            before, here = (int((keys < 0).sum()) for keys in (plan.keys[:start], plan.keys[start : start + count]))
            pictures += _pictures(plan, features, before, here)
        rows, lengths = zip(*taken)
        sequences = Sequences(lengths, rows, device)
        ids_T, positions_T = (
            torch.from_numpy(np.concatenate(x)).to(device, non_blocking=True) for x in (ids, positions)
        )
        tokens = Tokens(ids_T, positions_T, sequences, None, (len(ids_T),))
        if self.group is not None:
            tokens = tokens.padded_to(self.group.size())
        cache.begin(tokens.sequences.rows, tokens.sequences.lengths, device)
        body = self.model.model.language_model
        x_tD = body.embed(tokens.ids_T, self.group)
        if pictures:
            x_tD = self.model.place_features(x_tD, tokens.ids_T, torch.cat(pictures), self.group)
        x_tD = body(x_tD, tokens, cache, self.group)
        cache.end(sum(lengths))
        return all_gather_tokens(x_tD, self.group)


def _pictures(plan: Plan, features: dict[int, Tensor], before: int, count: int) -> list[Tensor]:
    """Features of so many image tokens of a prompt, after the first ``before``."""
    parts, at = [], 0
    for digest, tokens in zip(plan.prompt.digests, plan.counts):
        begin, end = max(before - at, 0), min(before + count - at, tokens)
        if begin < end:
            parts.append(features[digest][begin:end])
        at += tokens
    return parts


def _size(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _canvas(images: Sequence[np.ndarray]) -> Tensor:
    """(images, channels, height, width), each in the upper left corner."""
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    return torch.stack(
        [F.pad(torch.from_numpy(image), (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )
