"""A patched model's decode step: a few tokens of a layer by the decode ops, in transformers' own loop and caches.

Off the GPU the ops' references run here where their kernels would; ``interpreter`` runs the kernels too.
"""

import copy
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import m3kernels
from m3kernels.ops import _decode_products
from m3kernels.ops._common import why_no_triton
from m3kernels.patching import decode, text
from models import FP32, assert_both, assert_same, build, inputs, redraw, tensors, text_batch, twins, vlm_batch

LAYERS = 2
DECODE = text.decode
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def taken(monkeypatch) -> list:
    """Rows of each layer's forward that took the decode ops."""
    rows = []
    # on a CPU, also that of a machine with a GPU, the ops run as their references
    monkeypatch.setattr(decode, "why_no_triton", lambda device_type: "")
    spy = lambda self, weights, x, *rest: rows.append(tuple(x.shape[:2])) or DECODE(self, weights, x, *rest)
    monkeypatch.setattr(text, "decode", spy)
    return rows


def steps(model, ids, cache, sizes, mask=None):
    """Logits of a prompt and of so many tokens at a time after it."""
    out, at = [], 0
    for size in sizes:
        options = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, at : at + size]
            options["position_ids"] = positions
        out.append(model(ids[:, at : at + size], past_key_values=cache, use_cache=True, **options).logits)
        at += size
    kept = slice(None) if mask is None else mask[:, :at].bool()
    logits = torch.cat(out, dim=1)
    return [logits if mask is None else logits[kept], tensors(cache)]


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=40),
}


STEPS = (17, 1, 3, 16, 1)
FEW = (17, 1, 2)
RUNS = [(cache, padding, STEPS) for cache in CACHES for padding in ("", "left")]
CHEAP = [("dynamic", "", FEW), ("static", "left", FEW)]


@pytest.mark.parametrize(
    ("cache", "padding", "sizes"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.interpreter) for run in CHEAP)]
)
def test_logits_and_caches(cache, padding, sizes, device, taken):
    """A long prompt by the layers' modules, then a few tokens at a time; positions pass the original length of 8."""
    plain, ours = twins(device=device)
    batch = text_batch(plain, batch=3 if sizes == STEPS else 2, seq=38, padding=padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    with torch.no_grad():
        assert_both(ours, plain, lambda model: steps(model, ids, CACHES[cache](model), sizes, mask))
    assert taken == [shape for n in sizes[1:] for shape in [(len(ids), n)] * LAYERS]


@pytest.mark.parametrize("window", [3, 6])
def test_windows(window, device, taken):
    plain, ours = twins(device=device, sliding_window=window)
    ids = text_batch(plain)["input_ids"]
    with torch.no_grad():
        assert_both(ours, plain, lambda model: [steps(model, ids, c(model), (9, 1, 1, 1, 1)) for c in CACHES.values()])
    assert len(taken) == 2 * 5 * LAYERS


def test_no_cache_and_no_positions(device, taken):
    plain, ours = twins(device=device)
    ids = text_batch(plain)["input_ids"][:, :5]
    with torch.no_grad():
        assert_both(ours, plain, lambda model: model(ids, use_cache=False).logits)
    assert taken == [(2, 5)] * LAYERS


WRONG = {
    "residual forgotten": ("decode_linear", lambda op, *args, **kw: op(*args, **{**kw, "residual": None})),
    "norms forgotten": ("decode_swiglu", lambda op, *args, **kw: op(*args, **{**kw, "norm_weight": None})),
    "query scale forgotten": ("decode_qkv", lambda op, *args, **kw: op(*args, **{**kw, "llama4": None})),
    "eps of another": ("decode_qkv", lambda op, *args, **kw: op(*args, **{**kw, "eps": 1e-2})),
    "sine and cosine exchanged": (
        "decode_qkv",
        lambda op, *args, **kw: op(*args, **{**kw, "table": kw["table"][::-1]}),
    ),
    "k and v exchanged": ("decode_qkv", lambda op, x, q, k, v, **kw: op(x, q, v, k, **kw)),
    "gate and up exchanged": ("decode_swiglu", lambda op, x, gate, up, **kw: op(x, up, gate, **kw)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_fail(name, monkeypatch):
    plain, ours = twins()
    ids = text_batch(plain)["input_ids"]
    run = lambda model: steps(model, ids, DynamicCache(config=model.config), (17, 1))
    op, change = WRONG[name]
    right = getattr(text, op)
    monkeypatch.setattr(text, op, lambda *args, **kw: change(right, *args, **kw))
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_both(ours, plain, run)


# --- transformers' own loop

GENERATE = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "scores": {
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    },
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("padding", ["", "left"])
def test_generate(how, padding, device, taken):
    plain, ours = twins(device=device)
    batch = inputs(text_batch(plain, padding=padding, batch=1 if how == "prompt lookup" else 3))

    def run(model):
        torch.manual_seed(0)
        return model.generate(
            **batch, **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **GENERATE[how]}
        )

    assert_both(ours, plain, run)
    assert len(taken) >= 5 * LAYERS


def test_generate_from_images(device, taken):
    plain, ours = twins("vlm", device=device)
    batch = inputs(vlm_batch(plain, [[(2, 3), (1, 4)]]))
    assert_both(
        ours, plain, lambda model: model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    )
    assert len(taken) == 3 * LAYERS


def test_assisted_generation(device, taken):
    plain, ours = twins(device=device)
    assistant = redraw(build(device=device, num_hidden_layers=1), seed=3)
    m3kernels.patch(assistant)
    ids = text_batch(plain, batch=1)["input_ids"]
    assert_both(
        ours, plain, lambda model: model.generate(ids, assistant_model=assistant, max_new_tokens=8, do_sample=False)
    )
    assert {n for _, n in taken} > {1}


# --- what is called by itself


def one_token(model, **options):
    ids = text_batch(model, batch=2, seq=4)["input_ids"][:, :3]
    with torch.no_grad():
        return model(ids, **options).logits


def _hook(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: out * 0.5)


def _pre_hook(model):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def _norm_hook(model):
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda m, args, out: out + 1)


def _attention_hook(model):
    model.model.layers[0].self_attn.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))


