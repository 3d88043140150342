"""The loss and its arguments, hooks and replaced forwards: a patched model does what its unpatched twin does."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.models.ministral3 import modeling_ministral3

import m3kernels
from m3kernels import patch
from models import (
    FP32,
    assert_both,
    assert_parity,
    assert_same,
    batch_for,
    build,
    gradients,
    inputs,
    observe,
    tensors,
    text_batch,
    twins,
)

NEW = Version(transformers.__version__) >= Version("5.23.0")


# --- loss and its arguments


KEEP = {"three": 3, "indices": torch.tensor([0, 4, 20]), "all": 0}
if NEW:
    KEEP["rows of indices"] = torch.tensor([[1, 2], [3, 5]])


@pytest.mark.parametrize("keep", KEEP)
def test_logits_to_keep(keep, kind, device):
    plain, ours = twins(kind, device=device)
    value = KEEP[keep].to(device) if isinstance(KEEP[keep], torch.Tensor) else KEEP[keep]
    batch = inputs(batch_for(plain))
    ours.train(), plain.train()
    assert_both(ours, plain, lambda model: model(**batch, logits_to_keep=value))


def test_logits_to_keep_with_labels(text_pair):
    plain, ours = text_pair
    batch = text_batch(plain)
    batch["labels"] = batch["labels"][:, -6:]
    assert_parity(ours, plain, batch, logits_to_keep=6)
    batch["labels"] = batch["labels"][:, [1, 3]]
    assert_parity(ours, plain, batch, logits_to_keep=torch.tensor([4, 9], device=batch["labels"].device))


LOSS = {
    "items int": lambda b: {"num_items_in_batch": 7},
    "items tensor": lambda b: {"num_items_in_batch": torch.tensor(7)},
    "items on device": lambda b: {"num_items_in_batch": torch.tensor(7, device=b["labels"].device)},
    "items of one element": lambda b: {"num_items_in_batch": torch.tensor([7])},
    "shift labels": lambda b: {"shift_labels": b["input_ids"].flip(0)},
    "shift labels with ignored": lambda b: {"shift_labels": b["labels"].roll(2, 1)},
    "ignore index": lambda b: {"ignore_index": int(b["labels"][0, -1])},
    "all": lambda b: {"shift_labels": b["input_ids"].roll(1, 1), "num_items_in_batch": 11, "ignore_index": 20},
    "hidden states": lambda b: {"output_hidden_states": True},
    "return_dict": lambda b: {"return_dict": True},
    "return_dict None": lambda b: {"return_dict": None},
}


@pytest.mark.parametrize("name", LOSS)
def test_loss_arguments(name, kind, device):
    plain, ours = twins(kind, device=device)
    batch = batch_for(plain)
    options = LOSS[name](batch)
    if "ignore_index" in options:
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, options["ignore_index"])
    assert_parity(ours, plain, batch, **options)


@pytest.mark.interpreter
def test_positional_arguments(text_pair):
    """input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels"""
    plain, ours = text_pair
    batch = text_batch(plain)
    ours.train(), plain.train()
    arguments = (batch["input_ids"], None, None, None, None, batch["labels"])
    assert_both(ours, plain, lambda model: model(*arguments).loss)


def test_tuples(kind, device):
    plain, ours = twins(kind, device=device)
    batch = batch_for(plain)
    ours.train(), plain.train()
    assert isinstance(ours(**batch, return_dict=False), tuple)
    assert_both(ours, plain, lambda model: model(**batch, return_dict=False))


def test_all_labels_ignored(kind, device):
    """transformers gives NaN; ours 0 with gradients of 0 (a sample that was cut before its answer must not end a run)."""
    plain, ours = twins(kind, device=device)
    batch = batch_for(plain)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    ours.train(), plain.train()
    assert plain(**batch).loss.isnan()
    loss = ours(**batch).loss
    loss.backward()
    assert loss.item() == 0 and loss.requires_grad
    grads = gradients(ours)
    assert grads and all((grad == 0).all() for grad in grads.values())


def test_logits_only_where_nobody_pays_for_them(text_pair):
    """Training with labels returns none; eval, no labels, or ``skip_logits=False`` do."""
    plain, ours = text_pair
    batch = text_batch(plain)
    reference = plain(**batch)
    assert_same(tensors(ours(**batch)), tensors(reference), FP32)
    assert ours(**batch, skip_logits=True).logits is None
    assert_same({"loss": ours(**batch, skip_logits=True).loss}, {"loss": reference.loss}, FP32)
    ours.train()
    assert ours(**batch).logits is None
    assert_same(tensors(ours(**batch, skip_logits=False)), tensors(reference), FP32)
    assert_same(tensors(ours(**inputs(batch))), tensors(plain(**inputs(batch))), FP32)


def test_the_fused_loss_is_what_runs(text_pair, monkeypatch):
    """No test above would notice a loss that always falls back: count the calls, and the logits that are not made."""
    plain, ours = text_pair
    calls = []
    real = m3kernels.ops.linear_cross_entropy
    monkeypatch.setattr(
        "m3kernels.patching.loss.linear_cross_entropy", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    monkeypatch.setattr(modeling_ministral3, "slice_logits_to_keep", None, raising=False)
    ours.train()
    ours(**text_batch(ours)).loss.backward()
    assert len(calls) == 1


def test_custom_loss_function(kind, device):
    plain, ours = twins(kind, device=device)

    def loss(logits, labels, vocab_size, **_):
        return logits.float().square().mean() + labels.float().mean() * 0

    for model in (plain, ours):
        model.loss_function = loss
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.interpreter
def test_label_out_of_range(text_pair):
    plain, ours = text_pair
    if next(ours.parameters()).is_cuda:
        pytest.skip("a device-side assertion ends the process")
    batch = text_batch(plain)
    batch["labels"][0, 5] = 10_000
    ours.train()
    with pytest.raises(ValueError, match="10000"):
        ours(**batch)


# --- hooks and replaced forwards


SUBMODULES = [
    "lm_head", "model.norm", "model.layers.0", "model.layers.0.self_attn", "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp", "model.layers.0.mlp.act_fn", "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm",
    "model.layers.1.post_attention_layernorm", "model.rotary_emb", "model.embed_tokens", "model",
]  # fmt: skip


def _forward_hook(module, seen):
    return module.register_forward_hook(
        lambda m, args, out: seen.append([*tensors(args).values(), *tensors([out]).values()])
    )


def _pre_hook(module, seen):
    return module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append([*tensors(args).values(), *tensors(kwargs).values()]), with_kwargs=True
    )


def _scaling_hook(module, seen):
    def hook(m, args, out):
        seen.append([torch.ones(1)])
        return out * 1.5 if isinstance(out, torch.Tensor) else out

    return module.register_forward_hook(hook)


def _backward_hook(module, seen):
    return module.register_full_backward_hook(lambda m, gi, go: seen.append([g for g in (*gi, *go) if g is not None]))


def _with_hook(model, name, hook, batch):
    seen = []
    handle = hook(model.get_submodule(name), seen)
    try:
        return (
            observe(model, batch)
            | {"seen": torch.tensor(len(seen))}
            | {f"seen.{k}": v for k, v in tensors(seen).items()}
        )
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "hook", [_forward_hook, _pre_hook, _scaling_hook, _backward_hook], ids=lambda f: f.__name__[1:]
)
@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_fire_and_see_the_same(name, hook, text_pair):
    plain, ours = text_pair
    if hook is _backward_hook and name in ("model.rotary_emb", "model"):
        pytest.skip("torch calls no backward hook here: positions need no gradient, a dataclass is no tensor")
    batch = text_batch(plain)
    reference, got = (_with_hook(model, name, hook, batch) for model in (plain, ours))
    assert reference["seen"] >= 1
    assert_same(got, reference, FP32)
    assert_parity(ours, plain, batch)  # and the hook leaves nothing behind


def test_hooks_set_before_patching(text_pair):
    plain, _ = text_pair
    ours = copy.deepcopy(plain)
    seen = {}
    for which, model in (("plain", plain), ("ours", ours)):
        for name in SUBMODULES:
            model.get_submodule(name).register_forward_hook(
                lambda m, args, out, which=which, name=name: seen.setdefault(which, []).append(
                    [name, *tensors([out]).values()]
                )
            )
    patch(ours)
    batch = text_batch(plain)
    assert_parity(ours, plain, batch)
    assert [entry[0] for entry in seen["ours"]] == [entry[0] for entry in seen["plain"]]
    assert_same(tensors([e[1:] for e in seen["ours"]]), tensors([e[1:] for e in seen["plain"]]), FP32)


def test_global_hooks_fire_on_the_same_modules(text_pair):
    """Profilers and module trackers register hooks for all modules at once."""
    plain, ours = text_pair
    batch = text_batch(plain)
    called = []
    for model in text_pair:
        names = {module: name for name, module in model.named_modules()}
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, names=names, seen=seen: seen.append(names[m])
        )
        try:
            model.train()
            model(**batch).loss.backward()
        finally:
            handle.remove()
        called.append(seen)
    # the order of gate, activation and up is nobody's contract
    assert sorted(called[1]) == sorted(called[0])


INSTANCE_FORWARDS = [
    "model.norm",
    "model.layers.0.mlp",
    "model.layers.0.post_attention_layernorm",
    "lm_head",
    "model.layers.1.self_attn",
    "model.layers.0.mlp.act_fn",
]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", INSTANCE_FORWARDS)
def test_instance_forwards_are_honoured(name, order, device):
    """``module.forward = ...`` by the user wins over the patch, whichever came first."""
    plain = build(device=device)
    ours = copy.deepcopy(plain)
    if order == "after":
        patch(ours)
    for model in (plain, ours):
        module, original = model.get_submodule(name), type(plain.get_submodule(name)).forward

        def doubled(*args, module=module, original=original, **kwargs):
            out = original(module, *args, **kwargs)
            return out * 2 if isinstance(out, torch.Tensor) else (out[0] * 2, *out[1:])

        module.forward = doubled
    if order == "before":
        report = patch(ours)
        assert name == "lm_head" or name.endswith("act_fn") or any(skip.module == name for skip in report.skipped), (
            report
        )
    batch = text_batch(plain)
    unchanged = observe(build(device=device), batch)
    assert_parity(ours, plain, batch)
    with pytest.raises(AssertionError):
        assert_same(observe(ours, batch), unchanged, FP32)


def test_instance_forward_of_attention_in_bf16(device):
    """The class's own attention, put back on one layer after patching, must find tables in a dtype that it can use."""
    plain, ours = twins(device=device, dtype=torch.bfloat16)
    attention = ours.model.layers[0].self_attn
    attention.forward = modeling_ministral3.Ministral3Attention.forward.__get__(attention)
    batch = inputs(text_batch(plain))
    # bf16 keeps 8 bits, and two layers add up a few roundings
    assert_both(ours, plain, lambda model: model(**batch).logits, 0.05)
