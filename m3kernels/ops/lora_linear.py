"""Linear layers with low-rank adapters, one or several of one input: LoRA (arXiv 2106.09685) and DoRA's scaled form.

    y_j = k_j * (x W_j^T + s_j drop_j(x) A_j^T B_j^T)            k_j: DoRA's scale of each output, or 1

    t_j = drop_j(x) A_j^T
    dz_j = k_j * dy_j        du_j = s_j dz_j B_j        dB_j = s_j dz_j^T t_j        dA_j = du_j^T drop_j(x)
    dx = sum_j dz_j W_j + drop_j'(du_j A_j)             dk_j = sum over rows of dy_j * y_j / k_j

W + s B A is never formed. The low-rank product joins the frozen one inside its sum (:mod:`m3kernels.ops._linear_hopper`) or,
where that kernel does not run, is written first and added to by cuBLAS (beta = 1): y is never read and written again. q, k
and v (or gate and up) share one pass over x for t, and one dx. fp32 adapters beside 16-bit activations keep their
precision (:mod:`m3kernels.ops._lora_kernels`). Dropout's mask is made anew in the backward from a seed on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._common import cdiv, fused_op, use_triton

MOST = 3  # projections of one input


@dataclass(frozen=True)
class Adapted:
    """One linear layer and its adapter: weight (N, K), A (R, K), B (N, R), scaling, and DoRA's scale (N,) or None."""

    weight: Tensor
    A: Tensor
    B: Tensor
    scaling: float = 1.0
    scale: Tensor | None = None


def _hopper():
    """The module of the Gluon kernel, or None where its Triton is another one."""
    from m3kernels.ops._attention_backends import _hopper_missing

    if not torch.cuda.is_available() or _hopper_missing(torch.device("cuda", torch.cuda.current_device())):
        return None
    from m3kernels.ops import _linear_hopper

    return _linear_hopper


def _product(a: Tensor, weight: Tensor, t: Tensor, low: Tensor, across: bool, scale: Tensor | None = None) -> Tensor:
    """scale * (a b + t l), b being ``weight`` (N, K) transposed or, ``across``, (K, N) as it lies; ``low`` likewise."""
    kernel = _hopper() if a.is_cuda else None
    if kernel is not None and not kernel.cannot(a, weight, t, low, across):
        return kernel.linear_low_rank(a, weight, t, low, across=across, scale=scale)
    out = torch.mm(t, low if across else low.T)
    out.addmm_(a, weight if across else weight.T)
    return out if scale is None else out.mul_(scale)


def _layout(x: Tensor, a: Tensor) -> tuple[bool, int, int, int]:
    """(split, rank, columns of one projection's parts, the same with its padding to 16 bytes)."""
    split = a.dtype == torch.float32 and x.dtype != torch.float32
    width = a.shape[0] * (3 if split else 1)
    return split, a.shape[0], width, cdiv(width, 8) * 8


def _buffer(like: Tensor, *size: int, padded: bool) -> Tensor:
    # what lies between the parts is multiplied with other padding: it must be finite
    return (torch.zeros if padded else torch.empty)(size, dtype=like.dtype, device=like.device)


