"""The chunk loop behind :mod:`m3kernels.ops.linear_cross_entropy`: its plan of chunks and its GEMMs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, next_power_of_2
from m3kernels.ops._cross_entropy_adapter import LowRank
from m3kernels.ops._cross_entropy_kernels import (
    add_label_terms_kernel,
    cross_entropy_kernel,
    label_summary,
    row_config,
    take_label_out_kernel,
)
from m3kernels.ops._triton import HAS_TRITON

LOGITS_BYTES = 256 * 2**20
# With a frozen head no gradient of the weight is read and written for each chunk: an eighth of all logits will do, where
# that is not less than this. At 4,096 tokens it is what the peak of a LoRA step consists of.
LEAST_LOGITS_BYTES = 128 * 2**20
# With label terms deferred, a bf16 weight gradient summed over 8 / 16 / 32 / 64 chunks has 1.05 / 1.10 / 1.22 / 1.42
# times the error of one bf16 GEMM (simulated at 8,192 tokens and a vocabulary of 131,072; without: 1.9 over 8).
MAX_ROUNDINGS = 32
# dtypes whose sum of chunks is rounded in between
DEFERRING_DTYPES = (torch.bfloat16,)
# an fp32 sum is read and written once a chunk; more chunks than this and that traffic shows beside the GEMMs
MAX_FP32_CHUNKS = 16


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
    needs_dadapter: bool = False


Adapter = tuple[Tensor, Tensor, float]  # A (R, width), B (vocab, R), scaling


def plan_chunks(rows: int, vocab: int, dtype: torch.dtype, options: Options) -> tuple[int, bool]:
    """(rows of logits held at once, whether the weight gradient is summed in fp32)."""
    if rows == 0:
        return 0, options.needs_dweight and dtype == torch.float16
    eighth = rows * vocab * dtype.itemsize // 8
    budget = LOGITS_BYTES if options.needs_dweight else min(LOGITS_BYTES, max(LEAST_LOGITS_BYTES, eighth))

    def at_least(n: int) -> int:
        fitting = max(1, n, (options.chunk_bytes or budget) // (vocab * dtype.itemsize))
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
def fp32_reductions() -> Iterator[None]:
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


def accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
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
    (rows, width), block = hidden.shape, min(1024, next_power_of_2(hidden.shape[1]))
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
        ROWS=8,
        BLOCK=block,
        num_warps=4,
    )


def run_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, adapter: Adapter | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients of ``sum(scale * losses)``, a chunk of rows at a time.

    Args:
        hidden: (rows, width) with unit stride in the last dimension; weight: (vocab, width) contiguous; labels: (rows,);
            scale: (rows,) or one value, fp32. All on one device.

    Returns:
        losses (rows,), hits (rows,), dhidden (rows, width), dweight (vocab, width), dA (R, width), dB (vocab, R); what is
        not wanted is empty. dA, dB and, for fp16, dweight are fp32: they are rounded when the incoming gradient (a loss
        scale, usually) is known.
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
        nothing = [
            hidden.new_zeros(t.shape if options.needs_dadapter else 0, dtype=torch.float32) for t in pair_of(adapter)
        ]
        return losses, correct, dhidden, dweight.zero_(), *nothing
    low = None if adapter is None else LowRank(hidden, *adapter, options.needs_dadapter)
    buffer = hidden.new_empty((step, vocab))
    config = row_config(vocab, options.wants_correct or options.smoothing != 0.0)
    with fp32_reductions():
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            h, logits = hidden[here], buffer[: min(step, rows - start)]
            if low is None:
                torch.mm(h, weight.t(), out=logits)
            else:
                low.write_logits(here, logits)
                logits.addmm_(h, weight.t())
            label_terms = (deferred[here], rest[here]) if defers else (deferred, rest)
            launch(
                "linear_cross_entropy",
                cross_entropy_kernel,
                (len(logits),),
                logits,
                labels[here],
                scale[here] if scale.numel() > 1 else scale,
                losses[here],
                correct[here] if options.wants_correct else correct,
                *label_terms,
                logits.stride(0),
                1 if scale.numel() > 1 else 0,
                vocab,
                options.ignore_index,
                options.smoothing,
                options.z_loss,
                BLOCK=config.block,
                WRITES_GRADIENT=options.needs_dhidden or options.needs_dweight or options.needs_dadapter,
                HAS_SMOOTHING=options.smoothing != 0.0,
                HAS_Z_LOSS=options.z_loss != 0.0,
                WANTS_CORRECT=options.wants_correct,
                DEFERS_LABEL=defers,
                num_warps=config.warps,
            )
            if low is not None and (options.needs_dhidden or options.needs_dadapter):
                low.read_dlogits(here, logits)
            if options.needs_dhidden and low is None:
                torch.mm(logits, weight, out=dhidden[here])
            elif options.needs_dhidden:
                low.write_dhidden(here, dhidden[here])
                dhidden[here].addmm_(logits, weight)
            if defers:
                tensors = (logits, labels[here], *label_terms)
                grid = (cdiv(len(logits), 128),)
                op = "linear_cross_entropy label terms"
                launch(op, take_label_out_kernel, grid, *tensors, logits.stride(0), len(logits), BLOCK=128)
            if options.needs_dweight:
                accumulate(dweight, logits, h, first=start == 0)
    if defers:
        _add_label_terms(dweight, hidden, labels, deferred)
    da, db = (t.new_empty(0, dtype=torch.float32) for t in (hidden, hidden)) if low is None else low.gradients()
    return losses, correct, dhidden, dweight if hidden.dtype == torch.float16 else dweight.to(weight.dtype), da, db


def pair_of(adapter: Adapter | None) -> tuple[Tensor, Tensor]:
    """A and B, empty where there is none."""
    return (torch.empty(0), torch.empty(0)) if adapter is None or adapter[0] is None else adapter[:2]


def run_rows_that_count(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, adapter: Adapter | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`run_chunks` over the rows that are not ignored when the host knows them, over all rows otherwise."""
    check_labels(labels, weight.shape[0], options.ignore_index)
    hidden, weight = hidden if hidden.stride(1) == 1 else hidden.contiguous(), weight.contiguous()
    if labels.device.type != "cpu":
        return run_chunks(hidden, weight, labels, scale, adapter, options)
    kept = (labels.long() != options.ignore_index).nonzero().squeeze(1)
    rows, labels = len(labels), labels[kept].to(hidden.device, non_blocking=True)
    if len(kept) == rows:
        return run_chunks(hidden, weight, labels, scale, adapter, options)
    kept = kept.to(hidden.device, non_blocking=True)
    few_scales = scale.index_select(0, kept) if scale.numel() > 1 else scale
    few = hidden.index_select(0, kept)
    losses, correct, dhidden, *rest = run_chunks(few, weight, labels, few_scales, adapter, options)

    def spread(few: Tensor, wanted: bool) -> Tensor:
        return few.new_zeros((rows, *few.shape[1:])).index_copy_(0, kept, few) if wanted else few

    return spread(losses, True), spread(correct, options.wants_correct), spread(dhidden, options.needs_dhidden), *rest


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    if labels.device.type == "meta":
        return
    message = f"linear_cross_entropy: a label is neither in [0, {vocab}) nor ignore_index {ignore_index}"
    if labels.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        torch._assert_async(label_summary(labels, vocab, ignore_index)[0], message)
        return
    labels = labels.long()  # a vocabulary's size need not fit the labels' own type
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if labels.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), message)
    elif wrong.any():
        raise ValueError(
            f"{message}: found {labels[wrong][:5].tolist()}; check the tokenizer and the model's vocabulary"
        )
