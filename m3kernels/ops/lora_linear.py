"""Linear layers with low-rank adapters, one or several of one input: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

    y_j = k_j * (x W_j^T + s_j drop_j(x) A_j^T B_j^T)            k_j = m_j / |W_j + s_j B_j A_j| by rows, or 1 without DoRA

    t_j = drop_j(x) A_j^T
    dz_j = k_j * dy_j        du_j = s_j dz_j B_j        dB_j = s_j dz_j^T t_j        dA_j = du_j^T drop_j(x)
    dx = sum_j dz_j W_j + drop_j'(du_j A_j)             dm_j = sum over rows of dy_j * y_j / m_j, the norm being a constant

W + s B A is never formed. The low-rank product joins the frozen one inside its sum (:mod:`m3kernels.ops._linear_hopper`) or,
where that kernel does not run, is written first and added to by cuBLAS (beta = 1): y is never read and written again. q, k
and v (or gate and up) share one pass over x for t and one for dA, and one dx. fp32 adapters beside 16-bit activations keep
their precision (:mod:`m3kernels.ops._lora_kernels`). Dropout's mask is made anew in the backward from a seed on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops import _lora_sums as adding_up
from m3kernels.ops._common import fused_op, rows_of, use_triton
from m3kernels.ops._dora_scale import scales_from
from m3kernels.ops._lora_launch import MOST, Layout
from m3kernels.ops._lora_products import input_gradient, lets_begin, of_adapters, one_pass, project, t_and_low
from m3kernels.ops.fp8_dequantize import WHOLE, check_fp8, fp8_dequantize_reference, fp32_scale
from m3kernels.ops.fp8_linear import dense


@dataclass(frozen=True)
class Adapted:
    """One linear layer and its adapter: weight (N, K), A (R, K), B (N, R), scaling, and DoRA's magnitude (N,) or None.

    A weight in FP8 comes with its ``weight_scale`` and ``block_size``, as :func:`m3kernels.ops.fp8_dequantize` takes them.
    ``norm`` (N,) is that of DoRA's rows where the weight has only some of their columns; computed from the weight if None.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    scaling: float = 1.0
    magnitude: Tensor | None = None
    weight_scale: Tensor | None = None
    block_size: tuple[int, int] | None = None
    norm: Tensor | None = None


def _given(*options: Tensor | None) -> list[Tensor]:
    return [t for t in options if t is not None]


def _dense(weights: list[Tensor], fp8_scales: list[Tensor], blocks: list[int], dtype: torch.dtype) -> list[Tensor]:
    """The weights with those in FP8 dequantised; ``blocks``: rows and columns of each one's blocks, 0 where it is not FP8."""
    scales = iter(fp8_scales)
    sizes = zip(weights, blocks[::2], blocks[1::2])
    return [dense(w, next(scales), rows, columns, dtype) if rows else w for w, rows, columns in sizes]


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
    m1: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    f1: Tensor | None,
    f2: Tensor | None,
    f3: Tensor | None,
    given_norms: Tensor | None,
    seeds: Tensor | None,
    scalings: list[float],
    dropout: float,
    blocks: list[int],
) -> list[Tensor]:
    """f: scales of FP8 weights; given_norms: of DoRA's rows (N of all,), where they are known.

    [y of each projection, t of all], with DoRA [..., norms, scales], in fp16 [..., z of each]. What follows y is for the
    backward.
    """
    weights, many_a, many_b, magnitudes = (
        _given(*group) for group in ((w1, w2, w3), (a1, a2, a3), (b1, b2, b3), (m1, m2, m3))
    )
    shape, x = x.shape[:-1], rows_of(x)
    layout = Layout.of(x, a1, len(weights))
    weights = _dense(weights, _given(f1, f2, f3), blocks, x.dtype)
    unknown = magnitudes if given_norms is None else []
    begun = t_and_low(x, weights, many_a, many_b, scalings, unknown, layout, dropout, seeds)
    norms, scales = begun.norms, begun.scales
    if given_norms is not None:
        norms, scales = scales_from(given_norms, magnitudes)
    kept = [] if scales is None else [norms, scales]
    # in fp16 dm is taken from y / k, for which it has too few exponents: what is scaled is kept
    later = scales is not None and x.dtype == torch.float16
    ys = project(x, weights, begun, layout, None if later else scales, shape, dropout)
    if later:
        kept += ys
        ys = [(z * k).to(z.dtype) for z, k in zip(ys, scales.split([w.shape[0] for w in weights]))]
    return [*ys, begun.t, *kept]


