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
host; labels on the GPU never cost a synchronisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops._common import fused_op, use_triton
from m3kernels.ops._cross_entropy_chunks import Options, check_labels, run_rows_that_count
from m3kernels.ops._cross_entropy_kernels import label_summary, scaled

# fp16 holds nothing below 6e-8: gradients stay scaled up, and unscaled in fp32 at the end
FP16_SCALE = 1024.0
REDUCTIONS = ("mean", "sum", "none")


def _per_row(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wants_correct: bool,
    needs_dhidden: bool,
    needs_dweight: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and hits a row, and the gradients of ``sum(scale * losses)``; what is not wanted comes back empty."""
    options = Options(
        ignore_index, smoothing, z_loss, wants_correct, needs_dhidden, needs_dweight, accumulate, chunk_bytes
    )
    if hidden.dtype != torch.float16:
        return run_rows_that_count(hidden, weight, labels, scale, options)
    scaled_up = scale * FP16_SCALE if scale.numel() > 1 else torch.full_like(scale, FP16_SCALE)
    return run_rows_that_count(hidden, weight, labels, scaled_up, options)


def _reduced(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wants_correct: bool,
    needs_dhidden: bool,
    needs_dweight: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`_per_row` with one ``scale``, and the loss and the hits summed."""
    options = (ignore_index, smoothing, z_loss, wants_correct, needs_dhidden, needs_dweight, accumulate, chunk_bytes)
    losses, correct, dhidden, dweight = _per_row(hidden, weight, labels, scale, *options)
    return losses.sum() * scale, correct.sum(), dhidden, dweight


def _reduced_fake(hidden, weight, labels, scale, *options):
    _, _, _, _, needs_dhidden, needs_dweight, _, _ = options[-8:]
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else (0,))
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return loss, torch.empty_like(loss), dhidden, weight.new_empty(weight.shape if needs_dweight else (0,), dtype=dtype)


def _reduced_backward(
    dhidden: Tensor, dweight: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients times ``factor``, one fp32 value on the device."""
    return scaled(dhidden, factor, dtype, in_place), scaled(dweight, factor, dtype, in_place)


def _reduced_backward_fake(dhidden, dweight, factor, dtype, in_place):
    return torch.empty_like(dhidden, dtype=dtype), torch.empty_like(dweight, dtype=dtype)


def _reduced_setup(ctx, inputs, output):
    hidden, _, _, scale = inputs[:4]
    _, hits, dhidden, dweight = output
    ctx.dtype = hidden.dtype
    # or the engine would fill gradients for dhidden and dweight with zeros, as large as they are
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hits, dhidden, dweight)
    ctx.save_for_backward(dhidden, dweight, scale)


def _reduced_gradients(ctx, run_backward, dloss, *_):
    dhidden, dweight, scale = ctx.saved_tensors
    factor = dloss * scale / FP16_SCALE if ctx.dtype == torch.float16 else dloss.contiguous()
    # the buffers are handed over and scaled in place, unless the graph is kept for another backward
    owned = run_backward is _reduced_backward and not torch._C._autograd._get_current_graph_task_keep_graph()
    dhidden, dweight = run_backward(dhidden, dweight, factor, ctx.dtype, owned)
    needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
    return dhidden if needs_dhidden else None, dweight if needs_dweight else None, *[None] * 10


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wants_correct: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Losses and hits a row (reduction="none"); their gradient arrives a row at a time, so it is computed in the backward."""
    unused = torch.ones(1, dtype=torch.float32, device=hidden.device)
    options = (ignore_index, smoothing, z_loss, wants_correct, False, False, accumulate, chunk_bytes)
    return _per_row(hidden, weight, labels, unused, *options)[:2]


def _losses_fake(hidden, weight, labels, ignore_index, smoothing, z_loss, wants_correct, accumulate, chunk_bytes):
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    return losses, losses.new_empty(hidden.shape[0] if wants_correct else 0)


def _losses_backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    accumulate: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    options = (ignore_index, smoothing, z_loss, False, needs_dhidden, needs_dweight, accumulate, chunk_bytes)
    _, _, dhidden, dweight = _per_row(hidden, weight, labels, dlosses.float().contiguous(), *options)
    if hidden.dtype != torch.float16:
        return dhidden, dweight
    one = torch.ones((), dtype=torch.float32, device=hidden.device)
    down = (dlosses.float().view(()) if dlosses.numel() == 1 else one) / FP16_SCALE
    return scaled(dhidden, down, hidden.dtype, False), scaled(dweight, down, hidden.dtype, False)


def _losses_backward_fake(dlosses, hidden, weight, labels, *options):
    needs_dhidden, needs_dweight = options[3:5]
    return hidden.new_empty(hidden.shape if needs_dhidden else (0,)), weight.new_empty(
        weight.shape if needs_dweight else (0,)
    )


def _losses_setup(ctx, inputs, output):
    hidden, weight, labels, *options, _, accumulate, chunk_bytes = inputs
    ctx.options, ctx.chunking = options, (accumulate, chunk_bytes)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, labels)


def _losses_gradients(ctx, run_backward, dlosses, _):
    needs = ctx.needs_input_grad[:2]
    grads = run_backward(dlosses, *ctx.saved_tensors, *ctx.options, *needs, *ctx.chunking)
    return *(g if needed else None for g, needed in zip(grads, needs)), *[None] * 7


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
        chunk_bytes: budget for the logits held at once; None chooses (256 MiB, more where the error bound demands).
        backend: "auto", "triton" or "reference".

    Returns:
        The loss in fp32, () or labels' shape for "none"; with ``return_token_accuracy`` a pair with the accuracy ().
        Differentiable once in ``hidden`` and ``weight``.

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
    runs = use_triton(op, backend, hidden, weight)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{op}: hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}; cast one"
        )
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
        )

    accumulate = {None: "auto", torch.float32: "float32"}.get(accumulate_dtype, "weight")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    options = (ignore_index, label_smoothing, z_loss, return_token_accuracy)
    chunking = (accumulate, chunk_bytes or 0)
    averages = reduction == "mean" and num_items_in_batch is None
    if averages or return_token_accuracy:
        per_label = _inverse_count(flat, weight.shape[0], ignore_index).to(hidden.device)
    if reduction == "none":
        loss, hits = _linear_cross_entropy_per_row(rows, weight, flat, *options, *chunking)
        loss, hits = loss.view(labels.shape), hits.sum()
    else:
        items = 1 if num_items_in_batch is None else num_items_in_batch
        scale = per_label if averages else _inverse(items, hidden.device)
        grads = torch.is_grad_enabled()
        needs = (grads and hidden.requires_grad, grads and weight.requires_grad)
        loss, hits, _, _ = _linear_cross_entropy(rows, weight, flat, scale, *options, *needs, *chunking)
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
