"""PEFT around and inside patched models: every result is that of PEFT on an unpatched model."""

import copy
import os

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)

from m3kernels import is_patched, patch, unpatch
from m3kernels.ops._common import use_triton
from models import (
    FP32,
    assert_both,
    assert_error_at_most_eagers,
    assert_parity,
    assert_same,
    batch_for,
    build,
    gradients,
    text_batch,
    twins,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**changes) -> LoraConfig:
    """Both matrices drawn: with PEFT's zero B the adapter would do nothing, and its tests would see nothing."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "init_lora_weights": False}
    return LoraConfig(**{**options, **changes})


def wrap(model, config, name: str = "default"):
    torch.manual_seed(5)
    return get_peft_model(model, copy.deepcopy(config), adapter_name=name)  # PEFT writes into the configuration


ADAPTERS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "dropout": lora(lora_dropout=0.4),
    "dora with dropout": lora(use_dora=True, lora_dropout=0.4),
    "lora bias": lora(lora_bias=True, target_modules=["q_proj"], init_lora_weights=True),
    "all linear": lora(target_modules="all-linear"),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "head with dora": lora(target_modules=["lm_head"], use_dora=True),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "head saved": lora(modules_to_save=["lm_head"]),
    "norms saved": lora(modules_to_save=["norm", "input_layernorm", "post_attention_layernorm"]),
    "head and embeddings saved": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "mlp saved": lora(target_modules=["q_proj"], modules_to_save=["mlp"]),
    "some tokens": lora(trainable_token_indices={"embed_tokens": [12, 20, 30]}),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "all weights of one layer": lora(target_parameters=["layers.0.self_attn.q_proj.weight"], target_modules=[]),
}  # fmt: skip


def pair_with(config, kind: str, order: str, device: str, **options):
    """(PEFT on the plain model, PEFT with a patch before or after)."""
    plain = build(kind, device=device, **options)
    ours = copy.deepcopy(plain)
    if order == "before":
        patch(ours)
    plain, ours = wrap(plain, config), wrap(ours, config)
    if order == "after":
        patch(ours)
    return plain, ours


def kernels_run(device: str) -> bool:
    return use_triton("lora_linear", "auto", torch.empty(1, device=device))


def disturb(model) -> None:
    """Adapters and saved modules away from where PEFT starts them, in the same way for both models."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, order, kind, device):
    plain, ours = pair_with(ADAPTERS[name], kind, order, device)
    disturb(plain), disturb(ours)
    if name == "dropout" and kernels_run(device):
        # its masks are drawn from a counter, not by torch's dropout: tests/ops/test_lora.py
        for module in (*plain.modules(), *ours.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert is_patched(ours)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in plain.named_parameters() if p.requires_grad
    ]
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.parametrize("order", ["before", "after"])
def test_tied_embeddings(order, device):
    config = lora(modules_to_save=["lm_head", "embed_tokens"], target_modules=["q_proj"], ensure_weight_tying=True)
    plain, ours = pair_with(config, "text", order, device, tie_word_embeddings=True)
    disturb(plain), disturb(ours)
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_tokens_of_a_tied_head(order, tied, device):
    """With tied weights PEFT wraps the head as well: the new tokens' rows must reach the loss, and train from it."""
    config = lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [12, 20, 30]})
    plain, ours = pair_with(config, "text", order, device, tie_word_embeddings=tied)
    disturb(plain), disturb(ours)
    batch = text_batch(plain)
    batch["labels"][:, -4:] = 20
    assert_parity(ours, plain, batch)


@pytest.mark.interpreter
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["head", "head with dora", "head saved"])
def test_the_head_trains(name, order, device):
    """``lora.Linear.weight`` is the base weight: a loss fused on it would ignore the adapter without a word."""
    plain, ours = pair_with(ADAPTERS[name], "text", order, device)
    ours.train()
    ours(**text_batch(ours)).loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if "lm_head" in n and p.requires_grad}
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads.values()), grads.keys()
    with torch.no_grad():
        before = ours(**text_batch(ours)).loss
        next(p for n, p in ours.named_parameters() if n in grads).mul_(3)
        assert abs(ours(**text_batch(ours)).loss - before) > 1e-3  # FP32 rounding is 1e-6 of a loss of about 5


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["lora", "dora", "head", "head saved", "norms saved", "mlp saved"])
def test_adapter_switched_off(name, order, device):
    plain, ours = pair_with(ADAPTERS[name], "text", order, device)
    disturb(plain), disturb(ours)
    batch = text_batch(plain)
    base = build(device=device)
    ours.train(), base.train()
    with ours.disable_adapter():
        assert_same({"loss": ours(**batch).loss}, {"loss": base(**batch).loss}, FP32)
        ours.eval(), base.eval()
        assert_same({"logits": ours(**batch).logits}, {"logits": base(**batch).logits}, FP32)
    assert_parity(ours, plain, batch)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["lora", "dora", "head", "head saved", "norms saved"])
def test_merging(name, order, kind, device):
    plain, ours = pair_with(ADAPTERS[name], kind, order, device)
    disturb(plain), disturb(ours)
    batch = batch_for(plain)
    ours.merge_adapter(), plain.merge_adapter()
    with torch.no_grad():
        assert_both(ours, plain, lambda model: model.eval()(**batch).logits)
    ours.unmerge_adapter(), plain.unmerge_adapter()
    ours, plain = ours.merge_and_unload(), plain.merge_and_unload()
    assert type(ours).__name__ == type(plain).__name__ and is_patched(ours)
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in plain.modules()]
    ours.requires_grad_(True), plain.requires_grad_(True)
    assert_parity(ours, plain, batch)
    patch(ours)
    unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert_parity(ours, plain, batch, 0.0)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["lora", "head", "head saved", "norms saved"])
