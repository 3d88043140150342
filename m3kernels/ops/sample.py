"""Next tokens from logits, on the device: temperature, top-k, top-p, and a draw that a CUDA graph can replay.

    x = logits / temperature        least = the smallest x that top-k, then top-p on what is left of it, keep
    token = argmax over x >= least of x + gumbel(philox(seed; token, row, step))

Adding Gumbel noise and taking the largest draws with the probabilities softmax(x) (the Gumbel-max trick). The noise is
Philox4x32-10 of the seed, the row and the step alone: a draw depends neither on the batch nor on the GPU, but for sums
and logarithms that round differently. Kernels: :mod:`m3kernels.ops._sample_kernels`; two launches without filters,
seven with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, next_power_of_2, overlap_meta, use_triton
from m3kernels.ops._philox import LOW, laned_calls, laned_words, philox
from m3kernels.ops._sample_kernels import (
    SPAN,
    sample_bins_kernel,
    sample_compact_kernel,
    sample_least_kernel,
    sample_pick_kernel,
    sample_race_kernel,
    sample_top_kernel,
)
from m3kernels.ops._triton import HAS_TRITON

LANES = 512  # neighbouring tokens with a Philox call each: part of what a draw is
GROUP = 4 * LANES
MAX_SPLITS = 64
CUT = SPAN.value if HAS_TRITON else 28.0


@dataclass(frozen=True)
class SampleConfig:
    """Pivots of a round, logits beside them at once, and the same for the end of the search; warps of each kernel."""

    pivots: int = 32
    block: int = 128
    ways: int = 32
    candidates: int = 256
    warps: int = 4
    bins_warps: int = 8
    least_warps: int = 8


CONFIG = SampleConfig()


def scaled_reference(logits: Tensor, temperature: Tensor) -> Tensor:
    """(B, V) fp32 logits over the temperature, as they are where it is 0; NaN is -inf."""
    hot = (temperature > 0)[:, None]
    x = logits.float() / torch.where(hot, temperature[:, None], 1.0)
    x = torch.where(x.isnan(), -float("inf"), x)
    return torch.where(hot, x.clamp(max=torch.finfo(torch.float32).max), x)


def least_allowed_reference(x: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(B, 1): the smallest of the scaled logits (B, V) that top-k, then top-p keep; equal ones are all kept."""
    ordered, _ = x.sort(dim=-1, descending=True)
    top = torch.where(ordered[:, :1].isfinite(), ordered[:, :1], 0.0)
    kth = ordered.gather(1, (top_k.clamp(1, x.shape[1]) - 1)[:, None].long())
    kth = torch.where((top_k > 0)[:, None], kth, -float("inf"))
    kept = ordered >= torch.maximum(kth, top - CUT)
    mass = torch.where(kept, torch.exp(ordered - top), 0.0).double()
    # the one that crosses p is kept
    below_p = mass.cumsum(-1) - mass < top_p.clamp(min=0.0)[:, None].double() * mass.sum(-1, keepdim=True)
    below_p[:, 0] = True
    kept &= below_p | (top_p >= 1)[:, None]
    least = torch.where(kept, ordered, float("inf")).amin(-1, keepdim=True)
    return torch.where(((top_k > 0) | (top_p < 1))[:, None] & ordered[:, :1].isfinite(), least, -float("inf"))


def gumbel_reference(words: Tensor) -> Tensor:
    """-log(E), E exponentially distributed by 32 random bits each."""
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    small = u * (1.0 + u * (0.5 + u * (1 / 3)))
    return -torch.where(u < 2.0**-8, small, -torch.log(1.0 - u)).log()


@torch.no_grad()
def sample_reference(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    greedy: bool = False,
    filters: bool = True,
) -> Tensor:
    """Plain PyTorch: a sort for the filters, the same random bits for the draw."""
    (rows, vocab), device = logits.shape, logits.device
    temperature, top_k, top_p, seed, step = _settings(logits, temperature, top_k, top_p, seed, step)
    temperature, top_k, top_p = (t.expand(rows) for t in (temperature, top_k, top_p))
    x = scaled_reference(logits, torch.zeros_like(temperature) if greedy else temperature)
    scores = x
    if not greedy:
        call = laned_calls(0, vocab, LANES, device).expand(rows, -1)
        row = torch.arange(rows, device=device)[:, None].expand_as(call)
        words = philox(call, row, (step & LOW).expand_as(call), (step >> 32 & LOW).expand_as(call), seed)
        noisy = x + gumbel_reference(laned_words(words, LANES, vocab))
        if filters:
            noisy = torch.where(x >= least_allowed_reference(x, top_k, top_p), noisy, -float("inf"))
        scores = torch.where((temperature > 0)[:, None], noisy, x)
    # argmax takes any of equal ones on a GPU
    token = torch.arange(vocab, device=device).expand_as(scores)
    return torch.where(scores == scores.amax(-1, keepdim=True), token, vocab).amin(-1)


