"""m3kernels.generate on models inside PEFT: adapters count as they do there, or are refused."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

import m3kernels
from m3kernels.models.generation import kept
from m3kernels.models.generation.prompt import GenerationError
from models import build, inputs, text_batch

GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def wrapped(base=None, *, kind: str = "text", scale: float = 0.3, name: str = "default", **options):
    """A model with adapters that change what it says."""
    torch.manual_seed(0)
    base = build(kind) if base is None else base
    options = {"target_modules": ATTENTION, "r": 3, **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options), name)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.mul_(scale / parameter.std().clamp(min=1e-3) if parameter.dim() > 1 else 1.2)
    return model.eval()


def compared(model, **options) -> torch.Tensor:
    batch = inputs(text_batch(model, batch=2, seq=12, padding="left"))
    want = model.generate(**batch, **GREEDY, **options)
    got = m3kernels.generate(model, **batch, **GREEDY, **options)
    assert torch.equal(got, want), f"{got.tolist()}\n{want.tolist()}"
    return want


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora on the mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "use_rslora": True, "lora_alpha": 7},
    "ranks": {"rank_pattern": {"q_proj": 5}},
    "with dropout": {"lora_dropout": 0.3},
    "one copy": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ["text", "vlm"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_count(name, kind):
    model = wrapped(kind=kind, **ADAPTERS[name])
    places = {n: (id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()}
    adapted = compared(model)
    with model.disable_adapter():
        plain = compared(model)
    assert not torch.equal(adapted, plain)
    generator = kept._kept[model.get_base_model()].generator
    assert torch.equal(compared(model), adapted)
    assert kept._kept[model.get_base_model()].generator is not generator, "on again, they are another model"
    assert {n: (id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()} == places


def test_saved_copies_count():
    model = wrapped(modules_to_save=["lm_head"])
    before = compared(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(-1)
    assert not torch.equal(compared(model), before)


def test_merged_adapters_are_fused():
    model = wrapped()
    adapted = compared(model)
    base = model.get_base_model()
    assert "adapters" in kept._kept[base].generator.why_not
    model.merge_adapter()
    assert torch.equal(compared(model), adapted)
    assert kept._kept[base].generator.fused
    model.unmerge_adapter()
    assert torch.equal(compared(model), adapted)
    merged = model.merge_and_unload()
    assert torch.equal(compared(merged), adapted)


def test_switched_and_scaled_adapters():
    model = wrapped()
    first = compared(model)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.equal(compared(model), first)
    model.set_adapter("default")
    assert torch.equal(compared(model), first)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 4.0)
    assert not torch.equal(compared(model), first)


def test_patched_models_with_adapters():
    model = wrapped(use_dora=True)
    want = compared(model)
    m3kernels.patch(model)
    assert torch.equal(compared(model), want)


def test_training_goes_on():
    model = wrapped()
    batch = text_batch(model)
    before = compared(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(compared(model), before) and model.training


def _two(model):
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


REFUSED = {
    "two at once": (lambda: _two(wrapped()), "2 adapters are active.*merge"),
    "on the head": (lambda: wrapped(target_modules=["lm_head"]), "adapter on the head.*merge"),
    "biased": (lambda: wrapped(lora_bias=True), "adapter with a bias.*merge"),
    "dropping": (lambda: wrapped(lora_dropout=0.3).train(), r"dropout in training mode.*model\.eval"),
    "on the embedding": (
        lambda: wrapped(target_modules=["embed_tokens"]),
        "embed_tokens is a peft.tuners.lora.layer.Embed",
    ),
    "ia3": (
        lambda: get_peft_model(
            build(), IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
        ),
        "k_proj is a peft.tuners.ia3",
    ),
    "prompt": (
        lambda: get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(name):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(GenerationError, match=message):
        m3kernels.generate(model, torch.full((1, 4), 20), max_new_tokens=2)