def _forward_fake(
    x, w1, a1, b1, w2, a2, b2, w3, a3, b3, m1, m2, m3, f1, f2, f3, given_norms, seeds, scalings, dropout, blocks
):  # fmt: skip
    weights, layout = _given(w1, w2, w3), Layout.of(x, a1, len(_given(w1, w2, w3)))
    shape, total = x.shape[:-1], sum(w.shape[0] for w in weights)
    ys = [x.new_empty((*shape, w.shape[0])) for w in weights]
    found = [*ys, x.new_empty((layout.count * math.prod(shape), layout.padded))]
    if m1 is None:
        return found
    zs = [torch.empty_like(y) for y in ys] if x.dtype == torch.float16 else []
    return [*found, *(x.new_empty(total, dtype=torch.float32) for _ in range(2)), *zs]


def _backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    many_a: list[Tensor],
    many_b: list[Tensor],
    t: Tensor,
    outs: list[Tensor],
    norms: Tensor | None,
    scales: Tensor | None,
    seeds: Tensor | None,
    scalings: list[float],
    dropout: float,
    fp8_scales: list[Tensor],
    blocks: list[int],
    need_x: bool,
    need_weights: bool,
    need_adapters: bool,
    magnitudes: torch.dtype | None,
) -> list[Tensor]:
    """[dx, dA of all (count, R, K), dB of all (N of all, R)], then dW of each and dm of all where they are needed.

    What is not needed is empty. ``outs`` (y, or z in fp16), ``norms``, ``scales`` and the dtype of the magnitudes are DoRA's.
    """
    like, shape, x = many_a[0], x.shape, rows_of(x)
    layout, ns = Layout.of(x, like, len(weights)), [w.shape[0] for w in weights]
    dys = [rows_of(dy).contiguous() for dy in dys]
    dora = None
    if scales is not None:
        dora = adding_up.DoraGrads.like(dys, [rows_of(out) for out in outs], norms, scales, magnitudes)
    dzs = dora.dzs if dora else dys
    if need_x:
        weights = _dense(weights, fp8_scales, blocks, x.dtype)
    sums, adding, plan, work = adding_up.Sums.like(x, sum(ns), layout, like, need_adapters), None, None, None
    if need_adapters:
        plan = one_pass(dys, x, layout, many_b, scalings, dora is not None, dropout)
        # what else makes dA is launched after the product
        overlaps = need_x and not (plan and plan.makes_da) and lets_begin(dzs, weights, layout, dropout, plan)
        adding = adding_up.Adding.of(x, ns, layout, scalings, dora is not None, dropout, overlaps, like.dtype, plan)
    # DoRA's scale goes with B: dy is not rounded once more on its way to the adapters
    if plan:
        work = adding.work
        a = skinny.make_a(dys, many_a, many_b, layout, adding.counters)
        if dora:
            dora.make(adding.of_dora)
        # held until the product beside it has its memory
        du, read = of_adapters(plan, dys, x, t, many_b, scales, layout, *sums, work, adding.of_pass)
    else:
        if dora:
            dora.make(None)
        du, a = skinny.make_du(dys, many_a, many_b, scalings, layout, scales, adding and adding.counters)
    dx = input_gradient(dzs, weights, du, a, layout, dropout, seeds, shape, plan, work) if need_x else x.new_empty(0)
    if adding and not (plan and plan.makes_da):
        own = [] if plan else dys
        adding_up.adapter_gradients(adding, sums, own, x, t, du, layout, scalings, scales, seeds)
    return [dx, *sums, *(dz.T @ x for dz in dzs if need_weights), *([dora.dm] if dora else [])]


def _backward_fake(
    dys, x, weights, many_a, many_b, t, outs, norms, scales, seeds, scalings, dropout, fp8_scales, blocks, need_x, need_ws,
    need_adapters, magnitudes,
):  # fmt: skip
    like, rank = many_a[0], many_a[0].shape[0]
    total = sum(w.shape[0] for w in weights)
    sizes = ((len(weights), rank, x.shape[-1]), (total, rank)) if need_adapters else (0, 0)
    dws = [x.new_empty(w.shape) for w in weights] if need_ws else []
    dm = [] if scales is None else [x.new_empty(total, dtype=magnitudes)]
    return [x.new_empty(x.shape if need_x else 0), *(like.new_empty(size) for size in sizes), *dws, *dm]


def _setup_context(ctx, inputs, output):
    x, *triples = inputs[:10]
    weights, ctx.magnitudes = _given(*triples[::3]), None if inputs[10] is None else inputs[10].dtype
    seeds, ctx.scalings, ctx.dropout, ctx.blocks = inputs[17:]
    fp8_scales = _given(*inputs[13:16])
    ctx.count = count = len(weights)
    ctx.mark_non_differentiable(*output[count:])
    # zeros for t would be made in every backward
    ctx.set_materialize_grads(False)
    ctx.with_seeds, ctx.fp8 = seeds is not None, len(fp8_scales)
    t, *kept = output[count:]
    if kept:
        kept = [*kept[:2], *(kept[2:] or output[:count])]
    adapters = _given(*triples[1::3]), _given(*triples[2::3])
    ctx.save_for_backward(x, t, *weights, *adapters[0], *adapters[1], *kept, *fp8_scales, *_given(seeds))


