"""The kernels behind :mod:`m3kernels.ops.linear_cross_entropy`: logits to loss and gradient, and what its labels need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, next_power_of_2, sm_count
from m3kernels.ops._triton import tl, triton


@dataclass(frozen=True)
class RowConfig:
    """Columns a program reads at a time, and its warps; one program handles one row."""

    block: int
    warps: int


def row_config(vocab: int, keeps_more: bool = False) -> RowConfig:
    """16,384 columns and 32 warps were the best of 14 at a vocabulary of 131,072 (H200).

    With smoothing or accuracy each lane keeps more than a maximum and a sum: half the columns, or registers spill.
    """
    block = min(8192 if keeps_more else 16_384, next_power_of_2(vocab))
    return RowConfig(block, warps=min(32, max(4, block // 512)))


@triton.jit
def cross_entropy_kernel(
    p_logits,
    p_label,
    p_scale,
    p_loss,
    p_correct,
    p_deferred,
    p_rest,
    row_stride,
    scale_stride,
    vocab,
    ignore_index,
    smoothing,
    z_loss,
    BLOCK: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    WANTS_CORRECT: tl.constexpr,
    DEFERS_LABEL: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_label + row).to(tl.int64)
    p_row = p_logits + row * row_stride
    o_lane = tl.arange(0, BLOCK)
    loss = 0.0
    correct = 0.0
    deferred = 0.0
    rest = 0.0

    if label == ignore_index:
        if WRITES_GRADIENT:
            for start in range(0, vocab, BLOCK):
                tl.store(p_row + start + o_lane, tl.zeros([BLOCK], p_logits.dtype.element_ty), start + o_lane < vocab)
    else:
        # each lane keeps its own running maximum: no reduction across threads inside the loop
        b_max = tl.full([BLOCK], -1e30, tl.float32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        b_total = tl.zeros([BLOCK], tl.float32)
        b_argmax = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            o_col = start + o_lane
            x = tl.load(p_row + o_col, mask=o_col < vocab, other=-float("inf")).to(tl.float32)
            b_new = tl.maximum(b_max, x)
            b_sum = b_sum * tl.exp2((b_max - b_new) * LOG2E) + tl.exp2((x - b_new) * LOG2E)
            if WANTS_CORRECT:
                b_argmax = tl.where(x > b_max, o_col, b_argmax)
            if HAS_SMOOTHING:
                b_total += tl.where(o_col < vocab, x, 0.0)
            b_max = b_new
        top = tl.max(b_max, axis=0)
        # top and the sum stay apart: an lse of both would be rounded at top's magnitude, an error of all its row
        total = tl.sum(b_sum * tl.exp2((b_max - top) * LOG2E), axis=0)
        log_total = tl.log(total)
        lse = top + log_total
        if WANTS_CORRECT:
            first = tl.min(tl.where(b_max == top, b_argmax, 2147483647), axis=0)
            correct = tl.where(first.to(tl.int64) == label, 1.0, 0.0)

        smooth = tl.cast(smoothing, tl.float32) if HAS_SMOOTHING else 0.0
        inside = (label >= 0) & (label < vocab)
        x_label = tl.load(p_row + label, mask=inside, other=0.0).to(tl.float32)
        loss = (top - x_label) + log_total + smooth * x_label
        if HAS_SMOOTHING:
            loss -= smooth * tl.sum(b_total, axis=0) / vocab
        factor = 1.0 / total
        if HAS_Z_LOSS:
            loss += tl.cast(z_loss, tl.float32) * lse * lse
            factor = (1.0 + 2.0 * tl.cast(z_loss, tl.float32) * lse) / total

        if WRITES_GRADIENT:
            scale = tl.load(p_scale + row * scale_stride)
            if DEFERS_LABEL:
                # near p = 1 the two terms cancel and must not be rounded apart
                softmax_label = factor * tl.exp2((x_label - top) * LOG2E)
                deferred = tl.where(softmax_label < 0.5 * (1.0 - smooth), (1.0 - smooth) * scale, 0.0)
                rest = (softmax_label - smooth / vocab) * scale
            for start in range(0, vocab, BLOCK):
                o_col = start + o_lane
                x = tl.load(p_row + o_col, mask=o_col < vocab, other=-float("inf")).to(tl.float32)
                # the true class is subtracted in fp32, before the one rounding
                d = factor * tl.exp2((x - top) * LOG2E) - tl.where(o_col == label, 1.0 - smooth, 0.0)
                if HAS_SMOOTHING:
                    d -= smooth / vocab
                tl.store(p_row + o_col, (d * scale).to(p_logits.dtype.element_ty), mask=o_col < vocab)

    tl.store(p_loss + row, loss)
    if WANTS_CORRECT:
        tl.store(p_correct + row, correct)
    if DEFERS_LABEL:
        tl.store(p_deferred + row, deferred)
        tl.store(p_rest + row, rest)


@triton.jit
def take_label_out_kernel(p_dlogits, p_label, p_deferred, p_rest, row_stride, n_rows, BLOCK: tl.constexpr):
    """Where a row's label term is deferred, its dlogit keeps only the rest."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row = row < n_rows
    deferred = tl.load(p_deferred + row, mask=m_row, other=0.0)
    label = tl.load(p_label + row, mask=m_row, other=0).to(tl.int64)
    rest = tl.load(p_rest + row, mask=m_row, other=0.0)
    tl.store(p_dlogits + row * row_stride + label, rest.to(p_dlogits.dtype.element_ty), mask=m_row & (deferred != 0.0))


