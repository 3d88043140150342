"""LoRA and DoRA linears in the op benchmark, beside PEFT's; a model's layers of one input: adapter_grid.

LoRA: y = x W^T + s (x A^T) B^T          DoRA: y = m / ||W + s B A|| * that, the norm by rows and detached
"""

import torch.nn.functional as F
from torch import Tensor, nn

from m3kernels.bench.spec import BOTH, Case, Cost, Op, Shape, Tensors, by_autograd, randn

SCALING = 2.0


def inputs(shape: Shape, device, g) -> Tensors:
    rows, width, out, rank = (shape[n] for n in ("rows", "width", "out", "rank"))
    found = {
        "x": randn((rows, width), device, g),
        "weight": randn((out, width), device, g, width**-0.5),
        "A": randn((rank, width), device, g, width**-0.5),
        "B": randn((out, rank), device, g, 0.1),
    }
    if shape["dora"]:
        found["magnitude"] = (1 + randn((out,), device, g, 0.1)).abs()
    return found


def _wrt(shape: Shape) -> tuple[str, ...]:
    return ("x", "A", "B", "magnitude") if shape["dora"] else ("x", "A", "B")


def lora(t: Tensors) -> Tensor:
    return F.linear(t["x"], t["weight"]) + F.linear(F.linear(t["x"], t["A"]), t["B"]) * SCALING


def dora(t: Tensors) -> Tensor:
    norm = (t["weight"] + SCALING * t["B"] @ t["A"]).norm(dim=1).detach()
    return t["magnitude"] / norm * lora(t)


def _function(shape: Shape):
    return dora if shape["dora"] else lora


def reference(shape: Shape, given: Tensors, grads: Tensors) -> Tensors:
    return by_autograd(lambda s, t: (_function(s)(t),), _wrt(shape), ("y",))(shape, given, grads)


def cost(shape: Shape, direction: str) -> Cost:
    """The frozen product forward and once more for x; the low-rank products; no gradient of the frozen weight."""
    rows, width, out, rank = (shape[n] for n in ("rows", "width", "out", "rank"))
    base, low = 2 * rows * width * out, 2 * rows * (width + out) * rank
    return Cost(flops={"forward": base + low, "backward": base + 2 * low, BOTH: 2 * base + 3 * low}[direction])


def eager(shape: Shape, given: Tensors):
    function = _function(shape)
    return lambda t: (function(t),)


def _peft_layer(shape: Shape, given: Tensors) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    out, width = given["weight"].shape
    base = nn.Linear(width, out, bias=False, device=given["weight"].device, dtype=given["weight"].dtype)
    base.weight = nn.Parameter(given["weight"].detach().clone(), requires_grad=False)
    rank, alpha = shape["rank"], SCALING * shape["rank"]
    config = LoraConfig(r=rank, lora_alpha=alpha, use_dora=shape["dora"])
    layer = Linear(base, "default", config, r=rank, lora_alpha=alpha, init_lora_weights=True, use_dora=shape["dora"])
    return layer.to(given["weight"].dtype)


def _bind(layer: nn.Module, shape: Shape, t: Tensors) -> None:
    """The case's tensors as the layer's adapter weights, so that gradients can be asked for them."""
    pairs = [(layer.lora_A, "A"), (layer.lora_B, "B")]
    for group, name in pairs + [(layer.lora_magnitude_vector, "magnitude")] * shape["dora"]:
        module = group["default"]
        if module.weight is not t[name]:
            module._parameters.pop("weight", None)
            module.__dict__["weight"] = t[name]


def peft(compile_it: bool):
    def build(shape: Shape, given: Tensors):
        layer = _peft_layer(shape, given)
        forward = layer
        if compile_it:
            import torch._dynamo
            import torch._functorch.config as functorch_config

            torch._dynamo.reset()
            functorch_config.donated_buffer = False  # the backward is timed alone, many times on one forward
            if shape["dora"]:
                # PEFT's look for a quantised base cannot be traced, and there is none
                from peft.tuners.lora import dora

                dora.dequantize_module_weight = lambda base_layer: base_layer.weight
            forward = torch.compile(layer, dynamic=False, fullgraph=True)

        def function(t: Tensors) -> tuple[Tensor]:
            _bind(layer, shape, t)
            return (forward(t["x"]),)

        return function

    return build


def ours(shape: Shape, given: Tensors):
    from m3kernels import ops

    def function(t: Tensors) -> tuple[Tensor]:
        layer = (t["x"], t["weight"], t["A"], t["B"])
        if shape["dora"]:
            return (ops.dora_linear(*layer, t["magnitude"], SCALING),)
        return (ops.lora_linear(*layer, SCALING),)

    return function


OP = Op(inputs=inputs, outputs={"y": ("rows", "out")}, wrt=_wrt, reference=reference, cost=cost, report_memory=True)


def _case(op: str, width: int, out: int, quick: bool = False) -> Case:
    shape = {"rows": 8192, "width": width, "out": out, "rank": 16, "dora": op == "dora_linear"}
    return Case(op, f"8192 {width}->{out} r16", shape, quick)


OPS = {"lora_linear": OP, "dora_linear": OP}
CASES = (
    _case("lora_linear", 4096, 14336, quick=True),
    _case("lora_linear", 3072, 9216),
    _case("dora_linear", 4096, 14336),
)
PEERS = {op: {"eager": eager, "peft": peft(False), "peft+compile": peft(True), "m3kernels": ours} for op in OPS}
