"""The chunk loop behind :mod:`m3kernels.ops.linear_cross_entropy`: its kernels, its plan of chunks, its GEMMs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, next_power_of_2, sm_count
from m3kernels.ops._triton import tl, triton

LOGITS_BYTES = 256 * 2**20
# With label terms deferred, a bf16 weight gradient summed over 8 / 16 / 32 / 64 chunks has 1.05 / 1.10 / 1.22 / 1.42
# times the error of one bf16 GEMM (simulated at 8,192 tokens and a vocabulary of 131,072; without: 1.9 over 8).
MAX_ROUNDINGS = 32
# dtypes whose sum of chunks is rounded in between
DEFERRING_DTYPES = (torch.bfloat16,)
# an fp32 sum is read and written once a chunk; more chunks than this and that traffic shows beside the GEMMs
MAX_FP32_CHUNKS = 16


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
            # from the end of the row to its beginning: what was read last is still in the L2 cache
            last = (vocab - 1) // BLOCK * BLOCK
            for back in range(0, vocab, BLOCK):
                o_col = last - back + o_lane
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


@dataclass(frozen=True)
class Options:
    """What a call asks of the chunk loop; ``chunk_bytes`` 0 means chosen here."""

    ignore_index: int
    smoothing: float
    z_loss: float
    wants_correct: bool
    needs_dhidden: bool
    needs_dweight: bool
    accumulate: str  # "auto", "weight" or "float32"
    chunk_bytes: int


def plan_chunks(rows: int, vocab: int, dtype: torch.dtype, options: Options) -> tuple[int, bool]:
    """(rows of logits held at once, whether the weight gradient is summed in fp32)."""

    def at_least(n: int) -> int:
        fitting = max(1, n, (options.chunk_bytes or LOGITS_BYTES) // (vocab * dtype.itemsize))
        # whole tiles of the GEMM
        return min(rows, -(-fitting // 128) * 128 if fitting >= 128 else fitting)

    def at_most_chunks(n: int) -> int:
        return at_least(0 if options.chunk_bytes else -(-rows // n))

    if not options.needs_dweight or dtype == torch.float32:
        return at_least(0), False
    if dtype == torch.float16 or options.accumulate == "float32":
        return at_most_chunks(MAX_FP32_CHUNKS), True
    if options.accumulate == "weight":
        return at_least(0), False
    step = at_most_chunks(MAX_ROUNDINGS)
    return step, -(-rows // step) > MAX_ROUNDINGS


@contextmanager
def _fp32_reductions() -> Iterator[None]:
    """cuBLAS may otherwise add the parts of a product split along the vocabulary in bf16: 1.5 times eager's error."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [(getattr(matmul, n), getattr(matmul, f"{n}_split_k", True)) for n in names]
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, (reduced, split_k) in zip(names, before):
            setattr(matmul, name, reduced if split_k else (reduced, split_k))


def _accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """``total (+)= dlogits.T @ hidden`` by one GEMM, whose fp32 accumulator meets ``total`` before the only rounding."""
    beta = 0 if first else 1
    if total.dtype == dlogits.dtype:
        torch.addmm(total, dlogits.t(), hidden, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, dlogits.t().float(), hidden.float(), beta=beta, out=total)


def _add_label_terms(dweight: Tensor, hidden: Tensor, labels: Tensor, deferred: Tensor) -> None:
    ordered, order = labels.sort(stable=True)
    end = torch.searchsorted(ordered, ordered, right=True)
    (rows, width), block = hidden.shape, min(512, next_power_of_2(hidden.shape[1]))
    launch(
        "linear_cross_entropy label terms",
        add_label_terms_kernel,
        (rows, cdiv(width, block)),
        dweight,
        hidden,
        deferred,
        ordered,
        order,
        end,
        hidden.stride(0),
        width,
        dweight.shape[0],
        ROWS=16,
        BLOCK=block,
        num_warps=4,
    )


