"""FP8 weights as numbers to multiply with: ``(weight.float() * scale).to(dtype)``.

The weight is E4M3 with one fp32 scale for all of it, as Ministral 3 Instruct ships it (``weight_scale_inv``), or one for each
block, of 128 x 128 as a rule, or of one row; the last blocks may be cut off. The product is fp32 and rounded once, as in
transformers' ``Fp8Dequantize``: the result has the same bits. A program handles a tile of one block, or of whole rows' scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, use_triton
from m3kernels.ops._triton import tl, triton

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# keeps a row of zeros from dividing by zero
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# what an op that takes a block's sizes as integers is given where one scale is for all
WHOLE = -1


@dataclass(frozen=True)
class TileConfig:
    """The largest edge of a square tile, and warps."""

    edge: int = 128
    warps: int = 8


CONFIG = TileConfig()


@triton.jit
def fp8_dequantize_kernel(
    p_weight,
    p_scale,
    p_out,
    weight_stride,
    scale_stride,
    rows,
    width,
    block_rows,
    block_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    # neighbouring programs work on neighbouring memory
    tiles = tl.cdiv(width, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    n, k = (pid // tiles) * BLOCK_N, (pid % tiles) * BLOCK_K
    if PER_BLOCK:
        p_scale += (n // block_rows) * scale_stride + k // block_columns
    o_n, o_k = n + tl.arange(0, BLOCK_N)[:, None], k + tl.arange(0, BLOCK_K)[None, :]
    if PER_ROW:
        scale = tl.load(p_scale + o_n * scale_stride, mask=o_n < rows, other=0.0)
    else:
        scale = tl.load(p_scale)
    mask = (o_n < rows) & (o_k < width)
    b_weight = tl.load(p_weight + o_n * weight_stride + o_k, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o_n * width + o_k, (b_weight * scale).to(p_out.dtype.element_ty), mask=mask)


def _tile(size: int) -> int:
    """The largest power of two that divides a block's edge, but for what a tile has room for."""
    return min(CONFIG.edge, size & -size)


def _dequantize(weight: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    out = _dequantize_fake(weight, scale, block_rows, block_columns, dtype)
    if out.numel() == 0:
        return out
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    # a block of one row has the row's scale for as long as the row is
    per_row = block_rows == 1 and block_columns >= weight.shape[1]
    per_block = block_rows != WHOLE and not per_row
    scale = scale.contiguous() if per_block else scale
    edges = (_tile(block_rows), _tile(block_columns)) if per_block else (CONFIG.edge, CONFIG.edge)
    launch(
        "fp8_dequantize",
        fp8_dequantize_kernel,
        (cdiv(weight.shape[0], edges[0]) * cdiv(weight.shape[1], edges[1]),),
        *(weight, scale, out, weight.stride(0), scale.stride(0) if scale.dim() == 2 else 0),
        *(*weight.shape, block_rows, block_columns),
        BLOCK_N=edges[0],
        BLOCK_K=edges[1],
        PER_BLOCK=per_block,
        PER_ROW=per_row,
        num_warps=CONFIG.warps,
    )
    return out


def _dequantize_fake(weight, scale, block_rows, block_columns, dtype):
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


torch.library.custom_op("m3kernels::fp8_dequantize", _dequantize, mutates_args=()).register_fake(_dequantize_fake)


def fp8_dequantize_reference(
    weight: Tensor,
    scale: Tensor,
    block_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Plain PyTorch, in fp32 (fp64 for fp64). Takes a weight of any floating-point dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = scale.to(wide)
    if block_size is None:
        return (weight.to(wide) * scale.reshape(())).to(dtype)
    by_row = scale.repeat_interleave(block_size[0], 0)[: weight.shape[0]]
    return (weight.to(wide) * by_row.repeat_interleave(block_size[1], 1)[:, : weight.shape[1]]).to(dtype)


@torch.no_grad()
def fp8_dequantize(
    weight: Tensor,
    scale: Tensor,
    *,
    block_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """``weight * scale``, multiplied in fp32 and rounded once.

    Args:
        weight: (N, K) in ``torch.float8_e4m3fn``.
        scale: what an FP8 number is multiplied with (transformers' ``weight_scale_inv``): one value, or with ``block_size``
            one a block, (ceil(N / rows), ceil(K / columns)); fp32, or E8M0 (powers of two).
        block_size: (rows, columns) that share a scale; None where there is one scale.
        dtype: of the result: fp32, bf16, fp16, or fp64 (by the reference).
        backend: "auto", "triton" or "reference".

    Returns:
        (N, K), contiguous, without a gradient: FP8 weights are frozen.

    Raises:
        ValueError: shapes that do not fit, or scales that are not fp32 or E8M0.
        TypeError: a weight that is not E4M3, a dtype that is not floating point, or DTensors.
    """
    check_fp8("fp8_dequantize", weight, scale, block_size)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"fp8_dequantize: dtype must be fp32, bf16, fp16 or fp64, got {dtype}")
    scale = fp32_scale(scale)
    like = torch.empty(0, dtype=dtype, device=scale.device)
    if not use_triton("fp8_dequantize", backend, scale, like, inductor_fuses=True):
        return fp8_dequantize_reference(weight, scale, block_size, dtype)
    run = torch.ops.m3kernels.fp8_dequantize if torch.compiler.is_compiling() else _dequantize
    return run(weight, scale, *(block_size or (WHOLE, WHOLE)), dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) in E4M3, and scales (...) in fp32, by each row's largest value: max |x| / 448.

    A number is within 2^-4 of itself, or within 2^-10 scales where it is below 2^-6 of them.
    """
    x = x.float()
    # by a number of Python's, CUDA would multiply with the reciprocal
    largest = torch.full((), FP8_MAX, device=x.device)
    scale = (x.abs().amax(dim=-1) / largest).clamp(min=SMALLEST_SCALE)
    return (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def fp32_scale(scale: Tensor) -> Tensor:
    return scale.detach() if scale.dtype == torch.float32 else scale.detach().float()


def check_fp8(op: str, weight: Tensor, scale: Tensor, block_size: tuple[int, int] | None) -> None:
    """Raises for what :func:`fp8_dequantize` does not take."""
    if weight.dtype != FP8 or type(weight).__name__ == "DTensor":
        raise TypeError(f"{op}: weight must be a {FP8} tensor, got {weight.dtype} {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be (N, K), got {tuple(weight.shape)}")
    if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise ValueError(f"{op}: scale must be fp32 or {torch.float8_e8m0fnu}, got {scale.dtype}; pass it as stored")
    if scale.device != weight.device:
        raise ValueError(f"{op}: scale is on {scale.device}, weight on {weight.device}; move them together")
    if block_size is None:
        if scale.numel() != 1:
            raise ValueError(f"{op}: {tuple(scale.shape)} scales need a block_size; without one there is one scale")
        return
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"{op}: block_size must be (rows, columns), both positive, got {block_size}")
    needed = tuple(cdiv(size, block) for size, block in zip(weight.shape, block_size))
    if tuple(scale.shape) != needed:
        raise ValueError(
            f"{op}: a weight {tuple(weight.shape)} in blocks of {tuple(block_size)} has scales {needed}, "
            f"got {tuple(scale.shape)}"
        )
