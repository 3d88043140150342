"""Checkpointing, compilation, saving, copying, resizing, optimizer steps: a patched model does what its unpatched twin does."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Ministral3ForCausalLM, Mistral3ForConditionalGeneration

from m3kernels import is_patched, patch, unpatch
from models import (
    FP32,
    assert_both,
    assert_parity,
    assert_same,
    batch_for,
    build,
    float64_islands,
    gradients,
    inputs,
    observe,
    tensors,
    text_batch,
    twins,
)

# --- memory and compilation


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, device, reentrant):
    plain, ours = twins(kind, device=device)
    batch = batch_for(plain)
    reference = observe(plain, batch)
    counts = []
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        calls = []
        handles = [
            m.register_forward_hook(lambda m, a, o, calls=calls: calls.append(1))
            for n, m in model.named_modules()
            if n.endswith("gate_proj")
        ]
        seen = observe(model, batch)
        counts.append(len(calls))
        for handle in handles:
            handle.remove()
        assert_same({k: v for k, v in seen.items() if k in reference}, reference, FP32)
    layers = 2 if kind == "text" else 4
    # once forward, once recomputed, once in observe's eval forward; reentrant needs an input that requires grad
    assert counts[0] == counts[1] == 3 * layers
    ours.gradient_checkpointing_disable()
    ours.disable_input_require_grads()
    assert_parity(ours, plain, batch)


def test_input_gradient_reaches_embeddings_given(text_pair):
    plain, ours = text_pair
    batch = text_batch(plain)

    def run(model):
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model.train()
        model(inputs_embeds=embeds, labels=batch["labels"]).loss.backward()
        return embeds.grad

    assert_both(ours, plain, run)


@pytest.mark.interpreter
@pytest.mark.parametrize("frozen", ["lm_head", "norm", "model.layers.0", "all but lm_head", "all but norms"])
def test_frozen_parts(text_pair, frozen):
    plain, ours = text_pair
    for model in (plain, ours):
        for name, p in model.named_parameters():
            inside = frozen.removeprefix("all but ").rstrip("s") in name
            p.requires_grad_(inside if frozen.startswith("all but") else not inside)
    assert_parity(ours, plain, text_batch(plain))


def _compiled_step(model, batch):
    model.train()
    step = torch.compile(lambda **b: model(**b, use_cache=False).loss, fullgraph=True, backend="aot_eager")
    loss = step(**batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.interpreter
@pytest.mark.parametrize("padding", ["", "right"])
def test_compile_training(text_pair, padding):
    plain, ours = text_pair
    batch = text_batch(plain, padding=padding)
    torch._dynamo.reset()
    compiled = _compiled_step(ours, batch)
    plain.train()
    loss = plain(**batch, use_cache=False).loss
    loss.backward()
    assert_same(compiled, {"loss": loss.detach(), **gradients(plain)}, FP32)


@pytest.mark.interpreter
def test_compile_inference(text_pair):
    plain, ours = text_pair
    batch = inputs(text_batch(plain))
    torch._dynamo.reset()
    with torch.no_grad():
        step = torch.compile(lambda ids: ours(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        assert_same({"logits": step(batch["input_ids"])}, {"logits": plain(**batch).logits}, FP32)


def test_compile_vision_layers(vlm_pair):
    """The tower as a whole breaks graphs in transformers too; its layers do not."""
    plain, ours = vlm_pair
    hidden = torch.randn(1, 12, 40, device=next(plain.parameters()).device)
    at = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], -1).to(hidden.device)
    torch._dynamo.reset()

    def run(tower):
        return tower.transformer(
            hidden, position_embeddings=tower.patch_positional_embedding(hidden, at)
        ).last_hidden_state

    compiled = torch.compile(lambda: run(ours.model.vision_tower), fullgraph=True, backend="aot_eager")
    assert_same({"out": compiled()}, {"out": run(plain.model.vision_tower)}, FP32)


def test_patch_through_a_compile_wrapper(text_pair):
    plain, _ = text_pair
    ours = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    assert patch(ours).patched["rms_norm"] == 5
    torch._dynamo.reset()
    batch = inputs(text_batch(plain))
    with torch.no_grad():
        assert_same(tensors(ours(**batch, use_cache=False)), tensors(plain(**batch, use_cache=False)), FP32)


# --- saving, copying, resizing


def test_save_and_load(pair, tmp_path):
    plain, ours = pair
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    for name in os.listdir(tmp_path / "plain"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    cls = Ministral3ForCausalLM if "Ministral3" in type(plain).__name__ else Mistral3ForConditionalGeneration
    loaded = cls.from_pretrained(tmp_path / "ours").to(plain.device)
    assert not is_patched(loaded) and type(loaded) is cls
    assert loaded.config.architectures == [cls.__name__]
    batch = batch_for(plain)
    assert_parity(loaded, plain, batch, 0.0)
    patch(loaded)
    assert_parity(loaded, plain, batch)


def test_auto_class_and_dtype_on_load(tmp_path, device):
    """``dtype=bfloat16`` on load keeps inv_freq in fp32, unlike ``.to``: both are met in practice."""
    build().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to(device)
    ours, truth = copy.deepcopy(plain), copy.deepcopy(plain).double()
    patch(ours)
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    batch = inputs(text_batch(plain))
    with torch.no_grad(), float64_islands():
        exact = truth(**batch).logits
    off, eager = ((model(**batch).logits.double() - exact).norm().item() for model in (ours, plain))
    assert off <= 1.5 * eager  # 6342 logits: no allowance for chance


def test_state_dict(pair):
    plain, ours = pair
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert ours.load_state_dict(plain.state_dict()) and [n for n, _ in plain.named_modules()] == [
        n for n, _ in ours.named_modules()
    ]
    assert [type(m).__name__ for m in plain.modules()] == [type(m).__name__ for m in ours.modules()]
    assert str(plain) == str(ours)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_patched(kind, device, way, tmp_path):
    plain, ours = twins(kind, device=device)
    if way == "deepcopy":
        twin = copy.deepcopy(ours)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        torch.save(ours, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
    batch = batch_for(plain)
    with torch.no_grad():  # the copy has weights of its own
        ours.lm_head.weight.zero_()
    assert_parity(twin, plain, batch)
    unpatch(twin)
    assert not is_patched(twin) and is_patched(ours)
    assert_parity(twin, plain, batch, 0.0)


def test_pickle_loads_in_a_fresh_process(tmp_path):
    plain, ours = twins()
    torch.save({"model": ours, "batch": text_batch(plain)}, tmp_path / "model.pt")
    code = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); m = d['model']; import m3kernels;"
        "assert m3kernels.is_patched(m); m.train(); print(m(**d['batch']).loss.item())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours.train()
    assert float(done.stdout.split()[-1]) == pytest.approx(ours(**text_batch(plain)).loss.item(), rel=FP32)


@pytest.mark.parametrize("size", [200, 120])
@pytest.mark.parametrize("tied", [True, False])
def test_resize_embeddings(kind, device, size, tied):
    plain, ours = twins(kind, device=device, tie_word_embeddings=tied)
    for model in (plain, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.lm_head.weight.shape[0] == size
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    batch = batch_for(plain)
    for key in ("input_ids", "labels"):
        batch[key] = batch[key].where(batch[key] < size, size - 1)
    assert_parity(ours, plain, batch)
    ours.train()
    assert ours(**batch).logits is None, "the new head is not fused"
    unpatch(ours)
    assert not is_patched(ours)
    assert_parity(ours, plain, batch, 0.0)


def test_new_head_by_hand(text_pair):
    """A head assigned without asking the model is not fused; its results are right all the same."""
    plain, ours = text_pair
    for model in (plain, ours):
        torch.manual_seed(0)
        model.lm_head = nn.Linear(48, 151, bias=True, device=model.device)
    assert_parity(ours, plain, text_batch(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_changed_after_patching(text_pair, dtype):
    plain, ours = text_pair
    for model in (plain, ours):
        model.to(dtype)
    batch = inputs(text_batch(plain))
    logits = ours(**batch).logits
    assert logits.dtype == dtype
    # two layers of about ten roundings each; in fp64 transformers computes norms and tables in fp32
    bound = {torch.bfloat16: 16 * 2**-8, torch.float16: 16 * 2**-11, torch.float64: FP32}[dtype]
    assert_same({"logits": logits}, {"logits": plain(**batch).logits}, bound)
    for model in (plain, ours):
        model.float()
    assert_parity(ours, plain, text_batch(plain), FP32)


def test_modes(text_pair):
    _, ours = text_pair
    assert not any(m.training for m in ours.modules())
    assert ours.train() is ours and all(m.training for m in ours.modules())
    assert ours.eval() is ours and not any(m.training for m in ours.modules())
    assert ours.requires_grad_(False) is ours and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_optimizer_steps(kind, device, tied):
    """Weights change in place: nothing may be cached from one step to the next."""
    plain, ours = twins(kind, device=device, tie_word_embeddings=tied)
    batch = batch_for(plain)
    losses = []
    for model in (plain, ours):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # rounding grows with every step, here by less than ten
    assert losses[4:] == pytest.approx(losses[:4], rel=10 * FP32)
    assert losses[3] < losses[0]
