"""Who is compared: for each op, one builder per peer.

A builder takes the case's shape and its inputs once and returns ``function(tensors) -> tuple of outputs``; whatever a
model computes once a forward and not once a layer (rotary tables) is made in the builder and is not timed. A builder
that cannot work raises; the reason is reported. Eager is the code of transformers' ``modeling_ministral3`` with its
rounding, written on bare tensors.
"""

import importlib
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch.nn import functional as F

from m3kernels.bench import adapters, attention, fp8
from m3kernels.bench.cases import EPS
from m3kernels.bench.spec import Shape, Tensors

OURS = "m3kernels"
ATTENTION = ("sdpa flash", "cudnn", "flex", "fa2", "fa3", "fa4")
ORDER = (
    "eager",
    "torch.compile",
    "liger",
    "torch",
    "quack",
    "cce",
    *ATTENTION,
    "peft",
    "peft+compile",
    "bf16 weight",
    OURS,
)
TITLES = {
    "torch": "F.rms_norm",
    "quack": "QuACK",
    "cce": "CCE",
    "liger": "Liger",
    "sdpa flash": "SDPA flash",
    "cudnn": "cuDNN",
    "flex": "FlexAttention",
    "fa2": "FA2",
    "fa3": "FA3",
    "fa4": "FA4",
    "peft": "PEFT",
    "peft+compile": "PEFT + compile",
}
# peer: (package, module)
PACKAGES = {
    "liger": ("liger-kernel", "liger_kernel"),
    "quack": ("quack-kernels", "quack"),
    "cce": ("cut-cross-entropy", "cut_cross_entropy"),
    "fa2": ("flash-attn", "flash_attn.flash_attn_interface"),
    "fa3": ("flash-attn-3", "flash_attn_interface"),
    "fa4": ("flash-attn-4", "flash_attn.cute"),
    "peft": ("peft", "peft"),
}

Function = Callable[[Tensors], tuple[Tensor, ...]]
Builder = Callable[[Shape, Tensors], Function]


