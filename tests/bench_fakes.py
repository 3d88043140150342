"""A tiny size and a clock for the end-to-end benches on a CPU, and modules that play Liger and FlashAttention-4 with torch."""

import sys
import time
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F

from m3kernels.bench import measure, train_peers
from m3kernels.bench.model_shapes import Size, Vision
from m3kernels.patching.api import unwrap

CPU = torch.device("cpu")
TINY = Size(
    layers=2,
    hidden=64,
    intermediate=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=300,
    # as wide as 0.02 is at a hidden size of 3072
    std=0.14,
    vision=Vision(layers=2, hidden=64, heads=2, intermediate=96, patch=4, images=((16, 24), (8, 16))),
)


class SlowGpu(measure.Gpu):
    """The GPU's part played by the CPU's clock, with graphs that cannot be captured."""

    def __init__(self):
        self.device = CPU

    def capture(self, trial, calls):
        raise RuntimeError("no CUDA graphs on a CPU")

    def python_sample(self, trial):
        trial.prepare()
        begun = time.perf_counter()
        trial.run()
        return 1e3 * (time.perf_counter() - begun), 1.0

    def peak_bytes(self, trial):
        trial.prepare()
        trial.run()
        return 1 << 20


def _module(monkeypatch, name: str, **members) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def fake_liger(monkeypatch) -> list[str]:
    """Binds methods to instances as Liger's helpers do; returns the list that its functions write their names to."""
    called = []

    def norm(self, x):
        called.append("norm")
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)

    def patch_norm(module):
        module.in_place = True
        module.__dict__["forward"] = norm.__get__(module)

    class MLP:
        def forward(self, x):
            called.append("mlp")
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def patch_mlp(module, liger):
        module.__dict__["forward"] = liger.forward.__get__(module)

    def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        called.append("rope")
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned = (torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) for x in (q, k))
        return tuple(x * cos + t * sin for x, t in zip((q, k), turned))

    def loss(hidden, weight, labels, hidden_size):
        called.append("loss")
        logits = (hidden.reshape(-1, hidden_size) @ weight.T).float()
        return F.cross_entropy(logits[:-1], labels.flatten()[1:])

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.model"):
        _module(monkeypatch, name)
    helpers = {"_patch_rms_norm_module": patch_norm, "_patch_swiglu_module": patch_mlp}
    _module(monkeypatch, "liger_kernel.transformers.monkey_patch", **helpers)
    _module(monkeypatch, "liger_kernel.transformers.rope", liger_rotary_pos_emb=rope)
    _module(monkeypatch, "liger_kernel.transformers.swiglu", LigerSwiGLUMLP=MLP)
    _module(monkeypatch, "liger_kernel.transformers.model.loss_utils", LigerForCausalLMLoss=loss)
    return called


def _probabilities(q, k, scale):
    """Causal softmax (B, H, S, S) of (B, S, H, D), and k with a head for every head of q, in fp32."""
    k = k.float().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.float(), k)
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1), k


def fake_fa4(monkeypatch) -> list[str]:
    called = []

    def forward(q, k, v, softmax_scale, causal, return_lse=True):
        called.append("forward")
        assert causal
        p, _ = _probabilities(q, k, softmax_scale)
        out = torch.einsum("bhij,bjhd->bihd", p, v.float().repeat_interleave(q.shape[2] // v.shape[2], 2))
        lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        return out.to(q.dtype).contiguous(), lse, None, None, None

    def backward(q, k, v, out, grad, lse, scale, causal, *, dq, dk, dv):
        called.append("backward")
        p, wide = _probabilities(q, k, scale)
        groups, grad = q.shape[2] // k.shape[2], grad.float()
        dp = torch.einsum("bihd,bjhd->bhij", grad, v.float().repeat_interleave(groups, 2))
        ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
        dq.copy_(torch.einsum("bhij,bjhd->bihd", ds, wide))
        dk.copy_(torch.einsum("bhij,bihd->bjhd", ds, q.float()).unflatten(2, (-1, groups)).sum(3))
        dv.copy_(torch.einsum("bhij,bihd->bjhd", p, grad).unflatten(2, (-1, groups)).sum(3))

    def public(q, k, v, softmax_scale, causal):
        return forward(q, k, v, softmax_scale, causal)[:2]

    _module(monkeypatch, "flash_attn")
    _module(monkeypatch, "flash_attn.cute", flash_attn_func=public)
    _module(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return called


def state(model) -> dict:
    """Everything that a peer may change: classes, what instances hold, functions of transformers' modules."""
    found = {"": [unwrap(model).config.get_text_config()._attn_implementation]}
    for name, module in model.named_modules():
        found[name] = [type(module), {k: id(v) for k, v in vars(module).items() if k != "_modules"}]
        modeling = sys.modules[type(module).__module__]
        found[modeling.__name__] = id(getattr(modeling, "apply_rotary_pos_emb", None))
    return found


@contextmanager
def no_memory(model):
    with train_peers.attribute(unwrap(model), "forward", raising(torch.OutOfMemoryError("CUDA out of memory"))):
        yield


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def without_rotary(model):
    modeling = sys.modules[type(unwrap(model).model).__module__]
    return train_peers.attribute(modeling, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
