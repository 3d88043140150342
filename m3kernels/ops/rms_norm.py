"""RMSNorm, alone and fused with the residual add before it.

    rstd = 1 / sqrt(mean(x^2) + eps)        y = weight * round(x * rstd)

Matches ``Ministral3RMSNorm``, ``Mistral3RMSNorm`` and ``PixtralRMSNorm`` of transformers: the statistics are fp32, the
normalised value is rounded to the input's dtype *before* the weight multiplies it. In the fused form ``x = a + residual``
is rounded to its dtype before it is squared, as a separate add would. The backward, with ``g = dy * weight``:

    dx = rstd * (g - x_hat * mean(g * x_hat)) [+ d_summed]        dweight = sum over rows of dy * x_hat

Weight gradients are fp32 partial sums, one row of them per program, added in a fixed order: no atomics, and the same
bits on every run on the same GPU. Rows stay in registers, so the width is at most 65,536.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, fused_op, launch, next_power_of_2, rows_of, sm_count, use_triton
from m3kernels.ops._triton import tl, triton

MAX_WIDTH = 65_536


@dataclass(frozen=True)
class RowConfig:
    """Launch choices of a row kernel: rows in one tile, warps; backward only, programs on each SM and load stages."""

    rows: int
    warps: int
    programs_per_sm: int = 1
    stages: int = 1


# what the backward's load stages may take of an SM's 227 KiB of shared memory
STAGE_BYTES = 200 * 1024


@cache
def forward_config(width: int) -> RowConfig:
    """Tiles of 4,096 elements with 2 warps were within 1 % of the best of 20 choices at widths 1,024 to 5,120 (H200)."""
    block = next_power_of_2(width)
    return RowConfig(rows=max(1, 4096 // block), warps=min(32, max(2, block // 2048)))


@cache
def backward_config(width: int, bytes_per_element: int) -> RowConfig:
    """Two programs on each SM with three load stages: within 2 % of the best of 60 choices at widths 1,024 to 5,120 (H200).

    Two stages measured slower than one; where three do not fit, there is one. ``bytes_per_element`` counts all loads.
    """
    block = next_power_of_2(width)
    rows = max(1, 4096 // block)
    stages = 3 if 3 * rows * block * bytes_per_element <= STAGE_BYTES else 1
    warps = 4 if block <= 8192 else min(32, block // 1024)
    return RowConfig(rows=rows, warps=warps, programs_per_sm=2, stages=stages)


@triton.jit
def rms_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_y,
    p_summed,
    p_rstd,
    x_stride,
    residual_stride,
    n_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_col = tl.arange(0, BLOCK)[None, :]
    m_row = o_row < n_rows
    mask = m_row & (o_col < WIDTH)

    b_x = tl.load(p_x + o_row * x_stride + o_col, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        b_residual = tl.load(p_residual + o_row * residual_stride + o_col, mask=mask, other=0.0)
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(p_summed.dtype.element_ty)
        tl.store(p_summed + o_row * WIDTH + o_col, b_x, mask=mask)

    x = b_x.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(x * x, axis=1, keep_dims=True), WIDTH * 1.0)
    # correctly rounded: an error here is one and the same for the whole row
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + tl.cast(eps, tl.float32)))
    x_hat = (x * rstd).to(b_x.dtype).to(tl.float32)
    weight = tl.load(p_weight + o_col, mask=o_col < WIDTH, other=0.0).to(tl.float32)

    tl.store(p_y + o_row * WIDTH + o_col, (x_hat * weight).to(p_y.dtype.element_ty), mask=mask)
    tl.store(p_rstd + o_row, rstd, mask=m_row)


@triton.jit
def rms_norm_bwd_kernel(
    p_dy,
    p_dsummed,
    p_x,
    p_weight,
    p_rstd,
    p_dx,
    p_dweight,
    x_stride,
    n_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DSUMMED: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
):
    pid = tl.program_id(0)
    o_col = tl.arange(0, BLOCK)[None, :]
    m_col = o_col < WIDTH
    weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)

    for start in tl.range(pid * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        o_row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)[:, None]
        m_row = o_row < n_rows
        mask = m_row & m_col
        x = tl.load(p_x + o_row * x_stride + o_col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o_row * WIDTH + o_col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)

        x_hat = x * rstd
        g = dy * weight
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=1, keep_dims=True) / WIDTH))
        if HAS_DSUMMED:
            dx += tl.load(p_dsummed + o_row * WIDTH + o_col, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dx + o_row * WIDTH + o_col, dx.to(p_dx.dtype.element_ty), mask=mask)
        if NEEDS_DWEIGHT:
            b_dweight += dy * x_hat

    if NEEDS_DWEIGHT:
        partial = tl.sum(b_dweight, axis=0, keep_dims=True)
        tl.store(p_dweight + tl.cast(pid, tl.int64) * WIDTH + o_col, partial, mask=m_col)


@triton.jit
def column_sum_kernel(p_partial, p_out, n_partial, WIDTH: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK: tl.constexpr):
    o_col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_col = o_col < WIDTH
    total = tl.zeros([BLOCK_ROW, BLOCK], dtype=tl.float32)
    for start in range(0, n_partial, BLOCK_ROW):
        o_row = start + tl.arange(0, BLOCK_ROW)[:, None]
        total += tl.load(p_partial + o_row * WIDTH + o_col, mask=(o_row < n_partial) & m_col, other=0.0)
    tl.store(p_out + o_col, tl.sum(total, axis=0, keep_dims=True).to(p_out.dtype.element_ty), mask=m_col)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (y, rstd)."""
    y, rstd = _forward_fake(x, weight, eps)
    if y.numel():
        x2 = rows_of(x)
        _launch_forward("rms_norm", x2, x2, weight, y, y, rstd, eps, has_residual=False)
    return y, rstd


