"""Causal grouped-query attention in the op benchmark.

Inputs are (batch, heads, seq, head_dim) views of (batch, seq, heads, head_dim) memory, as the model's projections give them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from m3kernels.bench.spec import BOTH, Case, Cost, Op, Shape, Tensors, randn


def inputs(shape: Shape, device, g) -> Tensors:
    def heads(n: int) -> Tensor:
        return randn((shape["batch"], shape["seq"], n, shape["head_dim"]), device, g).transpose(1, 2)

    return {"q": heads(shape["heads"]), "k": heads(shape["kv_heads"]), "v": heads(shape["kv_heads"])}


def _one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (..., seq, dim) in q's dtype with the softmax in fp32 at least, as transformers' eager does."""
    seq = q.shape[-2]
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    above = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(above, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v


def reference(shape: Shape, t: Tensors, grads: Tensors) -> Tensors:
    """fp64, one query head at a time: all scores of all heads would not fit."""
    group = shape["heads"] // shape["kv_heads"]
    out, dq = torch.empty_like(t["q"], dtype=torch.float64), torch.empty_like(t["q"], dtype=torch.float64)
    dk, dv = torch.zeros_like(t["k"], dtype=torch.float64), torch.zeros_like(t["v"], dtype=torch.float64)
    for batch in range(shape["batch"]):
        for head in range(shape["heads"]):
            at, kv = (batch, head), (batch, head // group)
            leaves = [x[i].double().requires_grad_() for x, i in ((t["q"], at), (t["k"], kv), (t["v"], kv))]
            o = _one_head(*leaves)
            dq[at], dk_head, dv_head = torch.autograd.grad(o, leaves, grads["out"][at].double())
            out[at] = o.detach()
            dk[kv] += dk_head
            dv[kv] += dv_head
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def cost(shape: Shape, direction: str) -> Cost:
    """Two products forward, five backward, half of each under the causal mask."""
    products = {"forward": 2, "backward": 5, BOTH: 7}[direction]
    per_product = 2 * shape["batch"] * shape["heads"] * shape["seq"] ** 2 * shape["head_dim"] // 2
    return Cost(flops=products * per_product)


def eager(shape: Shape, given: Tensors):
    """transformers' eager attention, recomputed a key/value head at a time: its scores fill the memory otherwise."""
    group = shape["heads"] // shape["kv_heads"]

    def function(t: Tensors) -> tuple[Tensor]:
        outs = []
        for kv in range(shape["kv_heads"]):
            q = t["q"][:, kv * group : (kv + 1) * group]
            k, v = (t[n][:, kv : kv + 1].expand(-1, group, -1, -1) for n in ("k", "v"))
            outs.append(checkpoint(_one_head, q, k, v, use_reentrant=False))
        return (torch.cat(outs, dim=1),)

    return function


def sdpa(backend: SDPBackend):
    def build(shape: Shape, given: Tensors):
        def function(t: Tensors) -> tuple[Tensor]:
            with sdpa_kernel(backend):
                return (F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True, enable_gqa=True),)

        return function

    return build


def flex(shape: Shape, given: Tensors):
    import torch._functorch.config as functorch_config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    functorch_config.donated_buffer = False  # the backward is timed alone, many times on one forward
    seq = shape["seq"]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq, seq, device=given["q"].device)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda t: (attend(t["q"], t["k"], t["v"], block_mask=mask, enable_gqa=True),)


def _seq_first(attend):
    """A function of (batch, seq, heads, dim) tensors as a builder's function."""

    def function(t: Tensors) -> tuple[Tensor]:
        out = attend(*(t[n].transpose(1, 2) for n in ("q", "k", "v")))
        return ((out[0] if isinstance(out, tuple) else out).transpose(1, 2),)

    return function


def flash2(shape: Shape, given: Tensors):
    from flash_attn import flash_attn_func

    return _seq_first(lambda q, k, v: flash_attn_func(q, k, v, causal=True))


def flash3(shape: Shape, given: Tensors):
    from flash_attn_interface import flash_attn_func

    return _seq_first(lambda q, k, v: flash_attn_func(q, k, v, causal=True))


def flash4(shape: Shape, given: Tensors):
    from flash_attn.cute import flash_attn_func

    return _seq_first(lambda q, k, v: flash_attn_func(q, k, v, causal=True))


def ours(shape: Shape, given: Tensors):
    from m3kernels.ops.attention import attention

    return lambda t: (attention(t["q"], t["k"], t["v"]),)


def _case(batch: int, seq: int, quick: bool = False) -> Case:
    shape = {"batch": batch, "seq": seq, "heads": 32, "kv_heads": 8, "head_dim": 128}
    return Case("attention", f"causal B{batch} S{seq} 32/8x128", shape, quick)


OPS = {
    "attention": Op(
        inputs=inputs,
        outputs={"out": "q"},
        wrt=lambda _: ("q", "k", "v"),
        reference=reference,
        cost=cost,
        report_memory=True,
    )
}
CASES = (_case(4, 4096, quick=True), _case(1, 16384))
PEERS = {
    "attention": {
        "eager": eager,
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex": flex,
        "fa2": flash2,
        "fa3": flash3,
        "fa4": flash4,
        "m3kernels": ours,
    }
}
