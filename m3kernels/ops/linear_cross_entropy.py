"""Linear layer and cross-entropy in one op that never holds all logits.

    logits = hidden @ weight.T        loss_t = lse_t - (1 - s) * logits[t, label_t] - s * mean(logits_t) + z * lse_t^2

with ``lse_t = logsumexp(logits_t)``, label smoothing ``s`` and z-loss ``z``. Matches ``lm_head`` followed by
``ForCausalLMLoss`` of transformers (logits in the activations' dtype, the loss in fp32), labels already shifted.

Rows go through in chunks. cuBLAS makes a chunk of logits; one kernel reads it twice and turns it into its gradient in place,

    dlogits = scale_t * (softmax(logits_t) * (1 + 2 * z * lse_t) - (1 - s) * onehot(label_t) - s / vocab),

and cuBLAS makes ``dhidden`` and ``dweight`` of that, all in the forward: the backward only multiplies by the incoming
gradient. A bf16 ``dweight`` is rounded with every chunk; the large ``onehot`` terms would be rounded over and over, so where
they do not cancel against the softmax they are left out and added once, at the end, in fp32: the error stays near that of
one GEMM over all rows without an fp32 copy of the weight's gradient (``_cross_entropy_chunks.MAX_ROUNDINGS``).
Nothing is computed for a weight or hidden state that needs no gradient, nor for ignored rows when the labels are on the
host; labels on the GPU never cost a synchronisation. An adapter's low-rank part joins each chunk's products
(:mod:`m3kernels.ops._cross_entropy_adapter`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops._common import fused_op, use_triton
from m3kernels.ops._cross_entropy_adapter import check_adapters, joined
from m3kernels.ops._cross_entropy_chunks import Options, check_labels, pair_of, run_rows_that_count
from m3kernels.ops._cross_entropy_kernels import label_summary, scaled

# fp16 holds nothing below 6e-8: gradients stay scaled up, and unscaled in fp32 at the end
FP16_SCALE = 1024.0
REDUCTIONS = ("mean", "sum", "none")


def _per_row(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wants_correct: bool,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dadapter: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and hits a row, and the gradients of ``sum(scale * losses)``; what is not wanted comes back empty."""
    needs = (needs_dhidden, needs_dweight)
    options = Options(ignore_index, smoothing, z_loss, wants_correct, *needs, accumulate, chunk_bytes, needs_dadapter)
    adapter = None if A is None else (A, B, scaling)
    if hidden.dtype != torch.float16:
        return run_rows_that_count(hidden, weight, labels, scale, adapter, options)
    scaled_up = scale * FP16_SCALE if scale.numel() > 1 else torch.full_like(scale, FP16_SCALE)
    return run_rows_that_count(hidden, weight, labels, scaled_up, adapter, options)


def _reduced(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wants_correct: bool,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dadapter: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`_per_row` with one ``scale``, and the loss and the hits summed."""
    options = (ignore_index, smoothing, z_loss, wants_correct, needs_dhidden, needs_dweight, needs_dadapter)
    adapter = (A, B, scaling)
    losses, correct, *grads = _per_row(hidden, weight, labels, scale, *adapter, *options, accumulate, chunk_bytes)
    return losses.sum() * scale, correct.sum(), *grads


def _reduced_fake(hidden, weight, labels, scale, A, B, scaling, *options):
    needs_dhidden, needs_dweight, needs_dadapter = options[-5:-2]
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else (0,))
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    dweight = weight.new_empty(weight.shape if needs_dweight else (0,), dtype=dtype)
    pair = (
        hidden.new_empty(t.shape if needs_dadapter else (0,), dtype=torch.float32) for t in pair_of((A, B, scaling))
    )
    return loss, torch.empty_like(loss), dhidden, dweight, *pair


def _reduced_backward(
    dhidden: Tensor, dweight: Tensor, da: Tensor, db: Tensor, factor: Tensor, dtype: torch.dtype, of_adapter: torch.dtype,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All gradients times ``factor``, one fp32 value on the device."""
    pairs = ((dhidden, dtype), (dweight, dtype), (da, of_adapter), (db, of_adapter))
    return tuple(scaled(grad, factor, to, in_place) for grad, to in pairs)


def _reduced_backward_fake(dhidden, dweight, da, db, factor, dtype, of_adapter, in_place):
    return *(torch.empty_like(t, dtype=dtype) for t in (dhidden, dweight)), *(
        torch.empty_like(t, dtype=of_adapter) for t in (da, db)
    )


def _reduced_setup(ctx, inputs, output):
    hidden, _, _, scale, A = inputs[:5]
    _, hits, *grads = output
    ctx.dtypes = hidden.dtype, hidden.dtype if A is None else A.dtype
    # or the engine would fill gradients for dhidden and dweight with zeros, as large as they are
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hits, *grads)
    ctx.save_for_backward(*grads, scale)


