"""AdamW of many tensors in one launch.

    g = factor * gradient                   m = m + (1 - b1) (g - m)            v = b2 v + (1 - b2) g²
    w = w (1 - lr decay) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Matches ``torch.optim.AdamW``, and after ``factor`` ``torch.nn.utils.clip_grad_norm_``. Arithmetic and moments are fp32; what
only depends on the step is computed in fp64 on the host. fp32 parameters are masters, each with a 16-bit copy that is
written in the same pass where one is given. bf16 parameters are rounded stochastically: 16 random bits are added to the fp32
value and the rest is cut off, so that it goes to either neighbour with the chance that its distance gives, and no update
is lost on average. The bits are Philox4x32-10 of (seed; element, step, number of the tensor), the same in the reference.

A table on the device holds addresses, another cuts the tensors into chunks, one program each: four hundred small adapters
are one launch, and an embedding lies on all SMs. Everything is read and written once. Bytes an element: 28 for a bf16 gradient,
fp32 master and bf16 copy, 22 for a bf16 parameter; the 3.43e9 of the 3B are 32 and 25 ms at 3.0 TB/s.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, use_triton
from m3kernels.ops._philox import LOW, laned_calls, laned_words, philox
from m3kernels.ops._tensor_lists import TYPES, at, chunks_of, upload
from m3kernels.ops._triton import tl, triton

LANES = 512  # neighbouring elements with a Philox call each: part of what a run's random bits are
GROUP = 4 * LANES  # elements of one Philox call's four words
PIECE = 2**22  # elements that the reference takes at once, a multiple of GROUP


@dataclass(frozen=True)
class ChunkConfig:
    """Elements one program handles, a multiple of GROUP, and its warps.

    By LANES and warps a thread has 4 neighbours, 16 bytes of fp32, and 128 registers: four programs on an SM.
    """

    chunk: int = 32_768
    warps: int = 4


CONFIG = ChunkConfig()


@triton.jit
def _adamw_chunk(
    a_parameter, a_gradient, a_exp_avg, a_exp_avg_sq, a_copy, start, size, factor, decay, number,
    rest1, beta2, rest2, step_size, root, eps, seed, step,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, COPY: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    p_parameter, p_gradient = at(a_parameter, start, PARAMETER, WHOLE), at(a_gradient, start, GRADIENT, WHOLE)
    p_exp_avg, p_exp_avg_sq = at(a_exp_avg, start, tl.float32, WHOLE), at(a_exp_avg_sq, start, tl.float32, WHOLE)
    o_lane = tl.arange(0, LANES)
    for first in range(0, CHUNK if WHOLE else tl.minimum(CHUNK, size - start).to(tl.int32), 4 * LANES):
        if PARAMETER == tl.bfloat16:
            call = (start + first) // 4 + o_lane
            low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
            words = tl.philox(seed, low, high, high * 0 + step.to(tl.uint32), high * 0 + number.to(tl.uint32))
        for j in tl.static_range(4):
            o = first + j * LANES + o_lane
            # without a mask loads are 16 bytes wide
            mask = None if WHOLE else start + o < size
            g = tl.load(p_gradient + o, mask=mask).to(tl.float32) * factor
            m = tl.load(p_exp_avg + o, mask=mask)
            v = tl.load(p_exp_avg_sq + o, mask=mask)
            w = tl.load(p_parameter + o, mask=mask).to(tl.float32)
            m += rest1 * (g - m)
            v = beta2 * v + (rest2 * g) * g
            divisor = tl.div_rn(tl.sqrt_rn(v), root) + eps
            w = w * decay - tl.div_rn(step_size * m, divisor)
            tl.store(p_exp_avg + o, m, mask=mask)
            tl.store(p_exp_avg_sq + o, v, mask=mask)
            if PARAMETER == tl.bfloat16:
                bits = w.to(tl.int32, bitcast=True)
                rounded = ((bits + (words[j] & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
                # the exponent of NaN and Inf
                w = tl.where((bits & 0x7F800000) == 0x7F800000, w, rounded)
            tl.store(p_parameter + o, w.to(PARAMETER), mask=mask)
            if COPY is not None:
                tl.store(at(a_copy, start, COPY, WHOLE) + o, w.to(COPY), mask=mask)


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_kernel(
    p_fixed, p_gradients, p_decay, p_sizes, p_chunks, p_factor,
    rest1, beta2, rest2, step_size, root, eps, seed, step,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, COPY: tl.constexpr, CLIPS: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    p_chunks += tl.program_id(0).to(tl.int64) * 2
    which, start = tl.load(p_chunks), tl.load(p_chunks + 1).to(tl.int64) * CHUNK
    p_fixed += which * 5
    a_parameter, a_exp_avg, a_exp_avg_sq = tl.load(p_fixed), tl.load(p_fixed + 1), tl.load(p_fixed + 2)
    a_copy, number = tl.load(p_fixed + 3), tl.load(p_fixed + 4)
    a_gradient, decay, size = tl.load(p_gradients + which), tl.load(p_decay + which), tl.load(p_sizes + which)
    factor = tl.load(p_factor) if CLIPS else 1.0
    step = tl.cast(step, tl.int32)
    bits = a_parameter | a_exp_avg | a_exp_avg_sq | a_copy | a_gradient
    if (bits % 16 == 0) & (start + CHUNK <= size):
        _adamw_chunk(
            a_parameter, a_gradient, a_exp_avg, a_exp_avg_sq, a_copy, start, size, factor, decay, number,
            rest1, beta2, rest2, step_size, root, eps, seed, step,
            PARAMETER, GRADIENT, COPY, CHUNK, LANES, WHOLE=True,
        )  # fmt: skip
    else:
        _adamw_chunk(
            a_parameter, a_gradient, a_exp_avg, a_exp_avg_sq, a_copy, start, size, factor, decay, number,
            rest1, beta2, rest2, step_size, root, eps, seed, step,
            PARAMETER, GRADIENT, COPY, CHUNK, LANES, WHOLE=False,
        )  # fmt: skip


@lru_cache(maxsize=16)
def _fixed(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """What is the same in every step: int64 on ``device``. The key is all that it holds, so it is never out of date."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _launch_of(
    tensors: list[tuple], numbers: list[tuple[int, float]], factor: Tensor | None, settings: tuple
) -> Callable[[], None]:
    """One launch, to be made: parameters, gradients and copies of one dtype each."""
    parameter, gradient, _, _, copy = tensors[0]
    device = parameter.device
    rows, addresses = [], []
    for (p, g, m, v, c), (number, _) in zip(tensors, numbers):
        rows += (p.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if c is None else c.data_ptr(), number)
        addresses.append(g.data_ptr())
    sizes, chunks = chunks_of(tuple(p.numel() for p, *_ in tensors), CONFIG.chunk, device)
    gradients, decays = upload(addresses, [decay for _, decay in numbers], device)
    args = (_fixed(tuple(rows), device), gradients, decays, sizes, chunks, decays if factor is None else factor)
    meta = {
        "PARAMETER": TYPES[parameter.dtype],
        "GRADIENT": TYPES[gradient.dtype],
        "COPY": None if copy is None else TYPES[copy.dtype],
        "CLIPS": factor is not None,
        "CHUNK": CONFIG.chunk,
        "LANES": LANES,
        "num_warps": CONFIG.warps,
    }

    # a table of addresses keeps no memory: the call holds the tensors
    def run(held: list[tuple] = tensors) -> None:
        launch("adamw", adamw_kernel, (len(chunks),), *args, *settings, **meta)

    return run


