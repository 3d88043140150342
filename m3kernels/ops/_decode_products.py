"""What the decode ops share: a few rows of activations times rows of weights, which are read once, at the speed of memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops._common import is_dtensor, next_power_of_2, overlap_meta
from m3kernels.ops._triton import INTERPRET, tl, triton
from m3kernels.ops.fp8_dequantize import FP8
from m3kernels.ops.rms_norm import rms_norm, rms_norm_reference

# of activations; more are compute-bound, and a matrix product's
MAX_ROWS = 64
# fp16 sums of x times the norm's gain, before the norm's own factor, stay in range
FP16_SCALE = 2.0**-6


@dataclass(frozen=True)
class WeightTile:
    """Rows and columns of weights in one tile, warps, and tiles that are loaded ahead (where there are several rows of x)."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class Tiles:
    """The tile for one row of x, for up to 16, and for up to 64."""

    one: WeightTile
    few: WeightTile
    many: WeightTile

    def choose(self, rows: int) -> WeightTile:
        return self.one if rows == 1 else self.few if rows <= 16 else self.many


# four E4M3 numbers in a register to bf16 of the same bits: sign, exponent and mantissa move, subnormals too, and the value
# is 2^-120 of what it was. By cvt they would go through fp16 and fp32, which the tensor cores wait for
E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
and.b32 c, c, 0x07f007f0;
and.b32 d, d, 0x07f007f0;
and.b32 a, a, 0x80008000;
and.b32 b, b, 0x80008000;
or.b32 $0, a, c;
or.b32 $1, b, d;
}""")
# shared out between x and the sums, so that neither overflows
E4M3_HALF = tl.constexpr(2.0**60)


@triton.jit
def as_number(b_w, dtype: tl.constexpr, MOVED: tl.constexpr):
    """Weights as ``dtype``; with MOVED, E4M3 ones as bf16 times 2^-120."""
    if MOVED:
        number = tl.inline_asm_elementwise(E4M3_TO_BF16, "=r,=r,r", [b_w], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        number = b_w.to(dtype)
    return number


@triton.jit
def one_row(
    p_w1,
    p_w2,
    m_n,
    p_x,
    p_gain,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """(w1 (gain x), w2 (gain x), mean(x^2)) of one row of x: (BLOCK_N, 1) twice, and a scalar, by fp32 multiplications."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    o_k = tl.arange(0, BLOCK_K)
    # as many weights a thread as elements of x, whatever their size: else x would change hands by shared memory
    o_w = tl.max_contiguous(o_k, 8)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc2 = acc1
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        m_k = k + o_k < K
        mask = m_n[:, None] if EVEN else m_n[:, None] & m_k[None, :]
        b_w1 = tl.load(p_w1 + (k + o_w)[None, :], mask=mask, other=0.0)
        if PAIR:
            b_w2 = tl.load(p_w2 + (k + o_w)[None, :], mask=mask, other=0.0)
        if OVERLAP and k == 0:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        if NORM:
            squares += b_x * b_x
            b_x *= tl.load(p_gain + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        acc1 += b_w1.to(tl.float32) * b_x[None, :]
        if PAIR:
            acc2 += b_w2.to(tl.float32) * b_x[None, :]
    y1 = tl.sum(acc1, axis=1)[:, None]
    y2 = tl.sum(acc2, axis=1)[:, None] if PAIR else y1
    return y1, y2, tl.sum(squares, axis=0) / K


@triton.jit
def several_rows(
    p_w1,
    p_w2,
    m_n,
    p_x,
    x_stride,
    rows,
    p_gain,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    X_SCALE: tl.constexpr,
    MOVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As :func:`one_row` for ROWS rows of x, by tensor cores: (BLOCK_N, ROWS) times X_SCALE, twice, and (1, ROWS)."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    o_k, o_m = tl.arange(0, BLOCK_K), tl.arange(0, ROWS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc1 = tl.zeros([BLOCK_N, ROWS], tl.float32)
    acc2 = acc1
    squares = tl.zeros([BLOCK_K, ROWS], tl.float32)
    p_xs = p_x + o_m.to(tl.int64)[None, :] * x_stride
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        m_k = k + o_k < K
        mask = m_n[:, None] if EVEN else m_n[:, None] & m_k[None, :]
        b_w1 = tl.load(p_w1 + (k + o_k)[None, :], mask=mask, other=0.0)
        if PAIR:
            b_w2 = tl.load(p_w2 + (k + o_k)[None, :], mask=mask, other=0.0)
        b_x = tl.load(p_xs + (k + o_k)[:, None], mask=m_k[:, None] & (o_m < rows)[None, :], other=0.0)
        if NORM:
            wide = b_x.to(tl.float32)
            squares += wide * wide
            gain = tl.load(p_gain + k + o_k, mask=m_k, other=0.0).to(tl.float32) * X_SCALE
            b_x = (wide * gain[:, None]).to(b_x.dtype)
        elif X_SCALE != 1.0:
            b_x = (b_x.to(tl.float32) * X_SCALE).to(b_x.dtype)
        acc1 = tl.dot(as_number(b_w1, b_x.dtype, MOVED), b_x, acc1, input_precision="ieee")
        if PAIR:
            acc2 = tl.dot(as_number(b_w2, b_x.dtype, MOVED), b_x, acc2, input_precision="ieee")
    return acc1, acc2, tl.sum(squares, axis=0)[None, :] / K


@triton.jit
def weights_times_x(
    p_w1,
    p_w2,
    m_n,
    p_x,
    x_stride,
    rows,
    p_gain,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    X_SCALE: tl.constexpr,
    MOVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """(w1 n(x), w2 n(x)), each (BLOCK_N, ROWS) fp32: n is RMSNorm with its gain, or nothing.

    1 / sqrt(mean(x^2) + eps) is one factor of a whole row of x: it multiplies the sums, and x is read once. With OVERLAP
    the kernel begins while the one before it ends: weights, which nobody writes, are under way before it waits for x.
    """
    if ROWS == 1:
        y1, y2, mean = one_row(p_w1, p_w2, m_n, p_x, p_gain, K, BLOCK_N, BLOCK_K, NORM, PAIR, OVERLAP)
    else:
        y1, y2, mean = several_rows(
            *(p_w1, p_w2, m_n, p_x, x_stride, rows, p_gain, K, ROWS, BLOCK_N, BLOCK_K, STAGES, NORM, PAIR),
            *(X_SCALE, MOVED, OVERLAP),
        )
    # X_SCALE is a power of two, so that this is exact
    UNSCALE: tl.constexpr = E4M3_HALF * E4M3_HALF / X_SCALE if MOVED else 1.0 / X_SCALE
    if UNSCALE != 1.0:
        y1 *= UNSCALE
        y2 *= UNSCALE
    if NORM:
        factor = tl.math.rsqrt(mean + tl.cast(eps, tl.float32))
        y1 *= factor
        y2 *= factor
    return y1, y2


@triton.jit
def load_scales(p_scale, o_n, m_n, KIND: tl.constexpr):
    """(BLOCK_N, 1): of the weight's rows; one for all where KIND is 1."""
    o_scale = o_n if KIND == 2 else o_n * 0
    return tl.load(p_scale + o_scale, mask=m_n, other=0.0)[:, None]


def moves_bits(dtype: torch.dtype) -> bool:
    """Whether E4M3 numbers become ``dtype`` by :func:`as_number`'s PTX, which only NVIDIA's GPUs run."""
    return dtype == torch.bfloat16 and not INTERPRET and not torch.version.hip


def rows_meta(x: Tensor, weight: Tensor, tile: WeightTile, norm_weight: Tensor | None) -> dict:
    """The constexprs that :func:`weights_times_x` takes from a call; its launch options."""
    rows = x.shape[0]
    moved = weight.dtype == FP8 and rows > 1 and moves_bits(x.dtype)
    scale = FP16_SCALE if x.dtype == torch.float16 and rows > 1 and norm_weight is not None else 1.0
    return {
        "K": x.shape[1],
        "ROWS": 1 if rows == 1 else max(16, next_power_of_2(rows)),
        "BLOCK_N": tile.rows,
        "BLOCK_K": min(tile.columns, max(16, next_power_of_2(x.shape[1]))),
        "STAGES": tile.stages,
        "NORM": norm_weight is not None,
        "X_SCALE": E4M3_HALF.value if moved else scale,
        "MOVED": moved,
        "num_warps": tile.warps,
        **overlap_meta(x.device),
    }


def scale_kind(scale: Tensor | None) -> int:
    """0 without scales, 1 for one of the whole weight, 2 for one of each row."""
    return 0 if scale is None else 1 if scale.numel() == 1 else 2


def fused_rows(x: Tensor) -> bool:
    """Whether there are few enough rows for the kernels. Several fp32 ones are BLAS's: no tensor core adds them as exactly."""
    rows = x.shape[0]
    return rows == 1 or (1 < rows <= MAX_ROWS and (x.dtype != torch.float32 or INTERPRET))


def dense_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``: an E4M3 one times its scales in fp32, rounded once."""
    if scale is None:
        return weight
    by_row = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * by_row.to(wide)).to(dtype)


def products(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    eps: float,
    *,
    reference: bool = True,
) -> list[Tensor]:
    """The norm (its kernel, without ``reference``), then one matrix product for each weight."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps) if reference else rms_norm(x, norm_weight, eps)
    return [F.linear(x, dense_weight(weight, scale, x.dtype)) for weight, scale in zip(weights, scales)]


def check_products(
    op: str,
    x: Tensor,
    weights: dict[str, Tensor],
    scales: Sequence[Tensor | None],
    norm_weight: Tensor | None,
) -> None:
    """Raises ValueError or TypeError for what the decode ops do not take."""

    def given() -> str:
        return "got " + ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in {"x": x, **weights}.items())

    width = x.shape[-1:]
    if x.dim() != 2 or any(w.dim() != 2 or w.shape[1:] != width for w in weights.values()):
        raise ValueError(f"{op}: needs x (M, K) and weights (N, K), {given()}")
    for (name, weight), scale in zip(weights.items(), scales):
        if is_dtensor(weight):
            raise TypeError(f"{op}: {name} is a DTensor; pass the local shard (tensor.to_local())")
        if weight.dtype != (x.dtype if scale is None else FP8):
            raise TypeError(f"{op}: {name} must be of x's dtype, or {FP8} with its scale; {given()}")
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() not in (1, weight.shape[0])):
            raise ValueError(
                f"{op}: {name} (N, K) takes one fp32 scale or (N,); got {tuple(scale.shape)} {scale.dtype}, {given()}"
            )
    if norm_weight is not None and norm_weight.shape != width:
        raise ValueError(f"{op}: norm_weight must be (K,), got {tuple(norm_weight.shape)}, {given()}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights.values(), norm_weight)):
        raise ValueError(f"{op} has no backward: call it under torch.no_grad()")