def _reduced_gradients(ctx, run_backward, dloss, *_):
    *grads, scale = ctx.saved_tensors
    factor = dloss * scale / FP16_SCALE if ctx.dtypes[0] == torch.float16 else dloss.contiguous()
    # the buffers are handed over and scaled in place, unless the graph is kept for another backward
    owned = run_backward is _reduced_backward and not torch._C._autograd._get_current_graph_task_keep_graph()
    return _by_input(run_backward(*grads, factor, *ctx.dtypes, owned), ctx.needs_input_grad, adapter_at=4)


def _by_input(grads, needs: tuple[bool, ...], adapter_at: int) -> tuple[Tensor | None, ...]:
    """dhidden, dweight, dA and dB where the inputs stand: the first two first, A at ``adapter_at``, B after it."""
    found = [None] * len(needs)
    for i, grad in zip((0, 1, adapter_at, adapter_at + 1), grads):
        found[i] = grad if needs[i] else None
    return tuple(found)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wants_correct: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Losses and hits a row (reduction="none"); their gradient arrives a row at a time, so it is computed in the backward."""
    unused = torch.ones(1, dtype=torch.float32, device=hidden.device)
    options = (ignore_index, smoothing, z_loss, wants_correct, False, False, False, accumulate, chunk_bytes)
    return _per_row(hidden, weight, labels, unused, A, B, scaling, *options)[:2]


def _losses_fake(
    hidden, weight, labels, A, B, scaling, ignore_index, smoothing, z_loss, wants_correct, accumulate, chunk_bytes
):
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    return losses, losses.new_empty(hidden.shape[0] if wants_correct else 0)


def _losses_backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dadapter: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (ignore_index, smoothing, z_loss, False, needs_dhidden, needs_dweight, needs_dadapter)
    scale, of_adapter = dlosses.float().contiguous(), hidden.dtype if A is None else A.dtype
    grads = _per_row(hidden, weight, labels, scale, A, B, scaling, *options, accumulate, chunk_bytes)[2:]
    if hidden.dtype != torch.float16:
        return *grads[:2], *(grad.to(of_adapter) for grad in grads[2:])
    one = torch.ones((), dtype=torch.float32, device=hidden.device)
    down = (dlosses.float().view(()) if dlosses.numel() == 1 else one) / FP16_SCALE
    dtypes = (hidden.dtype, hidden.dtype, of_adapter, of_adapter)
    return tuple(scaled(grad, down, dtype, False) for grad, dtype in zip(grads, dtypes))


def _losses_backward_fake(dlosses, hidden, weight, labels, A, B, scaling, *options):
    needs = (*options[3:6], options[5])
    tensors = (hidden, weight, *(pair_of(None) if A is None else (A, B)))
    likes = (hidden, weight, *((hidden, hidden) if A is None else (A, B)))
    return tuple(like.new_empty(t.shape if needed else (0,)) for like, t, needed in zip(likes, tensors, needs))


def _losses_setup(ctx, inputs, output):
    hidden, weight, labels, A, B, *options, _, accumulate, chunk_bytes = inputs
    ctx.options, ctx.chunking, ctx.adapted = options, (accumulate, chunk_bytes), A is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, labels, *((A, B) if ctx.adapted else ()))


def _losses_gradients(ctx, run_backward, dlosses, _):
    needs = ctx.needs_input_grad
    tensors = (*ctx.saved_tensors, *(() if ctx.adapted else (None, None)))
    wanted = (*needs[:2], needs[3] or needs[4])
    grads = run_backward(dlosses, *tensors, *ctx.options, *wanted, *ctx.chunking)
    return _by_input(grads, needs, adapter_at=3)


_linear_cross_entropy = fused_op(
    "linear_cross_entropy",
    forward=_reduced,
    forward_fake=_reduced_fake,
    backward=_reduced_backward,
    backward_fake=_reduced_backward_fake,
    setup_context=_reduced_setup,
    gradients=_reduced_gradients,
)

_linear_cross_entropy_per_row = fused_op(
    "linear_cross_entropy_per_row",
    forward=_losses,
    forward_fake=_losses_fake,
    backward=_losses_backward,
    backward_fake=_losses_backward_fake,
    setup_context=_losses_setup,
    gradients=_losses_gradients,
)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_token_accuracy: bool = False,
    adapters: Sequence[tuple[Tensor, Tensor, float]] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch with all logits at once, the loss in fp32 (fp64 for fp64); skips ignored rows when labels are on the host."""
    shape, vocab = labels.shape, weight.shape[0]
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    check_labels(labels, vocab, ignore_index)
    valid = labels != ignore_index
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = valid.nonzero().squeeze(1)
        hidden, labels = hidden[kept.to(hidden.device)], labels[kept]
    labels = labels.to(hidden.device)
    logits = F.linear(hidden, weight)
    for a, b, scaling in adapters:  # PEFT's casts and order
        logits = logits + F.linear(F.linear(hidden.to(a.dtype), a), b) * scaling
    logits = logits.to(hidden.dtype)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, labels, **options)
    if z_loss:
        losses = losses + (labels != ignore_index) * z_loss * torch.logsumexp(logits, -1).square()
    count = valid.sum().clamp(min=1).to(hidden.device)
    if reduction == "none":
        loss = losses if losses.shape == valid.shape else losses.new_zeros(valid.shape).index_copy(0, kept, losses)
        loss = loss.view(shape)
    else:
        loss = losses.sum() / (
            num_items_in_batch if num_items_in_batch is not None else count if reduction == "mean" else 1
        )
    if not return_token_accuracy:
        return loss
    return loss, (logits.argmax(-1) == labels).sum() / count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_token_accuracy: bool = False,
    accumulate_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    adapters: Sequence[tuple[Tensor, Tensor, float]] = (),
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T`` against ``labels`` without holding all logits.

    Args:
        hidden: (..., width) in fp32, bf16 or fp16. Under autocast, hidden and weight are cast as ``F.linear`` would.
        weight: (vocab, width), hidden's dtype.
        labels: (...) integers in [0, vocab) or ``ignore_index``, one a hidden row: shift them before. Labels in host
            memory spare the ignored rows' arithmetic; on the GPU they are not looked at from the host.
        reduction: "mean" over labels that are not ignored, "sum", or "none" (ignored rows 0). All ignored gives 0.
        num_items_in_batch: divides the summed loss in place of the count (transformers' name and meaning).
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        z_loss: coefficient of ``logsumexp(logits)^2``.
        return_token_accuracy: also return the share of labels that are the (first) largest logit.
        accumulate_dtype: of the weight gradient's sum over chunks. None keeps its error within 1.5 times that of one
            GEMM; ``torch.float32`` sums in fp32 (4 bytes a weight more); the weight's dtype sums in that.
        chunk_bytes: budget for the logits held at once; None chooses (256 MiB, more where the error bound demands; from 128 MiB
            on, an eighth of all, with a frozen weight).
        adapters: LoRA's of the head, each (A (R, width), B (vocab, R), scaling) of hidden's dtype or fp32: logits are
            ``hidden @ (weight + sum of scaling * B @ A).T``, of which only the products of a chunk are formed.
        backend: "auto", "triton" or "reference".

    Returns:
        The loss in fp32, () or labels' shape for "none"; with ``return_token_accuracy`` a pair with the accuracy ().
        Differentiable once in ``hidden``, ``weight`` and every A and B.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; a label out of range on the host (on CUDA a
            device-side assertion, as in ``F.cross_entropy``).
        TypeError: labels that are not integers, hidden or weight not floating point, DTensors.
    """
    op = "linear_cross_entropy"
    if (
        weight.dim() != 2
        or hidden.dim() == 0
        or hidden.shape[-1] != weight.shape[1]
        or hidden.shape[:-1] != labels.shape
    ):
        raise ValueError(
            f"{op}: needs hidden (..., width), weight (vocab, width) and labels (...), "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{op}: labels must be integers, got {labels.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError(f"{op}: num_items_in_batch divides a summed loss; it has no meaning with reduction='none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"{op}: chunk_bytes must be positive, got {chunk_bytes}")
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        adapters = [(a.to(dtype), b.to(dtype), s) for a, b, s in adapters]
    adapters = list(adapters)
    runs = use_triton(op, backend, hidden, weight, *(t for a, b, _ in adapters for t in (a, b)))
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{op}: hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}; cast one"
        )
    if adapters:
        check_adapters(op, hidden, weight, adapters)
    if accumulate_dtype not in (None, torch.float32, weight.dtype):
        raise ValueError(
            f"{op}: accumulate_dtype must be None, torch.float32 or {weight.dtype}, got {accumulate_dtype}"
        )
    if labels.device.type != "cpu" and labels.device != hidden.device:
        raise ValueError(f"{op}: labels are on {labels.device}, hidden on {hidden.device}; move them together")
    if not runs:
        return linear_cross_entropy_reference(
            hidden,
            weight,
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            return_token_accuracy=return_token_accuracy,
            adapters=adapters,
        )

    accumulate = {None: "auto", torch.float32: "float32"}.get(accumulate_dtype, "weight")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    options = (ignore_index, label_smoothing, z_loss, return_token_accuracy)
    chunking = (accumulate, chunk_bytes or 0)
    adapter = joined(adapters) if adapters else (None, None, 1.0)
    averages = reduction == "mean" and num_items_in_batch is None
    if averages or return_token_accuracy:
        per_label = _inverse_count(flat, weight.shape[0], ignore_index).to(hidden.device)
    if reduction == "none":
        loss, hits = _linear_cross_entropy_per_row(rows, weight, flat, *adapter, *options, *chunking)
        loss, hits = loss.view(labels.shape), hits.sum()
    else:
        items = 1 if num_items_in_batch is None else num_items_in_batch
        scale = per_label if averages else _inverse(items, hidden.device)
        grads = torch.is_grad_enabled()
        needs = [grads and any(t.requires_grad for t in tensors) for tensors in ([hidden], [weight], pair_of(adapter))]
        loss, hits, *_ = _linear_cross_entropy(rows, weight, flat, scale, *adapter, *options, *needs, *chunking)
        # a count of shape (1,) makes a loss of shape (1,), as in transformers
        loss = loss.reshape(num_items_in_batch.shape) if isinstance(num_items_in_batch, Tensor) else loss
    return (loss, hits * per_label) if return_token_accuracy else loss


def _inverse_count(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """1 / max(1, labels that are not ignored) in fp32, where the labels are."""
    if labels.is_cuda and not torch.compiler.is_compiling():
        return label_summary(labels, vocab, ignore_index)[1]
    return 1.0 / (labels.long() != ignore_index).sum().clamp(min=1).float()


def _inverse(items: int | float | Tensor, device: torch.device) -> Tensor:
    """1 / items in fp32 on ``device``; one value on the host divides without a synchronisation."""
    if isinstance(items, Tensor):
        items = items.reshape(()) if items.device.type == "cpu" else items.reshape(()).to(device)
    return torch.ones((), dtype=torch.float32, device=device) / items
