"""What the op benchmark measures, as data: ops, their inputs, fp64 references, bytes and FLOPs, and the shapes.

Adding a shape is one row of ``CASES``; adding an op is one entry of ``OPS`` and one of ``peers.PEERS``, or a file of its
own that gives ``OPS``, ``CASES`` and ``PEERS``, as :mod:`m3kernels.bench.attention` does.
"""

import math

import torch
from torch import Tensor

from m3kernels.bench import adapters, attention, fp8
from m3kernels.bench.spec import BOTH, Case, Cost, Op, Shape, Tensors, by_autograd, randn

EPS = 1e-5
ROPE_THETA = 1e6


def rms_norm_inputs(shape: Shape, device, g) -> Tensors:
    rows, width = shape["rows"], shape["width"]
    return {"x": randn((rows, width), device, g), "weight": 1 + randn((width,), device, g, 0.1)}


def add_rms_norm_inputs(shape: Shape, device, g) -> Tensors:
    return rms_norm_inputs(shape, device, g) | {"residual": randn((shape["rows"], shape["width"]), device, g)}


def _rms_norm64(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _add_rms_norm64(_: Shape, t: Tensors) -> tuple[Tensor, Tensor]:
    summed = t["x"] + t["residual"]
    return _rms_norm64(summed, t["weight"]), summed


def row_cost(forward_passes: int, backward_passes: int):
    """Cost in passes over a (rows, width) bf16 tensor; the weight and its gradient are counted, rstd is not."""

    def cost(shape: Shape, direction: str) -> Cost:
        both = forward_passes + backward_passes
        passes, weights = {"forward": (forward_passes, 1), "backward": (backward_passes, 2), BOTH: (both, 3)}[direction]
        return Cost(bytes=2 * shape["width"] * (shape["rows"] * passes + weights))

    return cost


def rotary_inputs(shape: Shape, device, g) -> Tensors:
    """q (B, H, S, D) and k (B, Hkv, S, D) as transposed views of (B, S, H, D) memory, tables as HF makes them.

    Positions start at ``first`` so that the Llama-4 scale changes inside the sequence: it is exactly 1 below its
    ``original_max``, and a short benchmark would never see it.
    """
    batch, seq, d = shape["batch"], shape["seq"], shape["head_dim"]
    q = randn((batch, seq, shape["heads"], d), device, g).transpose(1, 2)
    k = randn((batch, seq, shape["kv_heads"], d), device, g).transpose(1, 2)
    inv_freq = 1.0 / ROPE_THETA ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    positions = torch.arange(shape["first"], shape["first"] + seq, device=device)[None]
    angle = positions[..., None].float() * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    tables = {"cos": angle.cos().to(q.dtype), "sin": angle.sin().to(q.dtype)}
    return {"q": q, "k": k, "positions": positions, "inv_freq": inv_freq, "angle": angle} | tables


def _rotary64(shape: Shape, t: Tensors) -> tuple[Tensor, Tensor]:
    """Exact from the fp32 angles on: those are given to every peer, their tables' rounding is the peers' own."""
    cos, sin = t["angle"].cos()[:, None], t["angle"].sin()[:, None]
    beta, original_max = shape["llama4"]
    scale = (1 + beta * torch.log1p(torch.floor(t["positions"].double() / original_max)))[:, None, :, None]

    def turn(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    return turn(t["q"]) * scale, turn(t["k"])


def rotary_cost(shape: Shape, direction: str) -> Cost:
    """q and k read and written, and one fp32 (S, D) table [cos | sin], as many bytes as HF's two bf16 tables."""
    rows = shape["batch"] * shape["seq"] * shape["head_dim"]
    once = rows * (shape["heads"] + shape["kv_heads"]) * 2 * 2 + shape["seq"] * shape["head_dim"] * 4
    return Cost(bytes=once * (2 if direction == BOTH else 1))


def swiglu_inputs(shape: Shape, device, g) -> Tensors:
    size = (shape["rows"], shape["width"])
    return {"gate": randn(size, device, g), "up": randn(size, device, g)}


def swiglu_cost(shape: Shape, direction: str) -> Cost:
    return Cost(bytes=2 * shape["rows"] * shape["width"] * {"forward": 3, "backward": 5, BOTH: 8}[direction])


def linear_cross_entropy_inputs(shape: Shape, device, g) -> Tensors:
    """Logits of standard deviation 2.5, so that the softmax part of the gradients is far above bf16 rounding.

    With flatter random logits the label's own term makes up all but 0.3 % of every gradient, and an implementation
    without any softmax would pass the check.
    """
    tokens, vocab, hidden = shape["tokens"], shape["vocab"], shape["hidden"]
    return {
        "hidden": randn((tokens, hidden), device, g),
        "weight": randn((vocab, hidden), device, g, 2.5 / math.sqrt(hidden)),
        "labels": torch.randint(vocab, (tokens,), device=device, generator=g),
    }


def linear_cross_entropy_reference(shape: Shape, inputs: Tensors, _: Tensors) -> Tensors:
    """fp64 by chunks of tokens: 2.2 GB of logits at a time at a vocabulary of 131,072, and all gradients whole."""
    hidden, weight, labels = inputs["hidden"].double(), inputs["weight"].double(), inputs["labels"]
    tokens = len(labels)
    loss = hidden.new_zeros(())
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight) if shape["trained"] else None
    for rows in torch.arange(tokens, device=labels.device).split(2048):
        logits = hidden[rows] @ weight.T
        lse = logits.logsumexp(-1, keepdim=True)
        loss += (lse.squeeze(-1) - logits.gather(1, labels[rows, None]).squeeze(-1)).sum() / tokens
        dlogits = logits.sub_(lse).exp_()
        dlogits[torch.arange(len(rows), device=labels.device), labels[rows]] -= 1
        dlogits /= tokens
        dhidden[rows] = dlogits @ weight
        if dweight is not None:
            dweight.addmm_(dlogits.T, hidden[rows])
    return {"loss": loss, "dhidden": dhidden} | ({} if dweight is None else {"dweight": dweight})


def linear_cross_entropy_cost(shape: Shape, direction: str) -> Cost:
    """Two GEMMs with a frozen head (logits, dhidden), three with a trained one."""
    gemms = 3 if shape["trained"] else 2
    return Cost(flops=gemms * 2 * shape["tokens"] * shape["vocab"] * shape["hidden"])


def one_gemm_dweight(inputs: Tensors) -> Tensor:
    """The weight gradient as one bf16 GEMM over all rows: bf16 logits, fp32 softmax, bf16 dlogits, one call.

    The yardstick for accumulating over chunks: everything before the last GEMM rounds as a chunked version does.
    """
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
    tokens = len(labels)
    dlogits = torch.empty((tokens, len(weight)), dtype=hidden.dtype, device=hidden.device)
    for rows in torch.arange(tokens, device=labels.device).split(1024):
        p = torch.softmax((hidden[rows] @ weight.T).float(), dim=-1)
        p[torch.arange(len(rows), device=labels.device), labels[rows]] -= 1
        dlogits[rows] = (p / tokens).to(hidden.dtype)
    return dlogits.T @ hidden


OPS: dict[str, Op] = {
    "rms_norm": Op(
        inputs=rms_norm_inputs,
        outputs={"y": "x"},
        wrt=lambda _: ("x", "weight"),
        reference=by_autograd(lambda _, t: (_rms_norm64(t["x"], t["weight"]),), ("x", "weight"), ("y",)),
        cost=row_cost(2, 3),
    ),
    "add_rms_norm": Op(
        inputs=add_rms_norm_inputs,
        outputs={"normed": "x", "summed": "x"},
        wrt=lambda _: ("x", "residual", "weight"),
        reference=by_autograd(_add_rms_norm64, ("x", "residual", "weight"), ("normed", "summed")),
        # the gradients of x and residual are one tensor
        cost=row_cost(4, 4),
    ),
    "rotary": Op(
        inputs=rotary_inputs,
        outputs={"q_out": "q", "k_out": "k"},
        wrt=lambda _: ("q", "k"),
        reference=by_autograd(_rotary64, ("q", "k"), ("q_out", "k_out")),
        cost=rotary_cost,
    ),
    "swiglu": Op(
        inputs=swiglu_inputs,
        outputs={"y": "gate"},
        wrt=lambda _: ("gate", "up"),
        reference=by_autograd(lambda _, t: (torch.nn.functional.silu(t["gate"]) * t["up"],), ("gate", "up"), ("y",)),
        cost=swiglu_cost,
    ),
    "linear_cross_entropy": Op(
        inputs=linear_cross_entropy_inputs,
        outputs={"loss": None},
        wrt=lambda shape: ("hidden", "weight") if shape["trained"] else ("hidden",),
        reference=linear_cross_entropy_reference,
        cost=linear_cross_entropy_cost,
        # gradients are computed in the forward by ours and Liger, so a backward alone would time nothing
        directions=(BOTH,),
        no_graph=("liger", "cce"),
        report_memory=True,
    ),
    **attention.OPS,
    **adapters.OPS,
    **fp8.OPS,
}


def _rows(op: str, rows: int, width: int, quick: bool = False) -> Case:
    return Case(op, f"{rows}x{width}", {"rows": rows, "width": width}, quick)


def _rotary(seq: int, quick: bool = False) -> Case:
    shape = {
        "batch": 1,
        "seq": seq,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "first": 12288,
        "llama4": (0.1, 16384),
    }
    return Case("rotary", f"S{seq} 32/8x128", shape, quick)


def _linear_cross_entropy(hidden: int, trained: bool, quick: bool = False) -> Case:
    shape = {"tokens": 8192, "vocab": 131072, "hidden": hidden, "trained": trained}
    return Case("linear_cross_entropy", f"8192x131072 h{hidden} {'trained' if trained else 'frozen'}", shape, quick)


CASES: tuple[Case, ...] = (
    _rows("rms_norm", 8192, 4096, quick=True),
    _rows("rms_norm", 8192, 3072),
    _rows("rms_norm", 32768, 5120, quick=True),
    _rows("add_rms_norm", 8192, 4096, quick=True),
    _rotary(8192, quick=True),
    _rotary(32768, quick=True),
    _rows("swiglu", 8192, 14336, quick=True),
    _rows("swiglu", 8192, 9216),
    _linear_cross_entropy(4096, trained=True, quick=True),
    _linear_cross_entropy(4096, trained=False, quick=True),
    _linear_cross_entropy(3072, trained=True),
    *attention.CASES,
    *adapters.CASES,
    *fp8.CASES,
)
