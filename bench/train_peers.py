"""Who takes part in the training bench: what each peer turns one Hugging Face model into, and back.

A peer is a row of parts, each a context manager that changes the one instance and undoes it: all peers of a cell share
their weights. What a part needs and does not find raises ImportError.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import m3kernels
from m3kernels.bench.peers import OURS
from m3kernels.patching.adapters import is_adapted
from m3kernels.patching.api import unwrap

Part = Callable[[nn.Module], AbstractContextManager]

# transformers takes a name with "flash" in it for one of its own
FA4 = "m3k_bench_fa4"
# one shape a cell; a graph break would silently hand part of a layer back to eager
COMPILE = {"fullgraph": True, "dynamic": False}
NATIVE = f"{OURS} native"
_MISSING = object()


@contextmanager
def become(model: nn.Module, parts: tuple[Part, ...]) -> Iterator[None]:
    """The model as a peer has it, inside the block only."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part(model))
        yield


@contextmanager
def attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """``owner.name = value`` inside the block; afterwards what its own ``__dict__`` held, if anything."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def own_attributes(module: nn.Module) -> Iterator[None]:
    """Whatever the block sets on the module itself is gone afterwards."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)


@contextmanager
def ours(model: nn.Module) -> Iterator[None]:
    """Patched by m3kernels.

    Raises:
        ImportError: the kernels cannot run on this GPU's machine; the reference that would run is not what is measured.
    """
    with m3kernels.patched(model) as report:
        slow = {b for op, b in report.backend.items() if b != "triton" and report.patched[op]}
        if report.skipped:
            raise RuntimeError(f"not all is fused: {report.skipped[0]}")
        if slow and next(unwrap(model).parameters()).is_cuda:
            raise ImportError(f"m3kernels would run as {', '.join(sorted(slow))}")
        yield


@contextmanager
def native(model: nn.Module) -> Iterator[None]:
    """Our own Ministral 3, patched, in place of Hugging Face's forward, on the very parameters and adapters of the model.

    It recomputes where the model does, as far as "attention" asks: its output is kept.
    """
    from m3kernels.models.ministral3.recompute import set_recompute

    base, twin = unwrap(model), native_twin(model)
    set_recompute(twin, "attention" if base.is_gradient_checkpointing else "none")
    # what the row says of the attention; nothing else reads it inside the block
    named = attribute(base.config.get_text_config(), "_attn_implementation_internal", OURS)
    with ours(twin), attribute(base, "forward", twin.forward), named:
        yield


def native_twin(model: nn.Module) -> nn.Module:
    """Our own Ministral 3 on the parameters and adapters of a Hugging Face model."""
    from m3kernels.models.ministral3 import Config, Ministral3
    from m3kernels.models.ministral3.weights import runtime_name

    base = unwrap(model)
    config = Config.from_hf(base.config)
    with torch.device("meta"):
        twin = Ministral3(config)
    for name, module in list(base.named_modules()):
        if is_adapted(module):
            parent, _, leaf = runtime_name(name).rpartition(".")
            setattr(twin.get_submodule(parent), leaf, module)
    for name, parameter in base.named_parameters():
        if ".lora_" not in name and ".base_layer." not in name:
            parent, _, leaf = runtime_name(name).rpartition(".")
            setattr(twin.get_submodule(parent), leaf, parameter)
    if config.tied:
        twin.lm_head.weight = twin.get_input_embeddings().weight
    return twin.train(base.training)


@contextmanager
def liger(model: nn.Module) -> Iterator[None]:
    """Liger's RMSNorm, SwiGLU, rotary and fused linear cross-entropy, put in by hand as its patches of relatives do.

    Liger has no patch for Ministral 3. Its rotary has no query scale, which stays eager, and takes the place of a
    function of transformers' modules: every model of the process has it inside the block.
    """
    from liger_kernel.transformers import monkey_patch
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    base = unwrap(model)
    with ExitStack() as stack:
        for module in base.modules():
            name = type(module).__name__
            if name.endswith("RMSNorm"):
                stack.enter_context(own_attributes(module))
                monkey_patch._patch_rms_norm_module(module)
            elif name in ("Ministral3MLP", "PixtralMLP"):
                stack.enter_context(own_attributes(module))
                monkey_patch._patch_swiglu_module(module, LigerSwiGLUMLP)
        for modeling in {type(m).__module__ for m in base.modules() if type(m).__name__.endswith("Attention")}:
            stack.enter_context(attribute(sys.modules[modeling], "apply_rotary_pos_emb", liger_rotary_pos_emb))
        stack.enter_context(attribute(base, "forward", _liger_forward(base)))
        yield


def _liger_forward(base: nn.Module) -> Callable:
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(*, labels: Tensor, **inputs) -> CausalLMOutputWithPast:
        hidden = base.model(**inputs).last_hidden_state
        weight = base.lm_head.weight
        return CausalLMOutputWithPast(loss=LigerForCausalLMLoss(hidden, weight, labels, hidden_size=weight.shape[1]))

    return forward


