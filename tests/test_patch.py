"""The registry itself: what is patched, what the report says, what is refused and how."""

import copy
import dataclasses
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    Mistral3ForConditionalGeneration,
    MistralConfig,
)

import m3kernels
from m3kernels import PatchReport, is_patched, patch, patched, unpatch
from m3kernels.patching import PatchError, rules
from m3kernels.patching.classes import is_fused
from models import (
    FP32,
    FP64,
    assert_parity,
    batch_for,
    build,
    float64_islands,
    rope,
    text_batch,
    text_config,
    twins,
    vlm_config,
)

OPS = (
    *("rms_norm", "add_rms_norm", "rotary", "rotary_2d", "attention", "swiglu"),
    *("fp8_linear", "lora_linear", "linear_cross_entropy"),
)
# text: 2 layers of 2 norms and the last norm; 2 attentions and their table
# vlm: also 2 vision layers of 2 norms, ln_pre and the projector's norm; 2 attentions and their table
COUNTS = {
    "text": dict(zip(OPS, (5, 2, 3, 0, 2, 2, 0, 0, 1))),
    "vlm": dict(zip(OPS, (11, 4, 3, 3, 4, 4, 0, 0, 1))),
}


def fused_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_fused(module)]


# --- what is patched


def test_counts(kind):
    model = build(kind)
    report = patch(model)
    assert isinstance(report, PatchReport)
    assert report.patched == COUNTS[kind] and report.skipped == []
    # the loss fuses the model and its head; attention is the configs', but for the vision model's forward
    others = sum(n for op, n in COUNTS[kind].items() if op != "attention")
    assert len(fused_modules(model)) == others + 1 + (kind == "vlm")
    assert report.architecture == type(model).__name__
    assert set(report.backend) == set(OPS)


def test_everything_that_could_be_fused_is(kind):
    """Every module with weights of its own but projections, embeddings and the patch merger has a fused forward."""
    model = build(kind)
    patch(model)
    left = {type(m).__name__ for m in model.modules() if not is_fused(m)}
    assert left <= {
        "Linear", "Embedding", "Conv2d", "ModuleList", "SiLUActivation", "GELUActivation", "Ministral3Model", "Mistral3Model",
        "PixtralVisionModel", "PixtralTransformer", "Mistral3MultiModalProjector", "Mistral3PatchMerger",
    }  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_one_op_alone(op, kind):
    plain = build(kind)
    ours = copy.deepcopy(plain)
    report = patch(ours, ops=[op])
    assert report.patched == {op: COUNTS[kind][op]}
    assert_parity(ours, plain, batch_for(plain))


def test_subset_in_any_order(kind):
    model = build(kind)
    report = patch(model, ops=("swiglu", "rms_norm"))
    assert report.patched == {op: COUNTS[kind][op] for op in ("rms_norm", "swiglu")}
    rest = patch(model)
    assert rest.patched == COUNTS[kind]


def test_each_op_is_called(kind, monkeypatch):
    """A patch that counts modules but never runs an op would pass every parity test."""
    _, ours = twins(kind)
    calls = dict.fromkeys(OPS, 0)

    def counting(op, real):
        def call(*args, **kwargs):
            calls[op] += 1
            return real(*args, **kwargs)

        return call

    where = {"rotary_2d": "vision", "linear_cross_entropy": "loss"}
    # attention is called through transformers' registry, and on a CPU it is another's: test_attention_is_ours
    # lora_linear and fp8_linear: test_patch_lora.py, test_patch_fp8.py
    for op in (op for op in OPS if op not in ("attention", "fp8_linear", "lora_linear")):
        target = f"m3kernels.patching.{where.get(op, 'text')}.{op}"
        monkeypatch.setattr(target, counting(op, getattr(m3kernels.ops, op)))
    ours.train()
    ours(**batch_for(ours)).loss.backward()
    # norms after a residual add are the fused form's
    expected = dict(COUNTS[kind])
    expected["rms_norm"] -= expected["add_rms_norm"]
    expected["rotary"] = 2
    expected["rotary_2d"] = 2 if kind == "vlm" else 0
    expected["attention"] = 0
    assert calls == expected