def _hf_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + EPS)
    return weight * wide.to(x.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _hf_query_scale(positions: Tensor, llama4: tuple[float, int]) -> Tensor:
    beta, original_max = llama4
    return (1 + beta * torch.log(1 + torch.floor(positions / original_max)))[:, None, :, None]


def eager_rms_norm(shape: Shape, given: Tensors) -> Function:
    return lambda t: (_hf_rms_norm(t["x"], t["weight"]),)


def eager_add_rms_norm(shape: Shape, given: Tensors) -> Function:
    def function(t: Tensors) -> tuple[Tensor, Tensor]:
        summed = t["residual"] + t["x"]
        return _hf_rms_norm(summed, t["weight"]), summed

    return function


def eager_rotary(shape: Shape, given: Tensors) -> Function:
    def function(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = t["q"], t["k"], t["cos"].unsqueeze(1), t["sin"].unsqueeze(1)
        q_out = (q * cos) + (_rotate_half(q) * sin)
        k_out = (k * cos) + (_rotate_half(k) * sin)
        return q_out * _hf_query_scale(t["positions"], shape["llama4"]).to(q_out.dtype), k_out

    return function


def eager_swiglu(shape: Shape, given: Tensors) -> Function:
    return lambda t: (F.silu(t["gate"]) * t["up"],)


def eager_linear_cross_entropy(shape: Shape, given: Tensors) -> Function:
    return lambda t: (F.cross_entropy(F.linear(t["hidden"], t["weight"]).float(), t["labels"]),)


def compiled(builder: Builder, keep_graph: bool) -> Builder:
    """``torch.compile`` of an eager builder's function, one shape, no graph breaks.

    ``keep_graph``: the backward is timed alone and runs many times on one forward, which a backward with donated
    buffers refuses; turning them off costs memory, so it is done only there.
    """

    def build(shape: Shape, given: Tensors) -> Function:
        import torch._dynamo
        import torch._functorch.config as functorch_config

        torch._dynamo.reset()
        functorch_config.donated_buffer = not keep_graph
        return torch.compile(builder(shape, given), dynamic=False, fullgraph=True)

    return build


def torch_rms_norm(shape: Shape, given: Tensors) -> Function:
    return lambda t: (F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS),)


def torch_add_rms_norm(shape: Shape, given: Tensors) -> Function:
    def function(t: Tensors) -> tuple[Tensor, Tensor]:
        summed = t["residual"] + t["x"]
        return F.rms_norm(summed, t["weight"].shape, t["weight"], EPS), summed

    return function


def liger_rms_norm(shape: Shape, given: Tensors) -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm as rms_norm

    return lambda t: (rms_norm(t["x"], t["weight"], EPS),)


def liger_add_rms_norm(shape: Shape, given: Tensors) -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm as add_rms_norm

    return lambda t: add_rms_norm(t["x"], t["residual"], t["weight"], EPS)


def liger_rotary(shape: Shape, given: Tensors) -> Function:
    """Liger's rope, which works in place on q and k, with the query scale in eager: it has none of its own."""
    from liger_kernel.transformers.functional import liger_rope

    def function(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k = liger_rope(t["q"], t["k"], t["cos"], t["sin"])
        return q * _hf_query_scale(t["positions"], shape["llama4"]).to(q.dtype), k

    return function


def liger_swiglu(shape: Shape, given: Tensors) -> Function:
    from liger_kernel.transformers.functional import liger_swiglu as swiglu

    return lambda t: (swiglu(t["gate"], t["up"]),)


def liger_linear_cross_entropy(shape: Shape, given: Tensors) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as linear_cross_entropy

    return lambda t: (linear_cross_entropy(t["hidden"], t["weight"], t["labels"]),)


def cce_linear_cross_entropy(shape: Shape, given: Tensors) -> Function:
    """Defaults, gradient filter included: on random logits it skips nothing, on a trained model's it skips most."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda t: (linear_cross_entropy(t["hidden"], t["weight"], t["labels"]),)


def quack_rms_norm(shape: Shape, given: Tensors) -> Function:
    from quack import rmsnorm

    return lambda t: (rmsnorm(t["x"], t["weight"], eps=EPS),)


def quack_add_rms_norm(shape: Shape, given: Tensors) -> Function:
    from quack import rmsnorm

    return lambda t: tuple(rmsnorm(t["x"], t["weight"], residual=t["residual"], eps=EPS, prenorm=True))


def our_rms_norm(shape: Shape, given: Tensors) -> Function:
    from m3kernels.ops import rms_norm

    return lambda t: (rms_norm(t["x"], t["weight"], EPS),)


def our_add_rms_norm(shape: Shape, given: Tensors) -> Function:
    from m3kernels.ops import add_rms_norm

    return lambda t: add_rms_norm(t["x"], t["residual"], t["weight"], EPS)


def our_rotary(shape: Shape, given: Tensors) -> Function:
    from m3kernels.ops import rotary, rotary_table

    table = rotary_table(given["inv_freq"], given["positions"])
    return lambda t: rotary(t["q"], t["k"], table, t["positions"], llama4=shape["llama4"])


def our_swiglu(shape: Shape, given: Tensors) -> Function:
    from m3kernels.ops import swiglu

    return lambda t: (swiglu(t["gate"], t["up"]),)


def our_linear_cross_entropy(shape: Shape, given: Tensors) -> Function:
    from m3kernels.ops import linear_cross_entropy

    return lambda t: (linear_cross_entropy(t["hidden"], t["weight"], t["labels"]),)


PEERS: dict[str, dict[str, Builder]] = {
    "rms_norm": {
        "eager": eager_rms_norm,
        "torch.compile": compiled(eager_rms_norm, keep_graph=True),
        "liger": liger_rms_norm,
        "torch": torch_rms_norm,
        "quack": quack_rms_norm,
        OURS: our_rms_norm,
    },
    "add_rms_norm": {
        "eager": eager_add_rms_norm,
        "torch.compile": compiled(eager_add_rms_norm, keep_graph=True),
        "liger": liger_add_rms_norm,
        "torch": torch_add_rms_norm,
        "quack": quack_add_rms_norm,
        OURS: our_add_rms_norm,
    },
    "rotary": {
        "eager": eager_rotary,
        "torch.compile": compiled(eager_rotary, keep_graph=True),
        "liger": liger_rotary,
        OURS: our_rotary,
    },
    "swiglu": {
        "eager": eager_swiglu,
        "torch.compile": compiled(eager_swiglu, keep_graph=True),
        "liger": liger_swiglu,
        OURS: our_swiglu,
    },
    "linear_cross_entropy": {
        "eager": eager_linear_cross_entropy,
        "torch.compile": compiled(eager_linear_cross_entropy, keep_graph=False),
        "liger": liger_linear_cross_entropy,
        "cce": cce_linear_cross_entropy,
        OURS: our_linear_cross_entropy,
    },
    **attention.PEERS,
    **adapters.PEERS,
    **{op: found | {"torch.compile": compiled(fp8.eager, keep_graph=True)} for op, found in fp8.PEERS.items()},
}


def peer_versions() -> dict[str, str]:
    """Each peer package's version, or ``missing: <why>`` where it cannot be imported."""
    found = {}
    for peer, (package, module) in PACKAGES.items():
        try:
            importlib.import_module(module)
            found[peer] = metadata.version(package)
        except Exception as error:  # a package that is there and breaks at import is as missing as one that is not
            found[peer] = f"missing: {type(error).__name__}: {error}"
    return found