@contextmanager
def loss_by_chunks(model: nn.Module) -> Iterator[None]:
    """Hugging Face's model and maths with the loss by 1024 tokens: what to compare with where its logits do not fit."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    base = unwrap(model)

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(base.lm_head(hidden).float(), labels, reduction="sum")

    def forward(*, labels: Tensor, **inputs) -> CausalLMOutputWithPast:
        hidden = base.model(**inputs).last_hidden_state.flatten(0, 1)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        parts = zip(hidden.split(1024), shifted.split(1024))
        total = sum(checkpoint(loss_of, h, target, use_reentrant=False) for h, target in parts)
        return CausalLMOutputWithPast(loss=total / (shifted != -100).sum())

    with attribute(base, "forward", forward):
        yield


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """``torch.compile`` of every decoder and tower layer and of the loss.

    By layers, since one compilation then serves all of them: the whole forward takes minutes, and what it fuses beyond
    is one residual add a layer.
    """
    from torch._functorch import config as functorch_config
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = unwrap(model)
    # the op bench turns donated buffers off in this process
    with functorch_config.patch(donated_buffer=True), ExitStack() as stack:
        for layer in base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # not layer.compile(): hooks that collect hidden states cannot be traced and stay outside like this
                stack.enter_context(attribute(layer, "forward", torch.compile(layer.forward, **COMPILE)))
                stack.enter_context(_traceable(layer))
        stack.enter_context(attribute(base, "_loss_function", torch.compile(base.loss_function, **COMPILE)))
        yield


@contextmanager
def _traceable(layer: nn.Module) -> Iterator[None]:
    """Without the two things inside a layer that break a graph and do nothing here.

    Hooks that would collect attention weights, if anyone asked for them (a vision model's first forward registers
    them, and hf's comes before any other), and PEFT's look for a quantised base of DoRA.
    """
    with ExitStack() as stack:
        for module in layer.modules():
            if module is not layer and module._forward_hooks:
                stack.enter_context(attribute(module, "_forward_hooks", type(module._forward_hooks)()))
            if type(module).__name__ == "DoraLinearLayer":
                dora = sys.modules[type(module).__module__]
                stack.enter_context(attribute(dora, "dequantize_module_weight", lambda base_layer: base_layer.weight))
        yield


@contextmanager
def compiled_whole(model: nn.Module) -> Iterator[None]:
    """``torch.compile`` of the whole forward as one graph."""
    from torch._functorch import config as functorch_config

    base = unwrap(model)
    with functorch_config.patch(donated_buffer=True):
        with attribute(base, "forward", torch.compile(base.forward, **COMPILE)):
            yield


@contextmanager
def fa4(model: nn.Module) -> Iterator[None]:
    """FlashAttention-4 for the text model; the tower's mask is one that its interface does not take."""
    from flash_attn.cute import flash_attn_func  # noqa: F401  so that its absence is known before anything is built
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FA4, _fa4_attention)
    AttentionMaskInterface.register(FA4, _no_mask)
    config = unwrap(model).config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = FA4
    try:
        yield
    finally:
        config._attn_implementation = before


def _no_mask(*args, **kwargs) -> None:
    """Causal by itself: this bench's batches have neither padding nor packing, whatever a traced check assumes."""


def _fa4_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, H, S, D) in, (B, S, H, D) out."""
    if attention_mask is not None or dropout or sliding_window is not None:
        raise ValueError("the FA4 peer is causal attention alone: no mask, dropout or window")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if torch.compiler.is_compiling():
        return torch.ops.m3k_bench.fa4(q, k, v, scaling)[0], None
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)[0], None


@torch.library.custom_op("m3k_bench::fa4", mutates_args=())
def _fa4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output like q, log-sum-exp (B, H, S) in fp32); its own autograd.Function cannot be traced."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=True, return_lse=True)
    return out, lse


@_fa4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seq), dtype=torch.float32)


@torch.library.custom_op("m3k_bench::fa4_backward", mutates_args=())
def _fa4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    # allocated here: FA4's own would have the strides of its inputs, and the fake below promises contiguous ones
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    _flash_attn_bwd(q, k, v, out, grad, lse, scale, True, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@_fa4_backward.register_fake
def _(grad, q, k, v, out, lse, scale) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fa4_setup(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _fa4_autograd(ctx, grad: Tensor, _) -> tuple:
    return *torch.ops.m3k_bench.fa4_backward(grad, *ctx.saved_tensors, ctx.scale), None


_fa4.register_autograd(_fa4_autograd, setup_context=_fa4_setup)

PEERS: dict[str, tuple[Part, ...]] = {
    "hf": (),
    "hf+liger": (liger,),
    "hf+liger+fa4": (liger, fa4),
    "hf+compile": (compiled,),
    "hf+compile+fa4": (fa4, compiled),
    "hf+compile-whole+fa4": (fa4, compiled_whole),
    OURS: (ours,),
    f"{OURS}+fa4": (ours, fa4),
    NATIVE: (native,),
}
# without FA4, compiling with the model's own attention stands in for compiling with it; the whole forward is for asking
ON_REQUEST = ("hf+compile", "hf+compile-whole+fa4")
QUICK = ("hf", "hf+liger", "hf+compile+fa4", OURS, f"{OURS}+fa4", NATIVE)


def default_peers(quick: bool) -> tuple[str, ...]:
    """Every peer that runs unasked, in reporting order."""
    chosen = QUICK if quick else tuple(peer for peer in PEERS if peer not in ON_REQUEST)
    return chosen if has_fa4() else tuple(peer for peer in PEERS if peer in (*chosen, "hf+compile"))


def has_fa4() -> bool:
    try:
        import flash_attn.cute  # noqa: F401
    except Exception:  # a package that is there and breaks at import is as missing as one that is not
        return False
    return True


def attention_of(model: nn.Module, batch: int, seq: int) -> str:
    """What computes the text model's attention in training; of SDPA, which of its kernels."""
    config, parameter = unwrap(model).config.get_text_config(), next(unwrap(model).parameters())
    if config._attn_implementation == FA4:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"FA4 {metadata.version('flash-attn-4')}"
        return "FA4"
    if config._attn_implementation != "sdpa":
        return config._attn_implementation
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (parameter.new_empty(batch, h, seq, config.head_dim).requires_grad_() for h in heads)
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return f"sdpa ({torch.nn.attention.SDPBackend(choice).name.removesuffix('_ATTENTION').lower()})"