def _gradients(ctx, run_backward, *grads):
    count, needs = ctx.count, ctx.needs_input_grad
    x, t, *rest = ctx.saved_tensors
    seeds = rest.pop() if ctx.with_seeds else None
    rest, fp8_scales = rest[: len(rest) - ctx.fp8], rest[len(rest) - ctx.fp8 :]
    weights, many_a, many_b = (rest[i * count : (i + 1) * count] for i in range(3))
    kept = rest[3 * count :]
    norms, scales, outs = (kept[0], kept[1], kept[2:]) if kept else (None, None, [])
    dys = [x.new_zeros((*x.shape[:-1], w.shape[0])) if dy is None else dy for dy, w in zip(grads, weights)]
    need_weights, need_adapters = any(needs[1:10:3]), any(needs[2:10:3]) or any(needs[3:10:3])
    dx, da, db, *found = run_backward(
        *(dys, x, weights, many_a, many_b, t, outs, norms, scales, seeds, ctx.scalings),
        *(ctx.dropout, fp8_scales, ctx.blocks, needs[0], need_weights, need_adapters, ctx.magnitudes),
    )
    nothing = [None] * MOST
    dws, dm = (found[:count], found[count:]) if need_weights else (nothing, found)
    ns = [w.shape[0] for w in weights]
    # views of one tensor: the op itself may not return two of the same memory
    das, dbs = (da.unbind(), db.split(ns)) if need_adapters else (nothing, nothing)
    flat = [dx, *(g for of_one in zip(dws, das, dbs) for g in of_one)]
    flat += [None] * (1 + 3 * MOST - len(flat))
    flat += [part for of_all in dm for part in of_all.split(ns)]
    return *(g if needed else None for g, needed in zip(flat, needs)), *[None] * (len(needs) - len(flat))


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
    dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Plain PyTorch with PEFT's casts and order. Dropout draws from torch's generator."""
    y = F.linear(x, weight)
    low = F.linear(F.linear(F.dropout(x.to(A.dtype), dropout_p), A), B)
    y = (y + low * scaling).to(y.dtype)
    return y if bias is None else y + bias


def dora_norm_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """(N,): the norm of each row of W + scaling B A, as PEFT computes it."""
    return torch.linalg.norm(weight.to(A.dtype) + scaling * (B @ A), dim=1)


def dora_linear_reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float = 1.0, bias: Tensor | None = None, *,
    norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain PyTorch with PEFT's casts and order; ``norm`` (N,) instead of that of the weight's own rows."""
    base = F.linear(x, weight)
    k = magnitude / (dora_norm_reference(weight.detach(), A.detach(), B.detach(), scaling) if norm is None else norm)
    low = F.linear(F.linear(x.to(A.dtype), A), B)
    y = (base + ((k - 1) * base + k * low * scaling)).to(base.dtype)
    return y if bias is None else y + bias


def _reference(x: Tensor, p: Adapted, dropout_p: float) -> Tensor:
    if p.weight_scale is not None:
        weight = fp8_dequantize_reference(p.weight.detach(), p.weight_scale.detach(), p.block_size, x.dtype)
        p = replace(p, weight=weight, weight_scale=None)
    if p.magnitude is None:
        return lora_linear_reference(x, p.weight, p.A, p.B, p.scaling, dropout_p=dropout_p)
    return dora_linear_reference(x, p.weight, p.A, p.B, p.magnitude, p.scaling, norm=p.norm)


