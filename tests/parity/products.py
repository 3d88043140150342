"""Cases of the ops around matrix products: attention, and linear layers with adapters."""

import torch

from m3kernels import ops
from m3kernels.parity.case import OpCase, randn


def _make_attention(shape, dtype, generator):
    batch, heads, kv_heads, queries, keys, dim = shape
    sizes = {"q": (heads, queries), "k": (kv_heads, keys), "v": (kv_heads, keys)}
    return {
        name: randn(batch, rows, n, dim, dtype=dtype, generator=generator).transpose(1, 2)
        for name, (n, rows) in sizes.items()
    }


def _attention(**options):
    return lambda q, k, v: (ops.attention(q, k, v, **options),)


ATTENTION = OpCase(
    name="attention (causal)",
    make=_make_attention,
    wrt=("q", "k", "v"),
    outputs=("out",),
    ours=_attention(),
    eager=lambda q, k, v: (ops.attention_reference(q, k, v)[0],),
    small=((1, 4, 2, 70, 70, 64), (2, 4, 1, 40, 75, 32)),
    real=((2, 8, 2, 2048, 2048, 128), (1, 16, 4, 1001, 1300, 128)),
    wrong={
        "not causal": _attention(causal=False),
        "scale dropped": _attention(scale=1.0),
        "window where there is none": _attention(window=30),
        "key heads in another order": lambda q, k, v: (ops.attention(q, k.flip(1), v),),
    },
)

WINDOW = OpCase(
    name="attention (window)",
    make=_make_attention,
    wrt=("q", "k", "v"),
    outputs=("out",),
    ours=_attention(window=33),
    eager=lambda q, k, v: (ops.attention_reference(q, k, v, window=33)[0],),
    small=((1, 4, 2, 70, 70, 64),),
    real=((2, 8, 2, 2048, 2048, 128),),
    wrong={
        "window one key wider": _attention(window=34),
        "no window": _attention(),
        "last key's gradient missing": lambda q, k, v: (
            ops.attention(q, torch.cat([k[:, :, :-1], k[:, :, -1:].detach()], dim=2), v, window=33),
        ),
    },
)


def _make_lora(shape, dtype, generator):
    rows, width, out, rank = shape[:4]
    return {
        "x": randn(rows, width, dtype=dtype, generator=generator),
        "weight": randn(out, width, dtype=dtype, generator=generator) * width**-0.5,
        "A": randn(rank, width, dtype=dtype, generator=generator) * width**-0.5,
        "B": randn(out, rank, dtype=dtype, generator=generator) * rank**-0.5,
    }


def _make_dora(shape, dtype, generator):
    magnitude = 1 + 0.3 * randn(shape[2], dtype=dtype, generator=generator)
    return _make_lora(shape, dtype, generator) | {"magnitude": magnitude}


LORA_SHAPES = {
    "small": ((37, 48, 40, 4), (20, 33, 70, 5)),
    "real": ((2048, 3072, 4096, 16), (2048, 3072, 1024, 64), (1111, 4096, 3080, 20), (777, 1024, 1000, 512)),
}

LORA = OpCase(
    name="lora_linear",
    make=_make_lora,
    wrt=("x", "weight", "A", "B"),
    outputs=("y",),
    ours=lambda x, weight, A, B: (ops.lora_linear(x, weight, A, B, 0.75),),
    eager=lambda x, weight, A, B: (ops.lora_linear_reference(x, weight, A, B, 0.75),),
    **LORA_SHAPES,
    wrong={
        "scaling twice": lambda x, weight, A, B: (ops.lora_linear(x, weight, A, B, 0.75**2),),
        "one row of B shifted": lambda x, weight, A, B: (ops.lora_linear(x, weight, A, B.roll(1, 0), 0.75),),
        "gradient of x misses the adapter": lambda x, weight, A, B: (
            ops.lora_linear(x, weight, A, 0 * B, 0.75) + ops.lora_linear(x.detach(), 0 * weight, A, B, 0.75),
        ),
        "adapter dropped": lambda x, weight, A, B: (ops.lora_linear(x, weight, A, B, 0.0),),
    },
)

