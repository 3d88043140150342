"""Every op as a case: how to make inputs, what eager PyTorch computes, and wrong variants that must be caught."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels import ops
from m3kernels.parity.case import OpCase, measure, randn
from m3kernels.parity.decode import DECODE_LINEAR, DECODE_QKV, DECODE_SWIGLU
from m3kernels.parity.losses import HEAD_ADAPTER, HEAD_ADAPTER_PER_ROW, LINEAR_CROSS_ENTROPY, LOSS_PER_ROW, SMOOTHED
from m3kernels.parity.products import ATTENTION, DORA, FP8, FP8_BLOCKS, LORA, WINDOW

__all__ = ["CASES", "measure"]


def _make_norm(shape, dtype, generator):
    rows, width = shape
    # every other row is small enough for eps to matter
    size = 10.0 ** (-3.0 * (torch.arange(rows, device=generator.device) % 2))[:, None]
    x = (randn(rows, width, dtype=torch.float32, generator=generator) * size).to(dtype)
    return {"x": x, "weight": randn(width, dtype=dtype, generator=generator), "eps": 1e-5}


def _make_add_norm(shape, dtype, generator):
    return {**_make_norm(shape, dtype, generator), "residual": randn(*shape, dtype=dtype, generator=generator) * 0.1}


def _independent_rows(shape, dtype, numel):
    """In fp32 an error of rstd, one value a row, is as large as all others: and half of the rows have all of dx's weight."""
    return max(2, min(numel, shape[0] // 2)) if dtype == torch.float32 else numel


def _missing_last_row(x, weight, eps):
    return (torch.cat([ops.rms_norm(x[:-1], weight, eps), ops.rms_norm(x[-1:], weight.detach(), eps)]),)


RMS_NORM = OpCase(
    name="rms_norm",
    make=_make_norm,
    independent=_independent_rows,
    wrt=("x", "weight"),
    outputs=("y",),
    ours=lambda x, weight, eps: (ops.rms_norm(x, weight, eps),),
    eager=lambda x, weight, eps: (ops.rms_norm_reference(x, weight, eps),),
    # not one row: its single rstd, rounded one way or the other, would be the whole error;
    # and few rows: the interpreter adds rows one by one where a GPU adds them as a tree
    small=((7, 96), (33, 130), (5, 1), (8, 3072), (6, 5120), (16, 64)),
    real=((8192, 4096), (4095, 3072), (1025, 5120), (4097, 1024), (77, 16384), (9, 65536), (300, 127)),
    wrong={
        "eps dropped": lambda x, weight, eps: (ops.rms_norm(x, weight, 0.0),),
        "weight gradient misses a row": _missing_last_row,
        "mean over one element too many": lambda x, weight, eps: (
            ops.rms_norm(x, weight, eps) * ((x.shape[-1] + 1) / x.shape[-1]) ** 0.5,
        ),
        "weight shifted by one": lambda x, weight, eps: (ops.rms_norm(x, weight.roll(1), eps),),
    },
)

ADD_RMS_NORM = OpCase(
    name="add_rms_norm",
    make=_make_add_norm,
    independent=_independent_rows,
    wrt=("x", "residual", "weight"),
    outputs=("normed", "summed"),
    ours=lambda x, residual, weight, eps: ops.add_rms_norm(x, residual, weight, eps),
    eager=lambda x, residual, weight, eps: ops.add_rms_norm_reference(x, residual, weight, eps),
    small=((7, 96), (33, 130), (3, 3072)),
    real=((8192, 4096), (4095, 3072), (1025, 5120), (4097, 1024), (9, 65536)),
    wrong={
        "gradient of the sum dropped": lambda x, residual, weight, eps: (
            (pair := ops.add_rms_norm(x, residual, weight, eps))[0],
            pair[1].detach() + 0 * x,
        ),
        "residual not added before the norm": lambda x, residual, weight, eps: (
            ops.rms_norm(x, weight, eps),
            x + residual,
        ),
        "residual detached": lambda x, residual, weight, eps: ops.add_rms_norm(
            x, residual.detach() + 0 * residual, weight, eps
        ),
    },
)


def _make_rotary(shape, dtype, generator):
    batch, seq, heads, kv_heads, dim = shape
    # queries and keys as projections give them: (batch, seq, heads, dim) memory seen as (batch, heads, seq, dim)
    q = randn(batch, seq, heads, dim, dtype=dtype, generator=generator).transpose(1, 2)
    k = randn(batch, seq, kv_heads, dim, dtype=dtype, generator=generator).transpose(1, 2)
    start = torch.randint(0, 262_143 - seq, (batch, 1), generator=generator, device=generator.device)
    return {"q": q, "k": k, "positions": start + torch.arange(seq, device=generator.device), "llama4": (0.1, 64)}


def _inv_freq(dim: int, device) -> Tensor:
    return 1e6 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def _rotary(q, k, positions, llama4):
    return ops.rotary(q, k, ops.rotary_table(_inv_freq(q.shape[-1], q.device), positions), positions, llama4)


def _rotary_eager(q, k, positions, llama4):
    """transformers: cos and sin rounded to the activations' dtype, each product rounded before the sum."""
    table = ops.rotary_table(_inv_freq(q.shape[-1], q.device), positions)
    cos, sin = (torch.cat([half, half], -1).to(q.dtype)[:, None] for half in table.chunk(2, -1))

    def rotated(x):
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat([-x2, x1], -1) * sin

    beta, original = llama4
    scale = 1 + beta * torch.log(1 + torch.floor(positions / original))
    return rotated(q) * scale[:, None, :, None].to(q.dtype), rotated(k)


ROTARY = OpCase(
    name="rotary",
    make=_make_rotary,
    wrt=("q", "k"),
    outputs=("q", "k"),
    ours=_rotary,
    eager=_rotary_eager,
    small=((2, 9, 6, 2, 32), (1, 5, 4, 1, 128), (3, 4, 5, 3, 20)),
    real=((1, 8192, 32, 8, 128), (2, 4097, 32, 8, 128), (3, 129, 32, 8, 128), (1, 77, 12, 3, 80)),
    wrong={
        "query scale dropped": lambda q, k, positions, llama4: _rotary(q, k, positions, None),
        "positions off by one": lambda q, k, positions, llama4: _rotary(q, k, positions + 1, llama4),
        "keys scaled too": lambda q, k, positions, llama4: (
            (pair := _rotary(q, k, positions, llama4))[0],
            pair[1] * ops.llama4_scale(positions, *llama4)[:, None, :, None].to(k.dtype),
        ),
        "interleaved layout": lambda q, k, positions, llama4: tuple(
            x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in _rotary(q, k, positions, llama4)
        ),
    },
)


def _make_rotary_2d(shape, dtype, generator):
    height, width, heads, dim = shape
    tokens = height * width
    axes = (torch.arange(n, device=generator.device) for n in (height, width))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    q = randn(1, tokens, heads, dim, dtype=dtype, generator=generator).transpose(1, 2)
    k = randn(1, tokens, heads, dim, dtype=dtype, generator=generator).transpose(1, 2)
    return {"q": q, "k": k, "positions": grid}


def _inv_freq_2d(dim: int, device) -> Tensor:
    inv_freq = 1e4 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    return torch.cat([inv_freq[0::2], inv_freq[1::2]])


def _rotary_2d(q, k, positions):
    return ops.rotary_2d(q, k, ops.rotary_2d_table(_inv_freq_2d(q.shape[-1], q.device), positions))


def _rotary_2d_eager(q, k, positions):
    """transformers: row and column angles laid out H, W, H, W and rounded to the activations' dtype."""
    angles = positions[..., None].float() * _inv_freq_2d(q.shape[-1], q.device)
    by_row, by_column = (m[:, i] for i, m in enumerate(angles.chunk(2, -1)))
    both = torch.cat([by_row, by_column, by_row, by_column], -1)
    cos, sin = both.cos().to(q.dtype), both.sin().to(q.dtype)

    def rotated(x):
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat([-x2, x1], -1) * sin

    return rotated(q), rotated(k)


ROTARY_2D = OpCase(
    name="rotary_2d",
    make=_make_rotary_2d,
    wrt=("q", "k"),
    outputs=("q", "k"),
    ours=_rotary_2d,
    eager=_rotary_2d_eager,
    small=((3, 5, 2, 32), (2, 2, 3, 64)),
    real=((110, 110, 16, 64), (37, 3, 16, 64)),
    wrong={
        "row and column swapped": lambda q, k, positions: _rotary_2d(q, k, positions.flip(-1)),
        "row off by one": lambda q, k, positions: _rotary_2d(q, k, positions + torch.tensor([1, 0], device=q.device)),
        "keys left alone": lambda q, k, positions: (_rotary_2d(q, k, positions)[0], k * 1),
    },
)


def _make_swiglu(shape, dtype, generator):
    return {
        "gate": randn(*shape, dtype=dtype, generator=generator) * 2,
        "up": randn(*shape, dtype=dtype, generator=generator),
    }


SWIGLU = OpCase(
    name="swiglu",
    make=_make_swiglu,
    wrt=("gate", "up"),
    outputs=("y",),
    ours=lambda gate, up: (ops.swiglu(gate, up),),
    eager=lambda gate, up: (F.silu(gate) * up,),
    small=((7, 96), (3, 2050), (5, 1)),
    real=((8192, 14336), (4097, 9216), (1000, 4096), (5, 16385)),
    wrong={
        "gate and up swapped": lambda gate, up: (ops.swiglu(up, gate),),
        "gelu in place of silu": lambda gate, up: (F.gelu(gate) * up,),
        "gradient stops at the sigmoid": lambda gate, up: (gate * torch.sigmoid(gate).detach() * up,),
    },
)

SWIGLU_FUSED = OpCase(
    name="swiglu (fused gate_up)",
    make=lambda shape, dtype, generator: {"gate_up": randn(*shape, dtype=dtype, generator=generator) * 2},
    wrt=("gate_up",),
    outputs=("y",),
    ours=lambda gate_up: (ops.swiglu(gate_up),),
    eager=lambda gate_up: (ops.swiglu_reference(gate_up),),
    small=((7, 96), (3, 130)),
    real=((4097, 18432),),
    wrong={
        "up first": lambda gate_up: (ops.swiglu(gate_up.roll(gate_up.shape[-1] // 2, -1)),),
        "halves off by one": lambda gate_up: (ops.swiglu(gate_up.roll(1, -1)),),
        "up is not multiplied": lambda gate_up: (F.silu(gate_up.chunk(2, -1)[0]),),
    },
)


CASES = (
    LORA,
    DORA,
    FP8,
    FP8_BLOCKS,
    RMS_NORM,
    ADD_RMS_NORM,
    ROTARY,
    ROTARY_2D,
    ATTENTION,
    WINDOW,
    SWIGLU,
    SWIGLU_FUSED,
    LINEAR_CROSS_ENTROPY,
    SMOOTHED,
    LOSS_PER_ROW,
    HEAD_ADAPTER,
    HEAD_ADAPTER_PER_ROW,
    DECODE_QKV,
    DECODE_LINEAR,
    DECODE_SWIGLU,
)