def _low_of(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s B as parts (N, parts), rows at 16-byte marks; ``a`` is the adapter's A."""
    split, rank, width, padded = _layout(x, a)
    low = _buffer(x, b.shape[0], padded, padded=False)[:, :width]
    skinny.as_parts(b, low, rank, scaling, split)
    return low


def _a_parts(x: Tensor, many: list[Tensor]) -> Tensor:
    """All A as parts, one projection below the other: (count * padded, K)."""
    split, rank, width, padded = _layout(x, many[0])
    parts = _buffer(x, len(many) * padded, x.shape[1], padded=padded != width)
    for j, a in enumerate(many):
        skinny.as_parts(a, parts[j * padded :], rank * x.shape[1], 1.0, split)
    return parts


def _given(*options: Tensor | None) -> list[Tensor]:
    return [t for t in options if t is not None]


def _forward(
    x: Tensor,
    w1: Tensor,
    a1: Tensor,
    b1: Tensor,
    w2: Tensor | None,
    a2: Tensor | None,
    b2: Tensor | None,
    w3: Tensor | None,
    a3: Tensor | None,
    b3: Tensor | None,
    k1: Tensor | None,
    k2: Tensor | None,
    k3: Tensor | None,
    seeds: Tensor | None,
    scalings: list[float],
    dropout: float,
) -> list[Tensor]:
    """[y of each projection, t of all, A's parts, s B's parts of each, z of each in fp16]; what follows y is for the backward."""
    weights, many_a, many_b = _given(w1, w2, w3), _given(a1, a2, a3), _given(b1, b2, b3)
    split, rank, width, padded = _layout(x, a1)
    a = _a_parts(x, many_a)
    t = _buffer(x, x.shape[0], len(weights) * padded, padded=padded != width)
    skinny.shrink(x, a, t, rank, len(weights), padded, split, dropout, seeds)
    lows = [_low_of(x, a1, b, s) for b, s in zip(many_b, scalings)]
    parts = [t[:, j * padded : j * padded + width] for j in range(len(weights))]
    if k1 is None or x.dtype != torch.float16:
        ys = [_product(x, w, p, low, False, k) for w, p, low, k in zip(weights, parts, lows, (k1, k2, k3))]
        return [*ys, t, a, *lows]
    # dk is taken from y / k, for which fp16 has too few exponents: what is scaled is kept
    zs = [_product(x, w, p, low, False) for w, p, low in zip(weights, parts, lows)]
    return [*((z * k).to(z.dtype) for z, k in zip(zs, _given(k1, k2, k3))), t, a, *lows, *zs]


def _forward_fake(x, w1, a1, b1, w2, a2, b2, w3, a3, b3, k1, k2, k3, seeds, scalings, dropout):
    weights, many_b = _given(w1, w2, w3), _given(b1, b2, b3)
    _, _, width, padded = _layout(x, a1)
    rows, empty = x.shape[0], lambda *size: x.new_empty(size)
    ys = [empty(rows, w.shape[0]) for w in weights]
    lows = [x.new_empty_strided((b.shape[0], width), (padded, 1)) for b in many_b]
    zs = [empty(rows, w.shape[0]) for w in weights] if k1 is not None and x.dtype == torch.float16 else []
    return [*ys, empty(rows, len(weights) * padded), empty(len(weights) * padded, x.shape[1]), *lows, *zs]


def _backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    ys: list[Tensor],
    scales: list[Tensor],
    t: Tensor,
    a: Tensor,
    lows: list[Tensor],
    seeds: Tensor | None,
    adapters_like: Tensor,
    scalings: list[float],
    dropout: float,
    need_x: bool,
    need_weights: bool,
    need_adapters: bool,
) -> list[Tensor]:
    """[dx, then for each projection dW, dA, dB, dk]; what is not needed is empty.

    ``lows``: s B as parts. With DoRA it is B itself, and ``ys`` and ``scales`` are not empty.
    """
    split, rank, width, padded = _layout(x, adapters_like)
    count, none = len(weights), x.new_empty(0)
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
    du = _buffer(x, x.shape[0], count * padded, padded=padded != width)
    parts = [du[:, j * padded : j * padded + width] for j in range(count)]
    das = [adapters_like.new_empty((rank, x.shape[1])) for _ in weights]
    dbs = [adapters_like.new_empty((w.shape[0], rank)) for w in weights]
    dscales = [none] * count
    for j in range(count):
        t_j = t[:, j * padded : j * padded + width]
        low = lows[j]
        if scales:  # with B, so that dy is not rounded once more
            low = _low_of(x, adapters_like, low.float() * scales[j][:, None], scalings[j])
        skinny.du_and_db(dys[j], low, t_j, parts[j], rank, scalings[j], split, dbs[j])
        if need_adapters:
            skinny.da_of(x, parts[j], rank, split, dropout, None if seeds is None else seeds[j:], das[j])
        if scales:
            dbs[j].mul_(scales[j][:, None])
            dys[j], total = skinny.dora_grads(dys[j], ys[j], scales[j])
            # fp16 kept z = y / k
            dscales[j] = total if x.dtype == torch.float16 else total / scales[j]
    dx = _input_gradient(dys, weights, du, parts, a, seeds, width, padded, dropout) if need_x else none
    dws = [dy.T @ x for dy in dys] if need_weights else [none] * count
    return [dx, *(g for four in zip(dws, das, dbs, dscales) for g in four)]