def test_attention_is_ours_until_unpatched(kind):
    model = build(kind)
    configs = [m.config for m in model.modules() if type(m).__name__ in ("Ministral3Attention", "PixtralAttention")]
    assert {c._attn_implementation for c in configs} == {"sdpa"}
    first = patch(model, ops="swiglu")
    assert {c._attn_implementation for c in configs} == {"sdpa"}
    second = patch(model)
    assert {c._attn_implementation for c in configs} == {"m3kernels"}
    second.restore()
    assert {c._attn_implementation for c in configs} == {"sdpa"} and is_patched(model)
    first.restore()
    assert not is_patched(model)
    patch(model, attention="keep")
    assert {c._attn_implementation for c in configs} == {"sdpa"}


def test_transformers_knows_the_name(kind):
    model = build(kind)
    model.set_attn_implementation("m3kernels")
    plain = build(kind)
    plain.load_state_dict(model.state_dict())
    assert_parity(model, plain, batch_for(plain))


def test_another_implementation_set_after_patching_stays():
    model = build("text")
    patch(model)
    model.set_attn_implementation("eager")
    unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_add_rms_norm_alone_runs(monkeypatch):
    model = build()
    calls = []
    real = m3kernels.ops.add_rms_norm
    monkeypatch.setattr("m3kernels.patching.text.add_rms_norm", lambda *a: calls.append(1) or real(*a))
    report = patch(model, ops="add_rms_norm")
    model(**text_batch(model))
    assert len(calls) == report.patched["add_rms_norm"]


def test_skipped_with_a_reason():
    plain = build("vlm", vision={"hidden_act": "gelu"})
    ours = copy.deepcopy(plain)
    report = patch(ours)
    assert report.patched["swiglu"] == 2
    assert [s.op for s in report.skipped] == ["swiglu"] * 2
    assert all("feed_forward" in s.module and "silu" in s.reason for s in report.skipped)
    assert "2 x activation is GELUActivation, not silu" in str(report)
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_in_the_text_model(activation):
    plain = build(hidden_act=activation)
    ours = copy.deepcopy(plain)
    assert patch(ours).patched["swiglu"] == 0
    assert_parity(ours, plain, batch_for(plain))


def test_activation_changed_after_patching():
    plain, ours = twins()
    for model in (plain, ours):
        model.model.layers[0].mlp.act_fn = nn.GELU()
    assert_parity(ours, plain, batch_for(plain))