def random_words(seed: int, step: int, number: int, start: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64 in [0, 2**32): what the kernel draws for a tensor's elements from ``start``, a multiple of GROUP."""
    call = laned_calls(start, count, LANES, device)
    words = philox(call & LOW, call >> 32, torch.full_like(call, step), torch.full_like(call, number), seed)
    return laned_words(words, LANES, count)


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """fp32 to bf16 by the low 16 bits of ``words``, one an element; NaN and Inf stay what they are."""
    bits = x.view(torch.int32) + (words & 0xFFFF).to(torch.int32)
    rounded = bits.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


def _reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, decay: float, words, settings) -> None:
    """A piece of one tensor, in the order of torch's own loop."""
    rest1, beta2, rest2, step_size, root, eps, *_ = settings
    m.lerp_(g, rest1)
    v.mul_(beta2).addcmul_(g, g, value=rest2)
    divisor = v.sqrt().div_(root).add_(eps)
    w = p.to(m.dtype).mul_(decay) if words is not None else p.mul_(decay)
    w.addcdiv_(m, divisor, value=-step_size)
    if words is not None:
        p.copy_(round_stochastically(w, words))
    if copy is not None:
        copy.copy_(w)


@torch.no_grad()
def adamw_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Sequence[float],
    step: int,
    factor: Tensor | None = None,
    seed: int | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Plain PyTorch; fp64 for fp64. On the CPU the bits are those of ``torch.optim.AdamW``."""
    settings = _settings(lr, betas, eps, step, seed)
    copies = [None] * len(parameters) if copies is None else copies
    numbers = range(len(parameters)) if numbers is None else numbers
    for p, g, m, v, copy, decay, number in zip(
        parameters, gradients, exp_avgs, exp_avg_sqs, copies, weight_decay, numbers
    ):
        pieces = [[None] * cdiv(p.numel(), PIECE) if t is None else t.view(-1).split(PIECE) for t in (p, m, v, copy)]
        for i, g_piece in enumerate(g.reshape(-1).split(PIECE) if p.numel() else ()):
            p_piece, m_piece, v_piece, copy_piece = (piece[i] for piece in pieces)
            g_piece = g_piece.to(m.dtype)
            if factor is not None:
                g_piece = g_piece * factor.to(m.dtype)
            words = None
            if p.dtype == torch.bfloat16:
                words = random_words(seed % 2**63, step, number, i * PIECE, len(g_piece), p.device)
            _reference(p_piece, g_piece, m_piece, v_piece, copy_piece, 1 - lr * decay, words, settings)


def _settings(lr: float, betas: tuple[float, float], eps: float, step: int, seed: int | None) -> tuple:
    beta1, beta2 = betas
    step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return 1 - beta1, beta2, 1 - beta2, step_size, root, eps, (seed or 0) % 2**63, step


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Sequence[float],
    step: int,
    factor: Tensor | None = None,
    seed: int | None = None,
    numbers: Sequence[int] | None = None,
    backend: str = "auto",
    later: bool = False,
) -> Callable[[], None] | None:
    """One step of AdamW in place, decoupled weight decay included; one launch for each combination of dtypes.

    Args:
        parameters: contiguous, fp32, or bf16 to be rounded stochastically (fp64 by the reference).
        gradients: of the parameters' shapes, fp32, bf16 or fp16 (fp64).
        exp_avgs, exp_avg_sqs: contiguous moments, fp32 (fp64 beside fp64 parameters).
        copies: where not None, contiguous bf16 or fp16 of a parameter in fp32, to be written as well.
        weight_decay: one a parameter.
        step: number of this step, from 1.
        factor: 0-dim fp32 on the parameters' device that gradients are multiplied with, as to clip them; read there.
        seed, numbers: of the random bits of bf16 parameters, with ``step``: one for all, and one a parameter (by default its
            place); the same three give the same bits.
        backend: "auto", "triton" or "reference".
        later: check and make the tables now, some milliseconds of the host for four hundred tensors, and return a call that
            launches. Until then numbers may change, but no tensor may be moved or be given other memory.

    Returns:
        None; with ``later`` what does the step.

    Raises:
        ValueError: lists of different lengths, shapes that differ, tensors that are not contiguous, mixed devices, bf16
            parameters without a seed, or step below 1.
        TypeError: other dtypes; DTensors (pass local parts).
    """
    count = len(parameters)
    copies = [None] * count if copies is None else copies
    numbers = range(count) if numbers is None else numbers
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs, copies, weight_decay, numbers)
    if any(len(given) != count for given in lists):
        raise ValueError(f"adamw: all lists must be as long as parameters ({count}), got {[len(x) for x in lists]}")
    if step < 1:
        raise ValueError(f"adamw: step counts from 1, got {step}")
    tensors = list(zip(parameters, gradients, exp_avgs, exp_avg_sqs, copies))
    given = [t for row in tensors for t in row if t is not None]
    fused = bool(given) and use_triton("adamw", backend, *given, *(() if factor is None else (factor,)))
    kinds: dict[tuple, list[int]] = {}
    for i, row in enumerate(tensors):
        _check(row, seed)
        if row[0].numel():
            p, g, _, _, copy = row
            kinds.setdefault((p.dtype, g.dtype, None if copy is None else copy.dtype), []).append(i)
    if fused:
        if factor is not None and (factor.dtype != torch.float32 or factor.dim()):
            raise ValueError(f"adamw: factor must be 0-dim fp32, got {tuple(factor.shape)} {factor.dtype}")
        settings, calls = _settings(lr, betas, eps, step, seed), []
        for rows in kinds.values():
            # transposed gradients are copied: a table of addresses has no strides
            chosen = [(t[0], t[1].contiguous(), *t[2:]) for t in (tensors[i] for i in rows)]
            calls.append(_launch_of(chosen, [(numbers[i], 1 - lr * weight_decay[i]) for i in rows], factor, settings))
    else:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step}
        calls = [partial(adamw_reference, *lists[:5], **options, factor=factor, seed=seed, numbers=numbers)]
    run = partial(_run_all, calls)
    return run if later else run()


def _run_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _check(row: tuple, seed: int | None) -> None:
    p, g, m, v, copy = row
    if p.dtype == torch.bfloat16 and seed is None:
        raise ValueError("adamw: bf16 parameters are rounded stochastically: pass seed, or fp32 masters with copies")
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    if p.dtype == torch.float16 or m.dtype != wide or v.dtype != wide or (copy is not None and p.dtype != wide):
        kinds = ", ".join("none" if t is None else str(t.dtype).removeprefix("torch.") for t in row)
        raise TypeError(
            "adamw: parameters are fp32, bf16 or fp64, moments fp32 (fp64 beside fp64), and copies belong to fp32 "
            f"parameters; got parameter, gradient, moments, copy in {kinds}"
        )
    shape = p.shape
    if g.shape != shape or m.shape != shape or v.shape != shape or (copy is not None and copy.shape != shape):
        shapes = ", ".join("none" if t is None else str(tuple(t.shape)) for t in row)
        raise ValueError(f"adamw: parameter, gradient, moments and copy must have one shape, got {shapes}")
    contiguous = p.is_contiguous() and m.is_contiguous() and v.is_contiguous()
    if not contiguous or (copy is not None and not copy.is_contiguous()):
        raise ValueError(f"adamw: parameter {tuple(shape)}, its moments and copy must be contiguous")