def _bias(model):
    layer = model.model.layers[0].mlp
    torch.manual_seed(0)
    layer.up_proj = nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features)


def _other_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].self_attn.o_proj.__class__ = Doubled


def _own_forward(model):
    layer = model.model.layers[0].self_attn.v_proj
    weight = layer.weight
    layer.forward = lambda x: nn.functional.linear(x, weight) + 1


def _gelu(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _other_norm(model):
    model.model.layers[0].input_layernorm = nn.LayerNorm(48)


@pytest.mark.parametrize(
    "change",
    [_hook, _pre_hook, _norm_hook, _attention_hook, _bias, _other_class, _own_forward, _gelu, _other_norm],
)
def test_layers_with_something_else_call_their_modules(change, taken):
    plain, ours = twins()
    before = one_token(ours)
    assert len(taken) == LAYERS
    for model in (plain, ours):
        change(model)
    assert_both(ours, plain, one_token)
    assert len(taken) == 2 * LAYERS - 1, "the other layer is as it was"
    assert not torch.allclose(one_token(ours), before)


def test_adapters_call_their_modules(taken):
    from peft import LoraConfig, get_peft_model

    plain, ours = twins()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    found = []
    for model in (plain, ours):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, copy.deepcopy(config)).eval()
        found.append(one_token(wrapped))
        if model is ours:
            assert not taken
            wrapped.merge_adapter()
            found.append(one_token(wrapped))
            # PEFT's layers stay in place of the linear ones
            assert not taken
            one_token(wrapped.merge_and_unload())
            assert len(taken) == LAYERS
    assert_same({"logits": found[1]}, {"logits": found[0]}, FP32)
    assert_same({"logits": found[2]}, {"logits": found[0]}, FP32)