def run_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients of ``sum(scale * losses)``, a chunk of rows at a time.

    Args:
        hidden: (rows, width) with unit stride in the last dimension; weight: (vocab, width) contiguous; labels: (rows,);
            scale: (rows,) or one value, fp32. All on one device.

    Returns:
        losses (rows,), hits (rows,), dhidden (rows, width), dweight (vocab, width); what is not wanted is empty. For
        fp16 dweight is fp32: it is rounded when the incoming gradient (a loss scale, usually) is known.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    step, in_fp32 = plan_chunks(rows, vocab, hidden.dtype, options)
    # a large term that is there before the last chunk is rounded again with every chunk after it: it comes last instead
    defers = options.needs_dweight and not in_fp32 and hidden.dtype in DEFERRING_DTYPES and rows > step
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(rows if options.wants_correct else 0, dtype=torch.float32, device=hidden.device)
    deferred, rest = losses.new_empty((2, rows if defers else 0))
    dhidden = hidden.new_empty((rows, width) if options.needs_dhidden else (0,))
    dweight = weight.new_empty(
        weight.shape if options.needs_dweight else (0,), dtype=torch.float32 if in_fp32 else weight.dtype
    )
    if rows == 0:
        return losses, correct, dhidden, dweight.zero_()
    buffer = hidden.new_empty((step, vocab))
    config = row_config(vocab, options.wants_correct or options.smoothing != 0.0)
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        h, logits = hidden[here], buffer[: min(step, rows - start)]
        with _fp32_reductions():
            torch.mm(h, weight.t(), out=logits)
        launch(
            "linear_cross_entropy",
            cross_entropy_kernel,
            (len(logits),),
            logits,
            labels[here],
            scale[here] if scale.numel() > 1 else scale,
            losses[here],
            correct[here],
            deferred[here],
            rest[here],
            logits.stride(0),
            1 if scale.numel() > 1 else 0,
            vocab,
            options.ignore_index,
            options.smoothing,
            options.z_loss,
            BLOCK=config.block,
            WRITES_GRADIENT=options.needs_dhidden or options.needs_dweight,
            HAS_SMOOTHING=options.smoothing != 0.0,
            HAS_Z_LOSS=options.z_loss != 0.0,
            WANTS_CORRECT=options.wants_correct,
            DEFERS_LABEL=defers,
            num_warps=config.warps,
        )
        with _fp32_reductions():
            if options.needs_dhidden:
                torch.mm(logits, weight, out=dhidden[here])
            if defers:
                tensors = (logits, labels[here], deferred[here], rest[here])
                grid = (cdiv(len(logits), 128),)
                op = "linear_cross_entropy label terms"
                launch(op, take_label_out_kernel, grid, *tensors, logits.stride(0), len(logits), BLOCK=128)
            if options.needs_dweight:
                _accumulate(dweight, logits, h, first=start == 0)
    if defers:
        _add_label_terms(dweight, hidden, labels, deferred)
    return losses, correct, dhidden, dweight if hidden.dtype == torch.float16 else dweight.to(weight.dtype)


def run_rows_that_count(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`run_chunks` over the rows that are not ignored when the host knows them, over all rows otherwise."""
    check_labels(labels, weight.shape[0], options.ignore_index)
    hidden, weight = hidden if hidden.stride(1) == 1 else hidden.contiguous(), weight.contiguous()
    if labels.device.type != "cpu":
        return run_chunks(hidden, weight, labels, scale, options)
    kept = (labels != options.ignore_index).nonzero().squeeze(1)
    rows, labels = len(labels), labels[kept].to(hidden.device, non_blocking=True)
    if len(kept) == rows:
        return run_chunks(hidden, weight, labels, scale, options)
    kept = kept.to(hidden.device, non_blocking=True)
    few_scales = scale.index_select(0, kept) if scale.numel() > 1 else scale
    losses, correct, dhidden, dweight = run_chunks(hidden.index_select(0, kept), weight, labels, few_scales, options)

    def spread(few: Tensor, wanted: bool) -> Tensor:
        return few.new_zeros((rows, *few.shape[1:])).index_copy_(0, kept, few) if wanted else few

    return spread(losses, True), spread(correct, options.wants_correct), spread(dhidden, options.needs_dhidden), dweight


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    if labels.device.type == "meta":
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    message = f"linear_cross_entropy: a label is neither in [0, {vocab}) nor ignore_index {ignore_index}"
    if labels.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), message)
    elif wrong.any():
        raise ValueError(
            f"{message}: found {labels[wrong][:5].tolist()}; check the tokenizer and the model's vocabulary"
        )
