"""Linear layer and cross-entropy over a vocabulary that is split between ranks; all logits never exist, on no rank.

    logits = hidden @ weight.T        loss = sum over labels that count of (lse_t - logits[t, label_t]) / num_items

Tokens go through in chunks. A rank makes its columns of a chunk's logits and one pass over them gives their maximum, the
sum of exponentials below it and the label's logit where it is this rank's. Two collectives of a few bytes a token make

    top_t = max of logits_t        total_t = sum of exp(logits_t - top_t)        (over the columns of all ranks)
    loss_t = log(total_t) - (logits[t, label_t] - top_t)

and a second pass turns the logits into their gradient in place,

    dlogits = scale_t * (exp(logits_t - top_t) / total_t - onehot(label_t)),

from which ``dhidden`` (this rank's part of a sum over ranks) and ``dweight`` (this rank's rows) are made, all in the forward:
the backward multiplies by the incoming gradient and has no collective.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from m3kernels.ops._common import launch, use_triton
from m3kernels.ops._cross_entropy_chunks import LOGITS_BYTES, accumulate, fp32_reductions
from m3kernels.ops._cross_entropy_kernels import row_config, scaled
from m3kernels.ops._triton import tl, triton
from m3kernels.parallel.collectives import all_reduce_max, all_reduce_sum, rank_in, size_of

OP = "vocab_parallel_linear_cross_entropy"
# fp16 holds nothing below 6e-8: gradients stay scaled up, and unscaled in fp32 at the end
FP16_SCALE = 1024.0


@triton.jit
def vocab_parallel_stats_kernel(
    p_logits, p_label, p_top, p_total, p_target, row_stride, real_vocab, start, ignore_index, BLOCK: tl.constexpr
):
    """A row's largest logit, the sum of exponentials below it, and the label's logit (0 where another rank has it).

    ``real_vocab`` columns count, the first of those that are here: -1e30 and 0 where all of them are padding.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_label + row).to(tl.int64)
    p_row = p_logits + row * row_stride
    top = 0.0
    total = 1.0
    target = 0.0
    if label != ignore_index:
        o_lane = tl.arange(0, BLOCK)
        # each lane keeps its own running maximum: no reduction across threads inside the loop
        b_top = tl.full([BLOCK], -1e30, tl.float32)
        b_total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, real_vocab, BLOCK):
            o_col = first + o_lane
            x = tl.load(p_row + o_col, mask=o_col < real_vocab, other=-float("inf")).to(tl.float32)
            b_new = tl.maximum(b_top, x)
            b_total = b_total * tl.exp2((b_top - b_new) * LOG2E) + tl.exp2((x - b_new) * LOG2E)
            b_top = b_new
        top = tl.max(b_top, axis=0)
        total = tl.sum(b_total * tl.exp2((b_top - top) * LOG2E), axis=0)
        column = label - start
        target = tl.load(p_row + column, mask=(column >= 0) & (column < real_vocab), other=0.0).to(tl.float32)
    tl.store(p_top + row, top)
    tl.store(p_total + row, total)
    tl.store(p_target + row, target)