def _input_gradient(dys, weights, du, parts, a, seeds, width: int, padded: int, dropout: float) -> Tensor:
    if not dropout:
        dx = _product(dys[0], weights[0], du, a[: du.shape[1]], True)
        first = 1
    else:
        dx, first = du.new_empty((du.shape[0], a.shape[1])), 0
        for j, part in enumerate(parts):
            skinny.expand(part, a[j * padded : j * padded + width], dx, j > 0, dropout, seeds[j:])
    for dy, w in zip(dys[first:], weights[first:]):
        dx.addmm_(dy, w)
    return dx


def _backward_fake(
    dys, x, weights, ys, scales, t, a, lows, seeds, like, scalings, dropout, need_x, need_weights, need_ad
):
    none, rank = x.new_empty(0), like.shape[0]
    found = [torch.empty_like(x) if need_x else none]
    for w in weights:
        dk = w.new_empty(w.shape[0], dtype=torch.float32) if scales else none
        dw = w.new_empty(w.shape) if need_weights else none
        found += [dw, like.new_empty((rank, x.shape[1])), like.new_empty((w.shape[0], rank)), dk]
    return found


def _setup_context(ctx, inputs, output):
    x, *triples = inputs[:10]
    weights, scales = _given(*triples[::3]), _given(*inputs[10:13])
    seeds, ctx.scalings, ctx.dropout = inputs[13:]
    ctx.count = count = len(weights)
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(*output[count:])
    ctx.with_seeds, ctx.with_scales = seeds is not None, bool(scales)
    kept = [*(output[2 * count + 2 :] or output[:count]), *scales] if scales else []
    # needs_input_grad says nothing yet where torch.library sets up
    lows = _given(*triples[2::3]) if scales else output[count + 2 : 2 * count + 2]
    ctx.save_for_backward(x, triples[1], *weights, *output[count : count + 2], *lows, *kept, *_given(seeds))


def _gradients(ctx, run_backward, *grads):
    count = ctx.count
    x, like, *rest = ctx.saved_tensors
    weights, (t, a), rest = rest[:count], rest[count : count + 2], rest[count + 2 :]
    lows, rest = rest[:count], rest[count:]
    ys, scales = (rest[:count], rest[count : 2 * count]) if ctx.with_scales else ([], [])
    seeds = rest[-1] if ctx.with_seeds else None
    needs = ctx.needs_input_grad
    dx, *found = run_backward(
        *(list(grads[:count]), x, weights, list(ys), list(scales), t, a, lows, seeds, like, ctx.scalings, ctx.dropout),
        *(needs[0], any(needs[1:10:3]), any(needs[2:10:3]) or any(needs[3:10:3])),
    )
    fours = [found[4 * j : 4 * j + 4] for j in range(count)] + [(None,) * 4] * (MOST - count)
    triples = [g for four in fours for g in four[:3]]
    scaled = [four[3] for four in fours]
    wanted = zip((dx, *triples, *scaled), needs)
    return *(g if needed and g is not None else None for g, needed in wanted), None, None, None