@triton.jit
def add_label_terms_kernel(
    p_dweight,
    p_hidden,
    p_deferred,
    p_sorted,
    p_order,
    p_end,
    hidden_stride,
    width,
    vocab,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweight[label] -= sum of deferred * hidden over the rows of one label: one program a label, in the rows' order."""
    at = tl.program_id(0)
    label = tl.load(p_sorted + at).to(tl.int64)
    before = tl.load(p_sorted + at - 1, mask=at > 0, other=-1).to(tl.int64)
    if ((at == 0) | (label != before)) & (label >= 0) & (label < vocab):
        o_col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        m_col = o_col < width
        end = tl.load(p_end + at).to(tl.int32)
        b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(at, end, ROWS):
            o_at = start + tl.arange(0, ROWS)[:, None]
            row = tl.load(p_order + o_at, mask=o_at < end, other=0).to(tl.int64)
            deferred = tl.load(p_deferred + row, mask=o_at < end, other=0.0)
            h = tl.load(p_hidden + row * hidden_stride + o_col, mask=(o_at < end) & m_col, other=0.0).to(tl.float32)
            b_sum += deferred * h
        p_row = p_dweight + label * width + o_col
        total = tl.load(p_row, mask=m_col, other=0.0).to(tl.float32) - tl.sum(b_sum, axis=0, keep_dims=True)
        tl.store(p_row, total.to(p_dweight.dtype.element_ty), mask=m_col)


@triton.jit
def label_summary_kernel(p_label, p_valid, p_inverse, n, vocab, ignore_index, BLOCK: tl.constexpr):
    """Whether every label is in range or ignored, and 1 / max(1, how many are not ignored); one program."""
    b_count = tl.zeros([BLOCK], tl.int32)
    b_wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        label = tl.load(p_label + at, mask=at < n, other=0).to(tl.int64)
        counts = (at < n) & (label != ignore_index)
        b_count += counts.to(tl.int32)
        b_wrong += (counts & ((label < 0) | (label >= vocab))).to(tl.int32)
    count = tl.maximum(tl.sum(b_count, axis=0), 1)
    tl.store(p_inverse, 1.0 / count.to(tl.float32))
    tl.store(p_valid, tl.sum(b_wrong, axis=0) == 0)


def label_summary(labels: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(all labels valid, 1 / max(1, labels that count)) of a flat tensor, by one launch and without a synchronisation."""
    valid = torch.empty((), dtype=torch.bool, device=labels.device)
    inverse = torch.empty((), dtype=torch.float32, device=labels.device)
    args = (labels.contiguous(), valid, inverse, labels.numel(), vocab, ignore_index)
    launch("linear_cross_entropy labels", label_summary_kernel, (1,), *args, BLOCK=4096, num_warps=8)
    return valid, inverse


@triton.jit
def scale_kernel(p_x, p_out, p_scale, n, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr):
    scale = tl.load(p_scale)
    # a gradient of exactly 1 is the common case, and known only on the device
    if (scale != 1.0) | (not IN_PLACE):
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(p_x + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(p_out + at, (x * scale).to(p_out.dtype.element_ty), mask=at < n)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """``grad * factor`` in ``dtype``, multiplied in fp32 (PyTorch would round ``factor`` to the gradient's dtype first)."""
    in_place = in_place and grad.dtype == dtype
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    if grad.numel():
        programs = min(cdiv(grad.numel(), 4096), 8 * sm_count(grad.device))
        args = (grad, out, factor, grad.numel())
        launch("linear_cross_entropy backward", scale_kernel, (programs,), *args, BLOCK=4096, IN_PLACE=in_place)
    return out