DORA = OpCase(
    name="dora_linear",
    make=_make_dora,
    wrt=("x", "A", "B", "magnitude"),
    outputs=("y",),
    ours=lambda x, weight, A, B, magnitude: (ops.dora_linear(x, weight, A, B, magnitude, 0.75),),
    eager=lambda x, weight, A, B, magnitude: (ops.dora_linear_reference(x, weight, A, B, magnitude, 0.75),),
    **LORA_SHAPES,
    wrong={
        "norm of the frozen weight": lambda x, weight, A, B, magnitude: (
            ops.dora_linear(
                *(x, weight, A, B),
                magnitude * (ops.dora_norm(weight, A, B, 0.75) / weight.norm(dim=1)).detach().to(magnitude.dtype),
                0.75,
            ),
        ),
        "norm not detached": lambda x, weight, A, B, magnitude: (
            ops.dora_linear(x, weight, A, B, magnitude, 0.75)
            * (n := torch.linalg.norm(weight + 0.75 * B @ A, dim=1)).detach()
            / n,
        ),
        "magnitude shifted": lambda x, weight, A, B, magnitude: (
            ops.dora_linear(x, weight, A, B, magnitude.roll(1), 0.75),
        ),
        "scaling in the norm alone": lambda x, weight, A, B, magnitude: (
            ops.dora_linear(
                *(x, weight, A, B),
                magnitude * (ops.dora_norm(weight, A, B, 1.0) / ops.dora_norm(weight, A, B, 0.75)).to(magnitude.dtype),
                1.0,
            ),
        ),
    },
)


def _make_fp8(blocks):
    def make(shape, dtype, generator):
        rows, width, out = shape
        weight = randn(out, width, dtype=torch.float32, generator=generator)
        sizes = (-(-out // 128), -(-width // 128)) if blocks else ()
        # no power of two: rounding it would show
        scale = torch.rand(sizes, generator=generator, device=generator.device) * 0.01 + 0.003
        x = randn(rows, width, dtype=dtype, generator=generator)
        return {"x": x, "weight": (weight * 8).to(torch.float8_e4m3fn), "scale": scale}

    return make


def _fp8(change=lambda scale: scale, block_size=None):
    """The op with its scale changed on the way."""

    def run(x, weight, scale):
        dense = ops.fp8_dequantize(weight, change(scale), block_size=block_size, dtype=x.dtype)
        return dense, ops.fp8_linear(x, weight, change(scale), block_size=block_size)

    return run


def _fp8_eager(block_size=None):
    def run(x, weight, scale):
        dense = ops.fp8_dequantize_reference(weight, scale, block_size, x.dtype)
        return dense, x @ dense.T

    return run


FP8_SHAPES = {
    "small": ((20, 300, 200), (7, 256, 128), (5, 130, 257)),
    "real": ((2048, 3072, 4096), (1111, 9216, 3072), (777, 4096, 1000)),
}

FP8 = OpCase(
    name="fp8_linear",
    make=_make_fp8(blocks=False),
    wrt=("x",),
    outputs=("weight", "y"),
    ours=_fp8(),
    eager=_fp8_eager(),
    **FP8_SHAPES,
    wrong={
        "scale forgotten": _fp8(torch.ones_like),
        "scale rounded to bf16 first": _fp8(lambda scale: scale.bfloat16().float()),
        "divided by the scale": _fp8(torch.reciprocal),
        "scale missing in the backward": lambda x, weight, scale: (
            _fp8()(x, weight, scale)[0],
            ops.fp8_linear(x.detach(), weight, scale)
            + (y := ops.fp8_linear(x, weight, torch.ones_like(scale)))
            - y.detach(),
        ),
    },
)

BLOCK = (128, 128)
FP8_BLOCKS = OpCase(
    name="fp8_linear (128 x 128 blocks)",
    make=_make_fp8(blocks=True),
    wrt=("x",),
    outputs=("weight", "y"),
    ours=_fp8(block_size=BLOCK),
    eager=_fp8_eager(BLOCK),
    **FP8_SHAPES,
    wrong={
        "scale forgotten": _fp8(torch.ones_like, BLOCK),
        "scale rounded to bf16 first": _fp8(lambda scale: scale.bfloat16().float(), BLOCK),
        "scales of the transposed blocks": _fp8(lambda scale: scale.T.reshape(scale.shape), BLOCK),
        "one scale for all": _fp8(lambda scale: scale.mean().expand_as(scale), BLOCK),
    },
)