def test_gradients_are_recorded_where_they_are_wanted(taken):
    plain, ours = twins()
    ids = text_batch(plain)["input_ids"][:, :6]

    def run(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert_both(ours, plain, run)
    assert not taken
    tangent = torch.zeros_like(ours.model.norm.weight)

    def weighted(weight):
        return torch.func.functional_call(ours.model, {"norm.weight": weight}, (ids,)).last_hidden_state

    with torch.no_grad():
        torch.func.vmap(weighted)(torch.stack([tangent, tangent + 1]))
    assert not taken, "a transform that the ops have no rule for"


def test_autocast(device, taken):
    plain, ours = twins(device=device)
    with torch.autocast(device, torch.bfloat16):
        assert one_token(ours).dtype == one_token(plain).dtype
    assert not taken


def test_dtypes_that_differ(taken):
    plain, ours = twins(dtype=torch.bfloat16)
    for model in (plain, ours):
        model.model.layers[0].input_layernorm.float()
        for name in "qkv":
            getattr(model.model.layers[0].self_attn, f"{name}_proj").float()
    one_token_of = lambda model: model.model.layers[1](
        torch.ones(1, 2, 48, dtype=torch.bfloat16),
        position_ids=torch.arange(2)[None],
        position_embeddings=model.model.rotary_emb(torch.ones(1, dtype=torch.bfloat16), torch.arange(2)[None]),
    )
    with torch.no_grad():
        assert one_token_of(ours).dtype == torch.bfloat16 and len(taken) == 1
        ours.model.layers[1].post_attention_layernorm.float()
        for module in (
            ours.model.layers[1].mlp.gate_proj,
            ours.model.layers[1].mlp.up_proj,
            ours.model.layers[1].mlp.down_proj,
        ):
            module.float()
        one_token_of(ours)
    assert len(taken) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_weights_and_hidden_states(attention, taken):
    """Hooks of transformers stay once an output was asked for: they note nothing where nothing is asked for."""
    plain, ours = twins(attention=attention)
    assert_both(ours, plain, lambda model: one_token(model))
    assert len(taken) == LAYERS
    ids = text_batch(plain)["input_ids"][:, :3]
    with torch.no_grad():
        seen = [model(ids, output_hidden_states=True) for model in (ours, plain)]
        assert len(seen[0].hidden_states) == LAYERS + 1
        assert_same(tensors(seen[0]), tensors(seen[1]), FP32)
        assert len(taken) == 2 * LAYERS, "transformers' hooks on attention alone are no reason"
        if attention == "eager":
            weights = [model(ids, output_attentions=True).attentions for model in (ours, plain)]
            assert len(weights[0]) == LAYERS
            assert_same(tensors(weights[0]), tensors(weights[1]), FP32)
            assert len(taken) == 2 * LAYERS
    one_token(ours)
    assert len(taken) == 3 * LAYERS


@pytest.mark.parametrize("ops", [("add_rms_norm",), ("add_rms_norm", "rotary"), ("rotary", "swiglu"), ("rms_norm",)])
def test_ops_that_were_not_asked_for(ops, taken):
    plain, ours = twins(patching={"ops": ops})
    assert_both(ours, plain, one_token)
    assert not taken


def test_kept_attention(taken):
    plain, ours = twins(patching={"attention": "keep"}, attention="eager")
    assert_both(
        ours,
        plain,
        lambda model: steps(model, text_batch(model)["input_ids"], DynamicCache(config=model.config), (17, 1, 2)),
    )
    assert len(taken) == 0, "autograd records"
    with torch.no_grad():
        assert_both(
            ours,
            plain,
            lambda model: steps(model, text_batch(model)["input_ids"], DynamicCache(config=model.config), (17, 1, 2)),
        )
    assert len(taken) == 2 * LAYERS


def test_unpatch(taken):
    plain, ours = twins()
    m3kernels.unpatch(ours)
    assert torch.equal(one_token(ours), one_token(plain)) and not taken


def test_training_mode_and_checkpointing(taken):
    plain, ours = twins()
    for model in (plain, ours):
        model.train()
        model.gradient_checkpointing_enable()
    assert_both(ours, plain, one_token)
    assert len(taken) == LAYERS


@pytest.mark.parametrize("per", ["tensor", "blocks"])
def test_fp8_weights(per, taken):
    """E4M3 with one scale goes through the ops as it is; with blocks of scales the layers' modules run."""
    from test_patch_fp8 import BLOCKS, dequantised, quantise

    ours = quantise(build(), BLOCKS[per == "blocks"])
    plain = dequantised(ours)
    m3kernels.patch(ours)
    assert_both(ours, plain, one_token)
    assert len(taken) == (0 if per == "blocks" else LAYERS)


# --- torch.compile


@pytest.mark.interpreter
def test_compiled_decoding_takes_the_ops(monkeypatch):
    """One graph over a static cache, as generate() compiles it on a GPU; the kernels are custom ops in it."""
    plain, ours = twins()
    ids = text_batch(plain, batch=1)["input_ids"]
    monkeypatch.setattr(text, "decode", DECODE)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        caches = [StaticCache(model.config, max_cache_len=24) for model in (plain, ours)]
        for model, cache in zip((plain, ours), caches):
            model(ids[:, :17], past_key_values=cache)
        compiled = torch.compile(ours, backend=backend, fullgraph=True)
        for at in (17, 18):
            options = {"position_ids": torch.tensor([[at]])}
            want = plain(ids[:, at : at + 1], past_key_values=caches[0], **options).logits
            got = compiled(ids[:, at : at + 1], past_key_values=caches[1], **options).logits
            assert_same({"logits": got}, {"logits": want}, FP32)
    kernels = not why_no_triton("cpu")
    for op, count in {"decode_qkv": 1, "decode_linear": 2, "decode_swiglu": 1}.items():
        assert sum(f"m3kernels.{op}" in target for target in seen) == kernels * count * LAYERS, op


# --- how much a token launches

VIEWS = {
    *("view", "_unsafe_view", "reshape", "expand", "alias", "detach", "as_strided"),
    *("transpose", "t", "permute", "unsqueeze", "squeeze", "slice", "select", "split", "unbind"),
}


class Launches(TorchDispatchMode):
    """Operations of torch that compute something: on a GPU each is a kernel at least."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in VIEWS and not name.startswith(("empty", "new_empty", "promote_types")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launched(layer: nn.Module, rows: int, table: torch.dtype = torch.float32) -> list[str]:
    """What a layer launches for a token of each row, a prompt of four behind it; kernels of ours are not run."""
    cache, x = DynamicCache(), torch.randn(rows, 1, 48, dtype=HALF)
    cache.update(*torch.randn(2, rows, 2, 4, 10, dtype=HALF), 0)
    options = {
        "position_ids": torch.tensor([[4]]),
        "position_embeddings": torch.randn(2, 1, 1, 10, dtype=table).unbind(),
    }
    names = []
    for module in [m for name, m in sys.modules.items() if name.startswith("m3kernels.ops") and hasattr(m, "launch")]:
        module.launch = lambda op, *args, **meta: names.append(op)
    with torch.no_grad(), Launches(names):
        layer(x, past_key_values=cache, **options)
    return names


@pytest.mark.skipif(not why_no_triton("cpu"), reason="counts kernels without running them")
@pytest.mark.parametrize("rows", [1, 4])
def test_launches_of_a_layer_and_token(rows, monkeypatch):
    plain, ours = twins(dtype=HALF)
    for name, module in list(sys.modules.items()):
        if name.startswith("m3kernels.") and hasattr(module, "why_no_triton"):
            monkeypatch.setattr(module, "why_no_triton", lambda device_type: "")
        if name.startswith("m3kernels.ops") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", module.launch)
    # several rows of fp32 are BLAS's where nothing is interpreted
    monkeypatch.setattr(_decode_products, "INTERPRET", True)
    fused = launched(ours.model.layers[0], rows)
    ops = {"decode_qkv": 1, "cat": 2, "attention_decode": 2, "decode_linear": 2, "decode_swiglu": 1}
    assert Counter(fused) == ops
    monkeypatch.setattr(text, "decode_weights", lambda *args: None)
    modules = launched(ours.model.layers[0], rows)
    eager = launched(plain.model.layers[0], rows, HALF)
    assert (len(fused), len(modules)) == (8, 16) and len(eager) >= 40, f"{modules} {eager}"