@triton.jit
def vocab_parallel_dlogits_kernel(
    p_logits, p_label, p_top, p_total, p_scale, row_stride, vocab, real_vocab, start, ignore_index, BLOCK: tl.constexpr
):
    """A row of logits becomes its gradient, given the maximum and the sum over all ranks; zero where padding is."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_label + row).to(tl.int64)
    p_row = p_logits + row * row_stride
    o_lane = tl.arange(0, BLOCK)
    if label == ignore_index:
        for first in range(0, vocab, BLOCK):
            tl.store(p_row + first + o_lane, tl.zeros([BLOCK], p_logits.dtype.element_ty), first + o_lane < vocab)
    else:
        scale = tl.load(p_scale)
        top = tl.load(p_top + row)
        factor = 1.0 / tl.load(p_total + row)
        column = label - start
        for first in range(0, vocab, BLOCK):
            o_col = first + o_lane
            x = tl.load(p_row + o_col, mask=o_col < real_vocab, other=-float("inf")).to(tl.float32)
            # the true class is subtracted in fp32, before the one rounding
            d = factor * tl.exp2((x - top) * LOG2E) - tl.where(o_col == column, 1.0, 0.0)
            tl.store(p_row + o_col, (d * scale).to(p_logits.dtype.element_ty), mask=o_col < vocab)


@dataclass(frozen=True)
class _Chunk:
    """Labels of a chunk's rows, and what of the vocabulary is here; the kernels' launches and their plain PyTorch form.

    Attributes:
        start: the first of this rank's columns in the whole vocabulary.
        real: how many of them are no padding, which stands at their end.
    """

    labels: Tensor
    start: int
    real: int
    ignore_index: int
    kernels: bool

    def statistics(self, logits: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(top, total, target) of each row of this rank's logits."""
        if self.kernels:
            top, total, target = logits.new_empty((3, len(logits)), dtype=torch.float32)
            self._launch(vocab_parallel_stats_kernel, logits, (top, total, target), (self.real,))
            return top, total, target
        x = self.unpadded(logits.to(wide))
        # finite, where all of them are padding
        top = x.amax(1).clamp_(min=-1e30)
        column, here = self.columns(logits.shape[1])
        target = x.gather(1, column[:, None]).squeeze(1)
        return top, (x - top[:, None]).exp_().sum(1), target.where(here, 0)

    def to_gradient(self, logits: Tensor, top: Tensor, total: Tensor, scale: Tensor) -> None:
        """``logits`` in place, given the maximum and the sum over all ranks."""
        if self.kernels:
            self._launch(vocab_parallel_dlogits_kernel, logits, (top, total, scale), (logits.shape[1], self.real))
            return
        d = (self.unpadded(logits.to(top.dtype)) - top[:, None]).exp_() / total[:, None]
        column, here = self.columns(logits.shape[1])
        d.scatter_add_(1, column[:, None], -here.to(d.dtype)[:, None])
        logits.copy_((d * scale).masked_fill_(~self.counts()[:, None], 0))

    def unpadded(self, x: Tensor) -> Tensor:
        """Logits that are -inf where padding is."""
        if self.real == x.shape[1]:
            return x
        return x.masked_fill(torch.arange(x.shape[1], device=x.device) >= self.real, -torch.inf)

    def counts(self) -> Tensor:
        return self.labels != self.ignore_index

    def columns(self, v: int) -> tuple[Tensor, Tensor]:
        """Each label's column of this rank's logits, and whether it has one."""
        column = self.labels - self.start
        return column.clamp(0, v - 1), self.counts() & (column >= 0) & (column < v)

    def _launch(self, kernel, logits: Tensor, rows: tuple[Tensor, ...], columns: tuple[int, ...]) -> None:
        config = row_config(logits.shape[1])
        args = (logits, self.labels, *rows, logits.stride(0), *columns, self.start, self.ignore_index)
        launch(OP, kernel, (len(logits),), *args, BLOCK=config.block, num_warps=config.warps)


@dataclass(frozen=True)
class _Options:
    group: ProcessGroup | None
    vocab_size: int
    ignore_index: int
    chunk_tokens: int
    kernels: bool
    needs_dhidden: bool
    needs_dweight: bool