def lora_linears(
    x: Tensor, layers: Sequence[Adapted], *, dropout_p: float = 0.0, stream: int = 0, backend: str = "auto"
) -> list[Tensor]:
    """Several layers of one input: one pass over x for all A, one gradient of x.

    Args:
        x: (..., K) in fp32, bf16 or fp16.
        layers: 1 to 3, of one rank; each with weight (N, K) of x's dtype and A, B of x's dtype or fp32. A weight in FP8 is
            frozen, dequantised for each product and not kept in x's dtype.
        dropout_p: of x before every A, each layer with a mask of its own; drawn from the device's generator. Not with DoRA.
        stream: ranks whose generators are equal draw other masks where this is another number.
        backend: "auto", "triton" or "reference".

    Returns:
        y of each layer, (..., N). Differentiable once in x, weights, A, B and magnitudes (not through DoRA's norm, as in PEFT);
        an x or weights that need no gradient cost none.

    Raises:
        ValueError: shapes, dtypes or ranks that do not fit; a rank over 512; a dropout outside [0, 1).
        TypeError: not floating point, or DTensors.
    """
    layers = list(layers)
    _check(x, layers, dropout_p)
    fp8_scales = [None if p.weight_scale is None else fp32_scale(p.weight_scale) for p in layers]
    tensors = [t for p, scale in zip(layers, fp8_scales) for t in (p.A, p.B, p.weight if scale is None else scale)]
    if not use_triton("lora_linear", backend, x, *tensors, inductor_fuses=True) or x.numel() == 0:
        return [_reference(x, p, dropout_p) for p in layers]
    seeds = torch.randint(2**62, (len(layers),), device=x.device) + stream if dropout_p else None
    missing = MOST - len(layers)
    weights = [p.weight if p.weight_scale is None else p.weight.detach() for p in layers]
    flat = [t for w, p in zip(weights, layers) for t in (w, p.A, p.B)] + [None] * (3 * missing)
    blocks = [n for p in layers for n in _block(p)]
    magnitudes = [p.magnitude for p in layers] + [None] * missing
    scalings = [float(p.scaling) for p in layers]
    fp8_scales += [None] * missing
    norms = None if layers[0].norm is None else torch.cat([p.norm.detach().float() for p in layers])
    outputs = _lora(x, *flat, *magnitudes, *fp8_scales, norms, seeds, scalings, float(dropout_p), blocks)
    return list(outputs[: len(layers)])


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


def _block(layer: Adapted) -> tuple[int, int]:
    if layer.weight_scale is None:
        return 0, 0
    return layer.block_size or (WHOLE, WHOLE)


def _shapes(x: Tensor, layer: Adapted) -> str:
    w, a, b = layer.weight, layer.A, layer.B
    return f"got x {tuple(x.shape)}, weight {tuple(w.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}"


def _check(x: Tensor, layers: list[Adapted], dropout_p: float) -> None:
    if not 1 <= len(layers) <= MOST:
        raise ValueError(f"lora_linear: takes 1 to {MOST} layers of one input, got {len(layers)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must be in [0, 1), got {dropout_p}")
    first = layers[0].A
    for layer in layers:
        w, a, b = layer.weight, layer.A, layer.B
        if not w.dim() == a.dim() == b.dim() == 2 or x.dim() == 0:
            raise ValueError(f"lora_linear: needs x (..., K), weight (N, K), A (R, K), B (N, R), {_shapes(x, layer)}")
        (n, k), (rank, width) = w.shape, a.shape
        if not (x.shape[-1] == k == width and b.shape == (n, rank)):
            raise ValueError(f"lora_linear: needs x (..., K), weight (N, K), A (R, K), B (N, R), {_shapes(x, layer)}")
        if not 1 <= rank <= skinny.MAX_RANK:
            raise ValueError(f"lora_linear: a rank from 1 to {skinny.MAX_RANK}, {_shapes(x, layer)}")
        if rank != first.shape[0] or a.dtype != first.dtype or b.dtype != first.dtype:
            raise ValueError(
                f"lora_linear: layers of one input need adapters of one rank and dtype, {_shapes(x, layer)}"
            )
        if layer.weight_scale is not None:
            check_fp8("lora_linear", w, layer.weight_scale, layer.block_size)
        if (layer.weight_scale is None and w.dtype != x.dtype) or a.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"lora_linear: weight must have x's dtype (or be FP8 with a weight_scale), and A and B x's dtype or fp32, "
                f"got x {x.dtype}, weight {w.dtype}, A {a.dtype}"
            )
        if (layer.magnitude is None) != (layers[0].magnitude is None):
            raise ValueError("lora_linear: either all layers of one input have a DoRA magnitude, or none")
        if (layer.norm is None) != (layers[0].norm is None) or (layer.norm is not None and layer.magnitude is None):
            raise ValueError("dora_linear: either all layers of one input bring their norms, or none; LoRA has none")
        if layer.magnitude is None:
            continue
        if layer.magnitude.shape != w.shape[:1] or layer.magnitude.dtype != layers[0].magnitude.dtype:
            raise ValueError(
                f"dora_linear: magnitudes must be (N,) of one dtype, got {tuple(layer.magnitude.shape)} "
                f"{layer.magnitude.dtype}, {_shapes(x, layer)}"
            )
        if layer.magnitude.device != x.device:
            raise ValueError(
                f"dora_linear: magnitude is on {layer.magnitude.device}, x on {x.device}; move it with .to()"
            )
        if layer.norm is not None and (layer.norm.shape != w.shape[:1] or layer.norm.device != x.device):
            raise ValueError(
                f"dora_linear: norms must be (N,) on {x.device}, got {tuple(layer.norm.shape)} on {layer.norm.device}, "
                f"{_shapes(x, layer)}"
            )
        if dropout_p:
            raise ValueError(
                "dora_linear: dropout under DoRA needs the frozen product of both inputs; leave it to PEFT"
            )