def _settings(logits: Tensor, temperature, top_k, top_p, seed, step) -> list[Tensor]:
    """(B,) or (1,) tensors on the device, fp32 or int64; a tensor of the right kind is taken as it is."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.int64, torch.int64)
    names = ("temperature", "top_k", "top_p", "seed", "step")
    made = []
    for name, value, dtype in zip(names, (temperature, top_k, top_p, seed, step), dtypes):
        sizes = (1,) if name in ("seed", "step") else (1, logits.shape[0])
        if not isinstance(value, Tensor):
            value = torch.full((1,), value, dtype=dtype, device=logits.device)
        if value.dim() > 1 or value.numel() not in sizes or value.device != logits.device:
            raise ValueError(
                f"sample: {name} must be a number, or a tensor of {' or '.join(map(str, sizes))} on {logits.device}; "
                f"got {tuple(value.shape)} on {value.device}"
            )
        if value.is_floating_point() != dtype.is_floating_point:
            raise TypeError(f"sample: {name} must be of a dtype like {dtype}, got {value.dtype}")
        made.append(value.reshape(-1).to(dtype))
    return made


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    greedy: bool = False,
    filters: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One token of each row, drawn on the device; the host never waits for it.

    Settings are numbers, or tensors on the device that a CUDA graph reads anew at each replay: fp32 and int64 are taken as
    they are. The filters come in transformers' order. NaN is as -inf, which is never drawn; a row of nothing else gives 0.

    Args:
        logits: (B, V) in fp32, bf16 or fp16 (fp64: in fp32).
        temperature: one, or (B,); logits are divided by it. 0 takes the largest logit, of the lowest id among equals.
        top_k: one, or (B,): draw among so many of the largest; 0: all. What equals the last of them is among them.
        top_p: one, or (B,): draw among the fewest of the largest whose probabilities, over what top_k leaves, reach it; 1: all.
            What equals the last of them is among them, and so is the largest in any case. With either filter, nothing less
            than e^-28 times as likely as the likeliest is drawn.
        seed, step: of the random bits: with the row's number, the same two give the same noise.
        greedy: the temperature is 0 in all rows, known on the host: two small kernels that read the logits alone.
        filters: False where top_k is 0 and top_p is 1 in all rows, known on the host: neither is looked at.
        backend: "auto", "triton" or "reference".

    Returns:
        (B,) int64.

    Raises:
        ValueError: logits that are not (B, V) with V >= 1, or settings of other sizes or on another device.
        TypeError: settings of another kind.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"sample: logits must be (B, V) with V at least 1, got {tuple(logits.shape)}")
    logits = logits.detach()
    settings = _settings(logits, temperature, top_k, top_p, seed, step)
    if not use_triton("sample", backend, logits):
        options = dict(zip(("temperature", "top_k", "top_p", "seed", "step"), settings))
        return sample_reference(logits, **options, greedy=greedy, filters=filters)
    run = torch.ops.m3kernels.sample if torch.compiler.is_compiling() else _launch
    return run(logits, *settings, greedy, filters and not greedy)


def _launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    step: Tensor,
    greedy: bool,
    filters: bool,
) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunk = GROUP * cdiv(cdiv(vocab, GROUP), MAX_SPLITS)
    splits = cdiv(vocab, chunk)
    options = overlap_meta(logits.device) | {"num_warps": CONFIG.warps}
    least = _least_allowed(logits, temperature, top_k, top_p, chunk, splits, options) if filters else temperature
    score = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    found = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    launch(
        "sample",
        sample_race_kernel,
        (splits, rows),
        *(logits, temperature, seed, step, least, score, found),
        *(logits.stride(0), _stride(temperature), vocab, chunk),
        LANES=LANES,
        DRAWS=not greedy,
        FILTERS=filters,
        **options,
    )
    meta = {"SPLITS": next_power_of_2(splits)}
    launch("sample", sample_pick_kernel, (rows,), score, found, out, splits, vocab, **meta, **options)
    return out


def _stride(setting: Tensor) -> int:
    return 1 if setting.numel() > 1 else 0


def _least_allowed(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    chunk: int,
    splits: int,
    options: dict,
) -> Tensor:
    """(B,) fp32: the least scaled logit that the filters keep, -inf where there are none."""
    (rows, vocab), config = logits.shape, CONFIG
    make = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits.device)
    top, by_k, whole, candidates, least = (
        *(make(rows, splits), make(rows, dtype=torch.int32), make(rows)),
        *(make(rows, vocab), make(rows)),
    )
    rounds = [
        (
            make(rows, config.pivots),
            make(rows, splits, config.pivots, dtype=torch.int32),
            make(rows, splits, config.pivots),
        )
        for _ in range(2)
    ]
    settings = (temperature, top_k, top_p)
    strides = tuple(map(_stride, settings))
    sizes = (logits.stride(0), *strides, vocab, chunk)
    meta = {"PIVOTS": config.pivots, "SPLITS": next_power_of_2(splits), "GROUP": GROUP}
    grid = (splits, rows)
    launch("sample", sample_top_kernel, grid, logits, *settings, top, *sizes, GROUP=GROUP, **options)
    for first, last_round, this_round in ((True, rounds[0], rounds[0]), (False, *rounds)):
        tensors = (logits, *settings, top, *last_round, *this_round, by_k, whole)
        blocks = {"FIRST": first, **meta, "BLOCK": config.block, **options, "num_warps": config.bins_warps}
        launch("sample", sample_bins_kernel, grid, *tensors, *sizes, **blocks)
    found = (top, *rounds[1], by_k, whole, candidates)
    launch("sample", sample_compact_kernel, grid, logits, *settings, *found, *sizes, **meta, **options)
    meta = {**meta, "WAYS": config.ways, "BLOCK": config.candidates, **options, "num_warps": config.least_warps}
    del meta["GROUP"]
    launch("sample", sample_least_kernel, (1, rows), *settings, *found, least, *strides, vocab, splits, **meta)
    return least


def _fake(logits, *_):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


torch.library.custom_op("m3kernels::sample", _launch, mutates_args=()).register_fake(_fake)