def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_normed(x, x.dtype, weight), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _empty_normed(x: Tensor, dtype: torch.dtype, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype if dtype == weight.dtype else torch.promote_types(dtype, weight.dtype))


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, summed, rstd)."""
    y, summed, rstd = _add_forward_fake(x, residual, weight, eps)
    if y.numel():
        x2, residual2 = rows_of(x), rows_of(residual)
        _launch_forward("add_rms_norm", x2, residual2, weight, y, summed, rstd, eps, has_residual=True)
    return y, summed, rstd


def _add_forward_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return _empty_normed(x, summed.dtype, weight), summed, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_forward(
    op: str, x: Tensor, residual: Tensor, weight: Tensor, y: Tensor, summed: Tensor, rstd: Tensor, eps, has_residual
) -> None:
    rows, width = x.shape
    config = forward_config(width)
    launch(
        op,
        rms_norm_fwd_kernel,
        (cdiv(rows, config.rows),),
        x,
        residual,
        weight.contiguous(),
        y,
        summed,
        rstd,
        x.stride(0),
        residual.stride(0),
        rows,
        eps,
        WIDTH=width,
        BLOCK=next_power_of_2(width),
        ROWS=config.rows,
        HAS_RESIDUAL=has_residual,
        num_warps=config.warps,
    )


def _backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, needs_dweight: int
) -> tuple[Tensor, Tensor]:
    """Returns (dx, dweight); ``dweight`` is empty when it is not needed.

    ``needs_dweight`` is a bool by meaning: of the arguments that are no tensors, DTensor tells calls apart by integers alone.
    """
    dx, dweight = _backward_fake(dy, dsummed, x, weight, rstd, needs_dweight)
    rows, width = rstd.numel(), x.shape[-1]
    if rows == 0 or width == 0:
        return dx, dweight.zero_()
    x2, weight = rows_of(x), weight.contiguous()
    loads = dy.element_size() + x.element_size() + (0 if dsummed is None else dsummed.element_size())
    config = backward_config(width, loads)
    programs = min(cdiv(rows, config.rows), sm_count(x.device) * config.programs_per_sm)
    partial = x.new_empty((programs if needs_dweight else 0, width), dtype=torch.float32)
    block = next_power_of_2(width)
    launch(
        "rms_norm backward",
        rms_norm_bwd_kernel,
        (programs,),
        dy.contiguous(),
        dy if dsummed is None else dsummed.contiguous(),
        x2,
        weight,
        rstd,
        dx,
        partial,
        x2.stride(0),
        rows,
        WIDTH=width,
        BLOCK=block,
        ROWS=config.rows,
        STAGES=config.stages,
        HAS_DSUMMED=dsummed is not None,
        NEEDS_DWEIGHT=bool(needs_dweight),
        num_warps=config.warps,
    )
    if needs_dweight:
        block = min(block, 32)
        launch(
            "rms_norm weight gradient",
            column_sum_kernel,
            (cdiv(width, block),),
            partial,
            dweight,
            programs,
            WIDTH=width,
            BLOCK_ROW=64,
            BLOCK=block,
            num_warps=4,
        )
    return dx, dweight


def _backward_fake(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, needs_dweight: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_dweight else (0,))


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _gradients(ctx, run_backward, dy, _drstd):
    if dy is None:
        return None, None, None
    needs_dweight = ctx.needs_input_grad[1]
    dx, dweight = run_backward(dy, None, *ctx.saved_tensors, needs_dweight)
    return dx, dweight if needs_dweight else None, None


def _add_setup_context(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, summed, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.save_for_backward(summed, weight, rstd)


def _add_gradients(ctx, run_backward, dy, dsummed, _drstd):
    needs_dweight = ctx.needs_input_grad[2]
    if dy is None:
        # only the sum was used downstream: nothing flows through the norm
        dx, dweight = dsummed, None
    else:
        dx, dweight = run_backward(dy, dsummed, *ctx.saved_tensors, needs_dweight)
    if dx is None:
        return None, None, None, None
    x_dtype, residual_dtype = ctx.dtypes
    return dx.to(x_dtype), dx.to(residual_dtype), dweight if needs_dweight else None, None


_rms_norm = fused_op(
    "rms_norm",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)

_add_rms_norm = fused_op(
    "add_rms_norm",
    forward=_add_forward,
    forward_fake=_add_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_add_setup_context,
    gradients=_add_gradients,
)


def _check(op: str, x: Tensor, weight: Tensor, *, widest: int | None) -> None:
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must have shape (width,) with width = x.shape[-1]; "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if widest is not None and x.shape[-1] > widest:
        raise ValueError(f"{op}: width {x.shape[-1]} exceeds {widest}; use backend='reference'")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Plain PyTorch, with the rounding order of transformers (fp64 inputs are computed in fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * x_hat.to(x.dtype)).contiguous()


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: a residual add, then :func:`rms_norm_reference`."""
    summed = (residual + x).contiguous()
    return rms_norm_reference(summed, weight, eps), summed


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` over the last dimension.

    Args:
        x: (..., width) in fp32, bf16 or fp16, any strides; width at most 65,536; any number of rows, 0 included.
        weight: (width,); may be of another floating dtype, the result then has the promoted one (as in transformers).
        eps: added to the mean square.
        backend: "auto", "triton" or "reference".

    Returns:
        (..., width), contiguous. Differentiable once in ``x`` and ``weight``; the weight gradient is deterministic.

    Raises:
        ValueError: shapes that do not fit, a width over 65,536, tensors on different devices.
        TypeError: tensors that are not floating point; DTensors without :mod:`m3kernels.parallel.sharding_rules`.
    """
    triton_runs = use_triton("rms_norm", backend, x, weight, inductor_fuses=True)
    _check("rms_norm", x, weight, widest=MAX_WIDTH if triton_runs else None)
    if not triton_runs:
        return rms_norm_reference(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``summed = x + residual; normed = rms_norm(summed)`` in one pass; the backward is one pass too.

    Args:
        x, residual: (..., width), of one shape.
        weight, eps, backend: as in :func:`rms_norm`.

    Returns:
        (normed, summed), both (..., width). The backward adds the gradient that arrives for ``summed`` in the same pass.

    Raises:
        ValueError, TypeError: as :func:`rms_norm`, and when the shapes of ``x`` and ``residual`` differ.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: x and residual must have one shape, got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    triton_runs = use_triton("add_rms_norm", backend, x, residual, weight, inductor_fuses=True)
    _check("add_rms_norm", x, weight, widest=MAX_WIDTH if triton_runs else None)
    if not triton_runs:
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, summed, _ = _add_rms_norm(x, residual, weight, eps)
    return normed, summed