def test_derived_classes_are_skipped():
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RMSNorm

    class Doubling(Ministral3RMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    plain = build()
    plain.model.norm.__class__ = plain.model.layers[0].post_attention_layernorm.__class__ = Doubling
    ours = copy.deepcopy(plain)
    report = patch(ours)
    assert {s.module for s in report.skipped} == {"model.norm", "model.layers.0.post_attention_layernorm"}
    assert_parity(ours, plain, batch_for(plain))


def test_derived_models_are_patched():
    """A user's subclass of the whole model: its layers are ours, its own forward stays its own."""

    class Mine(Ministral3ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.loss = out.loss * 3
            return out

    plain = build()
    plain.__class__ = Mine
    ours = copy.deepcopy(plain)
    report = patch(ours)
    assert report.patched["rms_norm"] == 5
    batch = batch_for(plain)
    ours.train(), plain.train()
    assert ours(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=FP32)


# --- the report


def test_report_prints_a_table(kind):
    report = patch(build(kind))
    lines = str(report).splitlines()
    assert type(report.model).__name__ in lines[0]
    for op, count in COUNTS[kind].items():
        row = next(line for line in lines if line.startswith(op + " "))
        assert row.split()[1] == str(count)
        assert ("reference" in row and "cpu" in row) == bool(count) or m3kernels.ops._common.INTERPRET
    assert len(repr(report)) < 2000, "the report prints the whole model"


def test_restore(kind):
    model = build(kind)
    types_before = [type(m) for m in model.modules()]
    report = patch(model)
    report.restore()
    assert [type(m) for m in model.modules()] == types_before
    report.restore()  # twice does no harm
    with patch(model) as report:
        assert is_patched(model)
    assert not is_patched(model)


def test_patched_block(kind):
    model = build(kind)
    with patched(model, ops="swiglu") as report:
        assert report.patched == {"swiglu": COUNTS[kind]["swiglu"]} and is_patched(model)
    assert not is_patched(model)
    assert unpatch(model) is model


def test_patched_block_inside_a_patch():
    model = build()
    patch(model, ops="rms_norm")
    outer = fused_modules(model)
    with patched(model):
        pass
    assert fused_modules(model) == outer


def test_twice_is_once(kind):
    model = build(kind)
    first, types_before = patch(model), None
    types_before = [type(m) for m in model.modules()]
    second = patch(model)
    assert [type(m) for m in model.modules()] == types_before
    assert first.patched == second.patched and second.skipped == []
    unpatch(model)
    assert not is_patched(model)


def test_patch_unpatch_leaks_no_classes():
    model = build()
    patch(model)
    cls = type(model.model.norm)
    unpatch(model)
    patch(model)
    assert type(model.model.norm) is cls
    assert len([c for c in cls.__mro__[1].__subclasses__() if c.__qualname__ == cls.__qualname__]) == 1


def test_one_class_for_all_models():
    a, b = twins()[1], twins()[1]
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


# --- refusals


TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _llama():
    return LlamaForCausalLM(LlamaConfig(**TINY))


def _mistral3_with_mistral():
    config = vlm_config()
    config.text_config = MistralConfig(**TINY, num_key_value_heads=1, head_dim=8)
    return Mistral3ForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make", [_llama, _mistral3_with_mistral, lambda: nn.Linear(2, 2), lambda: nn.Sequential(build())]
)
@pytest.mark.parametrize("strict", [True, False])
def test_other_architectures(make, strict):
    model = make()
    types_before = [type(m) for m in model.modules()]
    with pytest.raises(PatchError, match="ministral3|Ministral3ForCausalLM") as error:
        patch(model, strict=strict)
    assert type(model).__name__ in str(error.value)
    assert [type(m) for m in model.modules()] == types_before


def test_not_a_model():
    with pytest.raises(TypeError, match="str"):
        patch("mistralai/Ministral-3-3B")


MISSPELT = {
    "rmsnorm": "rms_norm",
    "swi_glu": "swiglu",
    "cross_entropy": "linear_cross_entropy",
    "rotary2d": "rotary_2d",
}


@pytest.mark.parametrize("given, meant", MISSPELT.items())
def test_unknown_op(given, meant):
    model = build()
    with pytest.raises(ValueError, match=f"{given}.*did you mean '{meant}'"):
        patch(model, ops=["rms_norm", given])
    assert not is_patched(model)


def test_unknown_op_that_is_like_none():
    with pytest.raises(ValueError, match="'zzz'.*linear_cross_entropy") as error:
        patch(build(), ops="zzz")
    assert "did you mean" not in str(error.value)


def test_unknown_attention():
    model = build()
    with pytest.raises(ValueError, match="flash"):
        patch(model, attention="flash")
    assert not is_patched(model)


VERSIONS = {"4.57.1": True, "5.0.0": True, "5.16.9": True, "5.17.0": False, "5.17.0.dev0": False, "6.0.0rc1": False}


@pytest.mark.parametrize("version, refused", VERSIONS.items())
def test_transformers_version(version, refused, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    model = build()
    if refused:
        with pytest.raises(PatchError, match=f"{version}.*5.17"):
            patch(model)
    else:
        patch(model)
    assert is_patched(model) != refused


@pytest.mark.parametrize("part", ["attributes", "parameters"])
@pytest.mark.parametrize("name", ["Ministral3RMSNorm", "PixtralAttention", "Ministral3ForCausalLM"])
def test_a_changed_class(name, part, monkeypatch):
    """strict raises and changes nothing; otherwise the class stays unfused, reported, and the results right."""
    changed = tuple(
        dataclasses.replace(rule, **{part: (*getattr(rule, part), "brand_new")}) if rule.name == name else rule
        for rule in rules.RULES
    )
    monkeypatch.setattr(rules, "RULES", changed)
    plain = build("vlm" if "Pixtral" in name else "text")
    ours = copy.deepcopy(plain)
    with pytest.raises(PatchError, match=f"{name}.*brand_new"):
        patch(ours)
    assert not is_patched(ours)
    report = patch(ours, strict=False)
    reasons = {s.reason for s in report.skipped if "brand_new" in s.reason}
    assert len(reasons) == 1 and not any(type(m).__name__ == name and is_fused(m) for m in ours.modules())
    assert_parity(ours, plain, batch_for(plain))


def test_an_error_while_patching_changes_nothing(monkeypatch):
    """A class whose facts cannot be read (transformers moved a function) must not leave half a patch."""
    from m3kernels.patching import classes

    model = build()
    forward, _ = classes.FORWARDS["linear_cross_entropy"]

    def fail(original):
        raise AttributeError("moved")

    monkeypatch.setitem(classes.FORWARDS, "linear_cross_entropy", (forward, fail))
    classes.fused_class.cache_clear()
    try:
        with pytest.raises(AttributeError, match="moved"):
            patch(model)
        assert not is_patched(model)
    finally:
        classes.fused_class.cache_clear()


# --- rotary configurations that transformers itself fails on


@pytest.mark.parametrize("missing", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_no_query_scale_configured(missing):
    """transformers fails without either key; ours is a model without the scale: that of beta 0."""
    changes = {"rope_type": "linear", "factor": 2.0}
    plain = build(rope_parameters=rope(**changes, llama_4_scaling_beta=0.0))
    ours = build(rope_parameters=rope(**{**changes, missing: None}))
    batch = text_batch(plain)
    with pytest.raises(TypeError):
        ours(**batch)
    patch(ours)
    assert_parity(ours, plain, batch)


def test_default_rope_type():
    default = {"rope_type": "default", "rope_theta": 500.0}
    plain = build(rope_parameters={**default, "llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 8})
    ours = build(rope_parameters=default)
    patch(ours)
    assert_parity(ours, plain, text_batch(plain))


def test_dynamic_rope_grows_and_shrinks():
    """The decorator that changes inv_freq with the sequence length keeps its state on the module."""
    plain, ours = twins(rope_parameters=rope(rope_type="dynamic"), max_position_embeddings=16)
    for seq in (8, 40, 24, 8):
        batch = text_batch(plain, seq=seq)
        assert_parity(ours, plain, batch)
        assert torch.equal(ours.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_scale_read_at_every_forward():
    """As in transformers, a change of the configuration counts from the next forward on."""
    plain, ours = twins()
    batch = text_batch(plain)
    for model in (plain, ours):
        model.config.rope_parameters["llama_4_scaling_beta"] = 1.5
    assert_parity(ours, plain, batch)


@pytest.mark.parametrize("position", [16_383, 16_384, 262_143])
def test_far_positions(position):
    """The released lengths: the scale starts at 16,384, and angles are large."""
    released = rope(rope_theta=1e6, factor=16.0, original_max_position_embeddings=16_384, llama_4_scaling_beta=0.1)
    plain, ours = twins(rope_parameters=released, max_position_embeddings=262_144, dtype=torch.float64)
    batch = text_batch(plain, seq=6)
    batch["position_ids"] = torch.arange(6)[None] + position - 2
    with float64_islands():
        assert_parity(ours, plain, batch, FP64)
    # in fp32 both round the same angle the same way
    plain, ours = plain.float(), ours.float()
    assert_parity(ours, plain, batch)


# --- forwards keep their face


def test_signatures(kind):
    import inspect

    plain, ours = twins(kind)
    for a, b in zip(plain.modules(), ours.modules()):
        assert inspect.signature(type(a).forward) == inspect.signature(type(b).forward), type(a)
        assert (
            isinstance(b, type(a)) and type(a).__module__ == type(b).__module__ and type(a).__doc__ == type(b).__doc__
        )
    assert ours.can_generate() and isinstance(ours.forward, types.MethodType)


def test_config_is_untouched(kind):
    plain, ours = twins(kind)
    assert (
        ours.config.to_dict() == plain.config.to_dict()
        and ours.config.to_json_string() == plain.config.to_json_string()
    )
    assert text_config().to_dict()["rope_parameters"] == rope() | {"rope_type": "yarn"}