def test_several_adapters(name, order, device):
    plain, ours = pair_with(ADAPTERS[name], "text", order, device)
    batch = text_batch(plain)
    for model in (plain, ours):
        torch.manual_seed(6)
        model.add_adapter("second", ADAPTERS[name])
    disturb(plain), disturb(ours)
    for adapter in ("second", "default"):
        plain.set_adapter(adapter), ours.set_adapter(adapter)
        disturb(plain), disturb(ours)
        assert_parity(ours, plain, batch)
    for model in (plain, ours):
        model.delete_adapter("default")
        model.set_adapter("second")
    assert_parity(ours, plain, batch)


def test_a_batch_of_adapters(device):
    plain, ours = pair_with(lora(), "text", "before", device)
    for model in (plain, ours):
        torch.manual_seed(6)
        model.add_adapter("second", lora())
    batch = {k: v for k, v in text_batch(plain, batch=3).items() if k != "labels"}
    names = ["default", "__base__", "second"]
    assert_both(ours, plain, lambda model: model.eval()(**batch, adapter_names=names).logits)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["lora", "dora", "head", "head saved", "norms saved"])
def test_saved_adapter_loads_in_plain_peft(name, order, kind, tmp_path, device):
    plain, ours = pair_with(ADAPTERS[name], kind, order, device)
    disturb(plain), disturb(ours)
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "plain"))
    reloaded = PeftModel.from_pretrained(build(kind, device=device), tmp_path / "ours", is_trainable=True)
    batch = batch_for(plain)
    assert_parity(reloaded, plain, batch, 0.0)
    base = build(kind, device=device)
    patch(base)
    assert_parity(PeftModel.from_pretrained(base, tmp_path / "plain", is_trainable=True), plain, batch)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("order", ["before", "after"])
def test_prompt_learning(config, order, device):
    plain, ours = pair_with(config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5), "text", order, device)
    batch = text_batch(plain, padding="right")
    assert_parity(ours, plain, batch)


def test_native_adapters(text_pair):
    """transformers' own ``model.add_adapter``: no wrapper, and its save writes the adapter."""
    plain, ours = text_pair
    try:
        copy.deepcopy(plain).add_adapter(lora())
    except ValueError as refusal:  # transformers 5.24 asks for a PEFT newer than any that is out
        if "PEFT" not in str(refusal):
            raise
        pytest.skip(f"transformers refuses the installed peft: {refusal}")
    for model in (plain, ours):
        torch.manual_seed(5)
        model.add_adapter(lora())
    assert_parity(ours, plain, text_batch(plain))
    for model in (plain, ours):
        model.disable_adapters()
    assert_both(ours, build(device=plain.device), lambda model: model(**text_batch(plain)).logits)


@pytest.mark.parametrize("order", ["before", "after"])
def test_gradient_checkpointing_with_adapters(order, device):
    plain, ours = pair_with(lora(), "text", order, device)
    for model in (plain, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_parity(ours, plain, text_batch(plain))


@pytest.mark.parametrize("order", ["before", "after"])
def test_kbit_preparation(order, device):
    """fp32 norms and head over a bf16 body under autocast, as 4-bit training has them."""
    plain = build(device=device, dtype=torch.bfloat16)
    ours = copy.deepcopy(plain)
    if order == "before":
        patch(ours)
    for model in (plain, ours):
        model.is_loaded_in_8bit = True  # norms and everything else not quantised goes to fp32
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for name, p in model.named_parameters():
            if "proj" in name:
                p.data = p.data.bfloat16()
    if order == "after":
        patch(ours)
    plain, ours = wrap(plain, lora()), wrap(ours, lora())
    assert plain.base_model.model.model.norm.weight.dtype == torch.float32
    assert_error_at_most_eagers(ours, plain, lambda: torch.autocast(device, torch.bfloat16))


def test_unpatch_under_peft(kind, device):
    plain, ours = pair_with(lora(modules_to_save=["lm_head"]), kind, "before", device)
    disturb(plain), disturb(ours)
    unpatch(ours)
    assert not is_patched(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert_parity(ours, plain, batch_for(plain), 0.0)


@pytest.mark.parametrize("order", ["before", "after"])
def test_generate_with_an_adapter(order, kind, device):
    plain, ours = pair_with(ADAPTERS["dora"], kind, order, device)
    batch = {k: v for k, v in batch_for(plain).items() if k != "labels"}
    assert_both(ours, plain, lambda model: model.eval().generate(**batch, max_new_tokens=5, do_sample=False))


def test_compile_with_an_adapter(device):
    plain, ours = pair_with(lora(), "text", "before", device)
    batch = text_batch(plain)
    torch._dynamo.reset()
    ours.train(), plain.train()
    torch.compile(ours, backend="aot_eager")(**batch, use_cache=False).loss.backward()
    plain(**batch).loss.backward()
    assert_same(gradients(ours), gradients(plain), FP32)


def test_adapter_loss_falls(device):
    """Some steps of an optimiser move adapter and head as they do without the patch."""
    plain, ours = pair_with(lora(modules_to_save=["lm_head"]), "text", "before", device)
    batch = text_batch(plain)
    losses = []
    for model in (plain, ours):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # rounding grows with every step, here by less than ten
    assert losses[4:] == pytest.approx(losses[:4], rel=10 * FP32)
    assert losses[3] < losses[0]


def test_twins_share_nothing():
    plain, ours = twins()
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in ours.parameters()}