_lora = fused_op(
    "lora_linear",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def lora_linear_reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, bias: Tensor | None = None, *,
    scale: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Plain PyTorch with PEFT's casts and order; ``scale`` is DoRA's. Dropout draws from torch's generator."""
    y = F.linear(x, weight)
    low = F.linear(F.linear(F.dropout(x.to(A.dtype), dropout_p), A), B) * scaling
    if scale is not None:
        y, low = y * scale, low * scale
    y = (y + low).to(y.dtype if scale is None else x.dtype)
    return y if bias is None else y + bias


def lora_linears(
    x: Tensor, layers: Sequence[Adapted], *, dropout_p: float = 0.0, backend: str = "auto"
) -> list[Tensor]:
    """Several layers of one input: one pass over x for all A, one gradient of x.

    Args:
        x: (..., K) in fp32, bf16 or fp16.
        layers: 1 to 3, of one rank; each with weight (N, K) of x's dtype and A, B of x's dtype or fp32.
        dropout_p: of x before every A, each layer with a mask of its own; drawn from the device's generator.
        backend: "auto", "triton" or "reference".

    Returns:
        y of each layer, (..., N). Differentiable once in x, weights, A, B and scales; what needs no gradient costs none.

    Raises:
        ValueError: shapes, dtypes or ranks that do not fit; a rank over 512; a dropout outside [0, 1).
        TypeError: not floating point, or DTensors.
    """
    layers = list(layers)
    _check(x, layers, dropout_p)
    tensors = [t for layer in layers for t in (layer.weight, layer.A, layer.B)]
    if not use_triton("lora_linear", backend, x, *tensors, inductor_fuses=True):
        options = [{"scale": layer.scale, "dropout_p": dropout_p} for layer in layers]
        return [lora_linear_reference(x, p.weight, p.A, p.B, p.scaling, **o) for p, o in zip(layers, options)]
    if x.numel() == 0:
        return [lora_linear_reference(x, p.weight, p.A, p.B, p.scaling, scale=p.scale) for p in layers]
    seeds = torch.randint(2**62, (len(layers),), device=x.device) if dropout_p else None
    missing = MOST - len(layers)
    flat = [t for layer in layers for t in (layer.weight, layer.A, layer.B)] + [None] * (3 * missing)
    scales = [None if p.scale is None else p.scale.float().contiguous() for p in layers] + [None] * missing
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    outputs = _lora(rows, *flat, *scales, seeds, [float(p.scaling) for p in layers], float(dropout_p))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(layers)]]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``x W^T + scaling * drop(x) A^T B^T + bias``: see :func:`lora_linears`."""
    (y,) = lora_linears(x, [Adapted(weight, A, B, scaling)], dropout_p=dropout_p, backend=backend)
    return y if bias is None else y + bias


def _check(x: Tensor, layers: list[Adapted], dropout_p: float) -> None:
    if not 1 <= len(layers) <= MOST:
        raise ValueError(f"lora_linear: takes 1 to {MOST} layers of one input, got {len(layers)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must be in [0, 1), got {dropout_p}")
    first = layers[0].A
    for layer in layers:
        w, a, b = layer.weight, layer.A, layer.B
        shapes = f"got x {tuple(x.shape)}, weight {tuple(w.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"
        if not w.dim() == a.dim() == b.dim() == 2 or x.dim() == 0:
            raise ValueError(f"lora_linear: needs x (..., K), weight (N, K), A (R, K), B (N, R), {shapes}")
        if not (x.shape[-1] == w.shape[1] == a.shape[1] and w.shape[0] == b.shape[0] and a.shape[0] == b.shape[1]):
            raise ValueError(f"lora_linear: needs x (..., K), weight (N, K), A (R, K), B (N, R), {shapes}")
        if not 1 <= a.shape[0] <= skinny.MAX_RANK:
            raise ValueError(f"lora_linear: a rank from 1 to {skinny.MAX_RANK}, {shapes}")
        if a.shape[0] != first.shape[0] or a.dtype != first.dtype or b.dtype != first.dtype:
            raise ValueError(f"lora_linear: layers of one input need adapters of one rank and dtype, {shapes}")
        if w.dtype != x.dtype or a.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"lora_linear: weight must have x's dtype, and A and B that or fp32, got x {x.dtype}, weight {w.dtype}, "
                f"A {a.dtype}"
            )
        if layer.scale is not None and layer.scale.shape != w.shape[:1]:
            raise ValueError(f"lora_linear: scale must be (N,), got {tuple(layer.scale.shape)}, {shapes}")
        if (layer.scale is None) != (layers[0].scale is None):
            raise ValueError("lora_linear: either all layers of one input have a DoRA scale, or none")