def _chunk_tokens(v: int, dtype: torch.dtype) -> int:
    """Rows whose logits on this rank take about 256 MiB: whole tiles of the GEMM where it is that many."""
    fitting = max(1, LOGITS_BYTES // (v * dtype.itemsize))
    return fitting // 128 * 128 if fitting >= 128 else fitting


def _run(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, and the gradients of ``scale`` times it (empty where not needed).

    Args:
        scale: one value in the dtype that losses are added up in, fp32 or fp64.
    """
    (rows, width), v, wide, step = hidden.shape, weight.shape[0], scale.dtype, options.chunk_tokens
    start = rank_in(options.group) * v
    real = min(max(options.vocab_size - start, 0), v)
    losses = hidden.new_zeros(rows, dtype=wide)
    dhidden = torch.empty_like(hidden) if options.needs_dhidden else hidden.new_empty(0)
    # one chunk is rounded once, by its GEMM
    summed_in = wide if rows > step or hidden.dtype == torch.float16 else weight.dtype
    dweight = weight.new_zeros((v, width) if options.needs_dweight else 0, dtype=summed_in)
    buffer = hidden.new_empty((min(step, rows), v))
    with fp32_reductions():
        for first in range(0, rows, step):
            here = slice(first, first + step)
            h, chunk = hidden[here], _Chunk(labels[here], start, real, options.ignore_index, options.kernels)
            logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
            own_top, own_total, target = chunk.statistics(logits, wide)
            top = all_reduce_max(own_top, options.group)
            below_top = (target - top).where(chunk.columns(v)[1], 0)
            own = torch.stack([own_total * (own_top - top).exp(), below_top])
            total, below_top = all_reduce_sum(own, options.group)
            losses[here] = (total.log() - below_top).where(chunk.counts(), 0)
            if not (options.needs_dhidden or options.needs_dweight):
                continue
            chunk.to_gradient(logits, top, total, scale)
            if options.needs_dhidden:
                torch.mm(logits, weight, out=dhidden[here])
            if options.needs_dweight:
                accumulate(dweight, logits, h, first=first == 0)
    return losses.sum(), dhidden, dweight


class _VocabParallelLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, inverse: Tensor, options: _Options) -> Tensor:
        fp16 = hidden.dtype == torch.float16
        scale = torch.full_like(inverse, FP16_SCALE) if fp16 else inverse
        kept = None
        if labels.device.type == "cpu":
            kept = (labels != options.ignore_index).nonzero().squeeze(1)
            kept = None if len(kept) == len(labels) else kept
        few, few_labels = hidden, labels
        if kept is not None:
            few_labels, kept = labels[kept], kept.to(hidden.device)
            few = hidden.index_select(0, kept)
        loss, dhidden, dweight = _run(few.contiguous(), weight, few_labels.to(hidden.device), scale, options)
        if kept is not None and options.needs_dhidden:
            dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, dhidden)
        ctx.options, ctx.dtypes = options, (hidden.dtype, weight.dtype)
        ctx.save_for_backward(dhidden, dweight, inverse / FP16_SCALE if fp16 else torch.ones_like(inverse))
        return loss * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        dhidden, dweight, rest = ctx.saved_tensors
        factor, options = dloss * rest, ctx.options
        # the buffers are handed over and scaled in place, unless the graph is kept for another backward
        owned = not torch._C._autograd._get_current_graph_task_keep_graph()

        def times_factor(grad: Tensor, dtype: torch.dtype) -> Tensor:
            if options.kernels:
                return scaled(grad, factor, dtype, owned)
            return (grad.to(factor.dtype) * factor).to(dtype)

        return (
            times_factor(dhidden, ctx.dtypes[0]) if options.needs_dhidden else None,
            times_factor(dweight, ctx.dtypes[1]) if options.needs_dweight else None,
            *(None,) * 3,
        )


def vocab_parallel_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    labels_T: Tensor,
    group: ProcessGroup | None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against labels, where each rank holds some rows of the weight.

    Where one process holds the whole weight, take :func:`m3kernels.ops.linear_cross_entropy`: same values, one kernel a chunk.

    Args:
        hidden_TD: (T, D) in fp64, fp32, bf16 or fp16: all tokens, the same on every rank (``all_gather_tokens``).
            Under autocast, hidden and weight are cast as ``F.linear`` would.
        weight_vD: (v, D), hidden's dtype: this rank's rows, those from rank * v on. Every rank has as many.
        labels_T: (T,) integers in [0, vocab_size) or ``ignore_index``, one a row of hidden (shift them before), the same on
            every rank. Labels in host memory spare the ignored rows' arithmetic.
        group: the ranks that hold the weight; None for this process alone.
        vocab_size: rows of the whole weight from this one on are padding: in no sum, and their gradient is zero.
            None: there is none.
        num_items: divides the summed loss; the same on every rank. None: the labels that are not ignored, at least 1.
        chunk_tokens: rows whose logits are held at once, the same on every rank; None takes about 256 MiB of them.
        backend: "auto", "triton" or "reference".

    Returns:
        The loss (), fp32 (fp64 for fp64), the same on every rank. Differentiable once, by a gradient that is the same on
        every rank, in ``weight_vD`` and in ``hidden_TD``, whose gradient is this rank's part of a sum over ranks, as the
        backward of ``all_gather_tokens`` and ``copy_to_ranks`` takes it.

    Raises:
        ValueError: shapes, dtypes, devices, ``vocab_size`` or ``chunk_tokens`` that do not fit.
        TypeError: labels that are not integers, hidden or weight not floating point, DTensors.
        IndexError: a label out of range on the host, before any collective (on CUDA a device-side assertion).
    """
    if hidden_TD.dim() != 2 or weight_vD.dim() != 2 or hidden_TD.shape[1] != weight_vD.shape[1]:
        raise ValueError(
            f"{OP}: needs hidden (T, D) and weight (v, D), got {tuple(hidden_TD.shape)} and {tuple(weight_vD.shape)}"
        )
    if labels_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"{OP}: needs labels ({hidden_TD.shape[0]},), one a token, got {tuple(labels_T.shape)}")
    if labels_T.is_floating_point() or labels_T.dtype == torch.bool:
        raise TypeError(f"{OP}: labels must be integers, got {labels_T.dtype}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens must be positive, got {chunk_tokens}")
    rows = weight_vD.shape[0] * size_of(group)
    vocab_size = rows if vocab_size is None else vocab_size
    if not 0 < vocab_size <= rows:
        raise ValueError(f"{OP}: vocab_size must be in [1, {rows}], the rows of all ranks, got {vocab_size}")
    device = hidden_TD.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden_TD, weight_vD = hidden_TD.to(dtype), weight_vD.to(dtype)
    kernels = use_triton(OP, backend, hidden_TD, weight_vD)
    if hidden_TD.dtype != weight_vD.dtype:
        raise ValueError(
            f"{OP}: hidden and weight must have one dtype, got {hidden_TD.dtype} and {weight_vD.dtype}; cast one"
        )
    if labels_T.device.type != "cpu" and labels_T.device != device:
        raise ValueError(f"{OP}: labels are on {labels_T.device}, hidden on {device}; move them together")
    labels_T = labels_T.long()
    _check_labels(labels_T, vocab_size, ignore_index)

    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    if num_items is None:
        num_items = (labels_T != ignore_index).sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = num_items.reshape(()) if num_items.device.type == "cpu" else num_items.reshape(()).to(device)
    # one value on the host divides without a synchronisation
    inverse = (torch.ones((), dtype=wide, device=device) / num_items).to(wide)
    step = chunk_tokens or _chunk_tokens(weight_vD.shape[0], hidden_TD.dtype)
    needs = (torch.is_grad_enabled() and t.requires_grad for t in (hidden_TD, weight_vD))
    options = _Options(group, vocab_size, ignore_index, step, kernels, *needs)
    return _VocabParallelLinearCrossEntropy.apply(hidden_TD, weight_vD.contiguous(), labels_T, inverse, options)


def _check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    message = f"{OP}: a label is neither in [0, {vocab}) nor ignore_index {ignore_index}"
    if labels.is_cuda:
        torch._assert_async(~wrong.any(), message)
    elif wrong.any():
        raise IndexError(
            f"{message}: found {labels[wrong][:5].tolist()}; check the tokenizer and the model's vocabulary"
        )
