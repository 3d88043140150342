"""The decode ops as cases: a few rows against weights, with what goes before and comes after in the same launch."""

from functools import partial

import torch

from m3kernels import ops
from m3kernels.parity.case import OpCase, randn

EPS = 1e-5


def _chains(shape, dtype, numel):
    """In fp32 the order of a sum decides, and all of an output's have one: a thread adds one after the other, BLAS does not."""
    return 1 if dtype == torch.float32 else numel


def _make_linear(shape, dtype, generator):
    rows, width, outputs = shape
    make = partial(randn, dtype=dtype, generator=generator)
    # one row is small enough for eps to matter; in a residual stream rows differ by orders of magnitude
    size = 10.0 ** (-3.0 * (torch.arange(rows, device=generator.device) % 2))[:, None]
    return {
        "x": (make(rows, width).float() * size).to(dtype),
        "weight": make(outputs, width) / width**0.5,
        "gain": make(width),
        "residual": make(rows, outputs),
    }


def _linear(norm=True, added=True, change=lambda x: x):
    def run(x, weight, gain, residual):
        options = {"norm_weight": gain if norm else None, "residual": residual if added else None, "eps": EPS}
        return ops.decode_linear(change(x), weight, **options), ops.decode_linear(x, change(weight))

    return run


def _linear_eager(x, weight, gain, residual):
    options = {"norm_weight": gain, "residual": residual, "eps": EPS}
    return ops.decode_linear_reference(x, weight, **options), ops.decode_linear_reference(x, weight)


ROWS = {
    "small": ((1, 96, 33), (3, 130, 40), (17, 64, 20), (65, 32, 8)),
    "real": ((1, 4096, 3072), (1, 9216, 3072), (2, 5120, 1111), (16, 14336, 4096), (64, 3072, 6144), (1, 3072, 131072)),
}

DECODE_LINEAR = OpCase(
    name="decode_linear",
    make=_make_linear,
    wrt=(),
    independent=_chains,
    outputs=("y", "y without norm and residual"),
    ours=_linear(),
    eager=_linear_eager,
    **ROWS,
    wrong={
        "norm forgotten": _linear(norm=False),
        "residual forgotten": _linear(added=False),
        "eps dropped": lambda x, weight, gain, residual: (
            ops.decode_linear(x, weight, norm_weight=gain, eps=0.0, residual=residual),
            ops.decode_linear(x, weight),
        ),
        "columns shifted by one": _linear(change=lambda x: x.roll(1, -1)),
    },
)


def _make_swiglu(shape, dtype, generator):
    inputs = _make_linear(shape, dtype, generator)
    up = randn(*inputs["weight"].shape, dtype=dtype, generator=generator) / shape[1] ** 0.5
    return {"x": inputs["x"], "gate": inputs["weight"], "up": up, "gain": inputs["gain"]}


def _swiglu(x, gate, up, gain, eps=EPS):
    return (ops.decode_swiglu(x, gate, up, norm_weight=gain, eps=eps),)


DECODE_SWIGLU = OpCase(
    name="decode_swiglu",
    make=_make_swiglu,
    wrt=(),
    independent=_chains,
    outputs=("h",),
    ours=_swiglu,
    eager=lambda x, gate, up, gain: (ops.decode_swiglu_reference(x, gate, up, norm_weight=gain, eps=EPS),),
    small=((2, 96, 33), (3, 130, 40), (17, 64, 20)),
    real=((1, 3072, 9216), (1, 5120, 16384), (16, 4096, 14336), (64, 3072, 9216), (3, 3072, 1111)),
    wrong={
        "up first": lambda x, gate, up, gain: _swiglu(x, up, gate, gain),
        "eps dropped": partial(_swiglu, eps=0.0),
        "norm forgotten": lambda x, gate, up, gain: _swiglu(x, gate, up, None),
    },
)


def _make_qkv(shape, dtype, generator):
    rows, width, heads, groups, head_dim = shape
    inputs = _make_linear((rows, width, (heads + 2 * groups) * head_dim), dtype, generator)
    positions = torch.arange(rows, device=generator.device) * 7 + 3
    inv_freq = 1 / 500 ** (torch.arange(0, head_dim, 2, device=generator.device) / head_dim)
    sizes = [n * head_dim for n in (heads, groups, groups)]
    q, k, v = inputs["weight"].split(sizes)
    return {
        "x": inputs["x"],
        **{"q": q, "k": k, "v": v, "gain": inputs["gain"]},
        "table": ops.rotary_table(inv_freq, positions),
        "positions": positions,
        "head_dim": head_dim,
    }


LLAMA4 = (0.3, 4)


def _qkv(function, x, q, k, v, gain, table, positions, head_dim, llama4=LLAMA4, shift=0):
    """q; k and v as they lie in caches, each row at a slot of its own, and as they come back without."""
    norm = {"norm_weight": gain, "eps": EPS, "llama4": llama4}
    heads = {"head_dim": head_dim, "table": table, "positions": positions}
    rows, groups = x.shape[0], k.shape[0] // head_dim
    slots = (torch.arange(rows, device=x.device) * 5 + 1) % 6
    caches = [x.new_zeros(rows + 1, groups, 6, head_dim) for _ in "kv"]
    queries, *_ = function(x, q, k, v, **heads, **norm, caches=caches, slots=(slots + shift) % 6)
    alone, keys, values = function(x, q, k, v, **heads, **norm)
    return queries, *caches, alone, keys, values


DECODE_QKV = OpCase(
    name="decode_qkv",
    make=_make_qkv,
    wrt=(),
    independent=_chains,
    outputs=("q", "k in the cache", "v in the cache", "q without one", "k", "v"),
    ours=partial(_qkv, ops.decode_qkv),
    eager=partial(_qkv, ops.decode_qkv_reference),
    small=((2, 96, 4, 2, 16), (1, 130, 3, 1, 24), (17, 64, 2, 2, 8)),
    real=((1, 3072, 32, 8, 128), (16, 3072, 32, 8, 128), (64, 4096, 32, 8, 128), (3, 5120, 4, 1, 80)),
    wrong={
        "query scale dropped": partial(_qkv, ops.decode_qkv, llama4=None),
        "written a slot too far": partial(_qkv, ops.decode_qkv, shift=1),
        "k and v exchanged": lambda x, q, k, v, **rest: _qkv(ops.decode_qkv, x, q, v, k, **rest),
        "sine negated": lambda table, **rest: _qkv(
            ops.decode_qkv, table=torch.cat([table.chunk(2, -1)[0], -table.chunk(2, -1)[1]], -1), **rest
        ),
    },
)
