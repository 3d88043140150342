"""What people do with a Hugging Face model, done with a patched one: the results are those of its unpatched twin."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Ministral3ForCausalLM,
    Mistral3ForConditionalGeneration,
    StaticCache,
)
from transformers.models.ministral3 import modeling_ministral3

import m3kernels
from m3kernels import is_patched, patch, patched, unpatch
from models import (
    FP32,
    IMAGES,
    Float64,
    assert_both,
    assert_error_at_most_eagers,
    assert_parity,
    assert_same,
    batch_for,
    build,
    gradients,
    observe,
    redraw,
    tensors,
    text_batch,
    twins,
    vlm_batch,
)

NEW = Version(transformers.__version__) >= Version("5.23.0")


def cpu_mesh():
    """Without one, fully_shard takes the GPU where there is one; these models are on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def inputs(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "labels"}


def positions(rows: list[list[int]]) -> torch.Tensor:
    """One row of positions per list, counting up from 0 for each length in it."""
    return torch.tensor([[p for length in row for p in range(length)] for row in rows])


# --- inputs of one forward, with loss and gradients


def _plain(model):
    return text_batch(model)


def _left(model):
    return text_batch(model, padding="left", batch=3)


def _left_with_positions(model):
    batch = _left(model)
    at = (batch["attention_mask"].cumsum(-1) - 1).clamp(0)
    return {**batch, "position_ids": at}


def _right(model):
    return text_batch(model, padding="right", batch=3)


def _offset(model):
    return {**text_batch(model), "position_ids": torch.stack([torch.arange(21) + 7, torch.arange(21) * 3])}


def _one_row_of_positions(model):
    return {**text_batch(model), "position_ids": torch.arange(21)[None] + 6}


def _packed(model):
    return {**text_batch(model, batch=1), "position_ids": positions([[9, 4, 8]]), "use_cache": False}


def _packed_with_cache(model):
    """transformers ignores packing here, without a word: so must we."""
    return {**text_batch(model, batch=1), "position_ids": positions([[9, 4, 8]]), "use_cache": True}


def _packed_batch(model):
    return {**text_batch(model), "position_ids": positions([[9, 12], [2, 3, 16]]), "use_cache": False}


def _cu_seq_lens(model):
    cu = torch.tensor([0, 9, 13, 21], dtype=torch.int32)
    ends = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9}
    return {**_packed(model), **ends}


def _float_4d_mask(model):
    mask = torch.zeros(2, 1, 21, 21).masked_fill(torch.ones(21, 21).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[:, :, 5:, 2:4] = torch.finfo(torch.float32).min
    return {**text_batch(model), "attention_mask": mask}


def _embeddings(model):
    batch = text_batch(model)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    return {**batch, "inputs_embeds": embeds}


def _short(model):
    return text_batch(model, seq=3)


FORWARDS = [
    _plain, _left, _left_with_positions, _right, _offset, _one_row_of_positions, _packed, _packed_with_cache,
    _packed_batch, _cu_seq_lens, _float_4d_mask, _embeddings, _short,
]  # fmt: skip


def place(batch: dict, device: str) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@pytest.mark.parametrize("window", [None, 6], ids=["full", "window"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", FORWARDS, ids=lambda f: f.__name__[1:])
def test_forward_and_gradients(make, attention, window, device):
    plain, ours = twins(attention=attention, device=device, sliding_window=window)
    assert_parity(ours, plain, place(make(plain), device))


@pytest.mark.slow  # compiles flex_attention
def test_flex_attention(device):
    if device == "cuda":
        pytest.skip("Inductor's flex_attention refuses these models' head of 10")
    plain, ours = twins(attention="flex_attention", device=device)
    with torch.no_grad():  # it has no backward on CPU
        assert_both(ours, plain, lambda model: model(**_left(model)))


def test_boolean_4d_mask(device):
    plain, ours = twins(attention="sdpa", device=device)
    mask = torch.ones(21, 21).tril().bool().expand(2, 1, 21, 21).clone()
    mask[:, :, 6:, 3] = False
    assert_parity(ours, plain, place({**text_batch(plain), "attention_mask": mask}, device))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_records(kind, device, attention):
    """Hidden states of every layer, and attention weights where the implementation has them."""
    plain, ours = twins(kind, attention=attention, device=device)
    batch = batch_for(plain)
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    out = ours(**inputs(batch), **options)
    assert len(out.hidden_states) == 3 and (
        attention == "sdpa" or out.attentions[1].shape[-2:] == (batch["input_ids"].shape[1],) * 2
    )
    assert_parity(ours, plain, batch, **options)
    ours.train(), plain.train()
    assert_both(ours, plain, lambda model: {k: v for k, v in model(**batch, **options).items() if k != "logits"})


def test_vision_records(vlm_pair):
    plain, ours = vlm_pair
    batch = batch_for(plain)
    images = {k: batch[k] for k in ("pixel_values", "image_sizes")}
    assert_both(ours, plain, lambda model: model.get_image_features(**images))
    assert_both(
        ours,
        plain,
        lambda model: model.model.get_image_features(**images, vision_feature_layer=-2, output_hidden_states=True),
    )
    assert_both(
        ours,
        plain,
        lambda model: (
            model(**inputs(batch), image_sizes=images["image_sizes"].tolist()) if False else model(**inputs(batch))
        ),
    )


@pytest.mark.parametrize("after", ["eager", "sdpa"])
def test_attention_set_after_patching(kind, device, after):
    plain, ours = twins(kind, device=device, attention="sdpa" if after == "eager" else "eager")
    plain.set_attn_implementation(after)
    ours.set_attn_implementation(after)
    assert_parity(ours, plain, batch_for(plain), output_attentions=after == "eager")


def test_registered_attention_is_called(device):
    """An attention function of the user's own, with the arguments that transformers gives it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def spy(module, query, key, value, mask, **options):
        seen.append(
            {k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}
            | {
                "tensors": sorted(k for k, v in options.items() if isinstance(v, torch.Tensor)),
                "shapes": (query.shape, key.shape),
            }
        )
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("spy", spy)
    try:
        plain, ours = twins("vlm", device=device)
        calls = []
        for model in (plain, ours):
            model.set_attn_implementation("spy")
            model.train()
            model(**batch_for(model))
            calls.append(seen.copy())
            seen.clear()
        assert calls[0] == calls[1] and len(calls[0]) == 4
    finally:
        AttentionInterface._global_mapping.pop("spy")


# --- caches and generation


def _static_cache(model, ids):
    cache = StaticCache(model.config, max_cache_len=40)
    first = model(ids[:, :9], past_key_values=cache)
    return [first.logits, model(ids[:, 9:10], past_key_values=cache).logits, tensors(cache)]


def _dynamic_cache(model, ids):
    cache = DynamicCache(config=model.config)
    return [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)] + [tensors(cache)]


def _chunked_prefill(model, ids):
    cache, out = DynamicCache(config=model.config), []
    for start, stop in ((0, 4), (4, 15), (15, 21)):
        out.append(model(ids[:, start:stop], past_key_values=cache).logits)
    return [*out, tensors(cache)]


def _static_chunks(model, ids):
    cache, out = StaticCache(model.config, max_cache_len=21), []
    for start, stop in ((0, 4), (4, 15), (15, 21)):
        out.append(model(ids[:, start:stop], past_key_values=cache).logits)
    return [*out, tensors(cache)]


def _cropped(model, ids):
    """As assisted decoding does: guess, reject, go on."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache)
    cache.crop(-4)
    return [model(ids[:, 8:14], past_key_values=cache).logits, tensors(cache)]


def _reordered(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0], device=ids.device))
    return [model(ids[:, 12:13], past_key_values=cache).logits, tensors(cache)]


CACHES = [_static_cache, _dynamic_cache, _chunked_prefill, _static_chunks, _cropped, _reordered]


@pytest.mark.parametrize("window", [None, 6], ids=["full", "window"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use", CACHES, ids=lambda f: f.__name__[1:])
def test_caches(use, attention, window, device):
    if window and use is _cropped:
        pytest.skip("transformers cannot crop a sliding window")
    plain, ours = twins(attention=attention, device=device, sliding_window=window)
    ids = text_batch(plain)["input_ids"]
    with torch.no_grad():
        assert_both(ours, plain, lambda model: use(model, ids))


def test_decoding_equals_one_pass(device):
    """Positions come from the cache: token by token gives the logits of one forward."""
    _, ours = twins(device=device)
    ids = text_batch(ours)["input_ids"]
    with torch.no_grad():
        steps = torch.cat(_dynamic_cache(ours, ids)[:-1], dim=1)
        assert_same({"logits": steps}, {"logits": ours(ids[:, :12]).logits}, FP32)


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 5},
    "scores": {
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    },
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("padding", ["", "left"])
def test_generate(how, padding, device):
    plain, ours = twins(device=device)
    batch = inputs(text_batch(plain, padding=padding, batch=1 if how == "prompt lookup" else 3, seq=12))

    def run(model):
        torch.manual_seed(0)
        return model.generate(**batch, **{"max_new_tokens": 8, "do_sample": False, **GENERATE[how]})

    assert_both(ours, plain, run)


def test_assisted_generation(device):
    plain, ours = twins(device=device)
    assistant = redraw(build(device=device, num_hidden_layers=1), seed=3)
    ids = text_batch(plain, batch=1)["input_ids"]
    assert_both(
        ours, plain, lambda model: model.generate(ids, assistant_model=assistant, max_new_tokens=8, do_sample=False)
    )
    patch(assistant)
    assert_both(
        ours, plain, lambda model: model.generate(ids, assistant_model=assistant, max_new_tokens=8, do_sample=False)
    )


@pytest.mark.parametrize("how", ["greedy", "beams", "static"])
def test_generate_from_images(vlm_pair, how):
    plain, ours = vlm_pair
    batch = inputs(vlm_batch(plain, [[(2, 3), (1, 4)]]))
    assert_both(ours, plain, lambda model: model.generate(**batch, max_new_tokens=6, do_sample=False, **GENERATE[how]))


# --- vision-language inputs


def test_image_count_mismatch_raises_the_same(vlm_pair):
    errors = []
    for model in vlm_pair:
        batch = vlm_batch(model, IMAGES)
        batch["input_ids"][0, 6] = 20
        with pytest.raises(Exception) as error:
            model(**batch)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1] and "do not match" in errors[0][1]


def test_image_embeddings_given(vlm_pair):
    """``inputs_embeds`` with image placeholders, and pixel values."""
    plain, ours = vlm_pair
    batch = batch_for(plain)
    batch["inputs_embeds"] = plain.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert_parity(ours, plain, batch)


@pytest.mark.skipif(not NEW, reason="mm_encoder_outputs came with 5.23")
def test_encoder_outputs_given(vlm_pair):
    plain, ours = vlm_pair
    batch = batch_for(plain)
    images = {k: batch.pop(k) for k in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        features = plain.get_image_features(**images)
    assert_parity(ours, plain, {**batch, "mm_encoder_outputs": {"image": features}})


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
    with torch.no_grad(), Float64():
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


# --- places and wrappers


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_offload(order, kind):
    from accelerate import cpu_offload

    plain = build(kind)
    ours = copy.deepcopy(plain)
    if order == "before":
        patch(ours)
    cpu_offload(ours, execution_device="cpu")
    if order == "after":
        patch(ours)
    batch = batch_for(plain)
    ours.train(), plain.train()
    with torch.no_grad():
        assert_same({"loss": ours(**batch).loss}, {"loss": plain(**batch).loss}, FP32)
        ours.eval(), plain.eval()
        assert_both(ours, plain, lambda model: model(**batch))


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_hooks_and_their_removal(order, text_pair):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    plain, ours = text_pair
    unpatch(ours)
    if order == "before":
        patch(ours)
    for module in [*ours.modules()]:
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    report = patch(ours)
    batch = text_batch(plain)
    assert_parity(ours, plain, batch)
    if order == "after":
        assert not any(report.patched.values()), (
            f"hooked forwards are the old ones, the report says otherwise\n{report}"
        )
    remove_hook_from_submodules(ours)
    assert_parity(ours, plain, batch)
    unpatch(ours)
    assert_parity(ours, plain, batch, 0.0)


def test_unpatch_under_wrapped_forwards(text_pair):
    """Trainer and accelerate keep a bound forward (autocast, TRL's head): it must survive ``unpatch``."""
    plain, ours = text_pair
    for name in (
        "model.norm",
        "lm_head",
        "model.layers.0",
        "model.layers.0.self_attn",
        "model.layers.1.mlp",
        "model.rotary_emb",
    ):
        module = ours.get_submodule(name)
        module.forward = lambda *a, bound=module.forward, **k: bound(*a, **k)
    ours.forward = lambda *a, bound=ours.forward, **k: bound(*a, **k)
    unpatch(ours)
    assert_parity(ours, plain, text_batch(plain), 0.0)


@pytest.mark.interpreter
def test_ddp(process_group):
    plain, ours = twins()
    batch = text_batch(plain)
    reference = observe(plain, batch)
    wrapped = nn.parallel.DistributedDataParallel(ours)
    wrapped.train()
    wrapped(**batch).loss.backward()
    assert_same(gradients(ours), {k: v for k, v in reference.items() if k.startswith("grad")}, FP32)
    other = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    assert patch(other).architecture == "Ministral3ForCausalLM" and is_patched(other)
    other.train()
    other(**batch).loss.backward()
    assert_same(gradients(other.module), {k: v for k, v in reference.items() if k.startswith("grad")}, FP32)


@pytest.mark.parametrize("head_alone", [False, True], ids=["head with the root", "head alone"])
def test_fsdp2(process_group, head_alone, kind):
    from torch.distributed.fsdp import fully_shard

    plain, ours = twins(kind)
    batch = batch_for(plain)
    for module in ours.modules():
        if type(module).__name__ in ("Ministral3DecoderLayer", "PixtralAttentionLayer"):
            fully_shard(module, mesh=cpu_mesh())
    if head_alone:
        fully_shard(ours.lm_head, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    ours.train()
    loss = ours(**batch)
    assert loss.logits is None
    loss.loss.backward()
    reference = observe(plain, batch)
    got = {"loss": loss.loss.detach()} | {k: v.full_tensor() for k, v in gradients(ours).items()}
    assert_same(got, {k: v for k, v in reference.items() if k == "loss" or k.startswith("grad")}, FP32)
    ours.eval()
    with torch.no_grad():
        assert_same({"logits": ours(**inputs(batch)).logits}, {"logits": reference["logits"]}, FP32)
    with pytest.raises(RuntimeError, match="fully_shard"):
        unpatch(ours)
    assert is_patched(ours)


def test_fsdp2_head_with_a_hook(process_group):
    """A user's hook on a sharded head expects logits."""
    from torch.distributed.fsdp import fully_shard

    plain, ours = twins()
    fully_shard(ours.lm_head, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    shapes = []
    ours.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    ours.train()
    ours(**text_batch(plain)).loss.backward()
    assert shapes == [(2, 21, 151)]


def test_patch_after_fsdp2_is_reported(process_group):
    from torch.distributed.fsdp import fully_shard

    plain = build()
    ours = copy.deepcopy(plain)
    for layer in ours.model.layers:
        fully_shard(layer, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    report = patch(ours)
    assert any("patch before" in skip.reason for skip in report.skipped)
    batch = text_batch(plain)
    ours.train(), plain.train()
    assert_same({"loss": ours(**batch).loss}, {"loss": plain(**batch).loss}, FP32)


def _two_ranks(rank: int, folder: str) -> None:
    """FSDP2 over two ranks with a row of the batch each, then transformers' tensor parallelism; run in its own process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain, ours = twins(vocab_size=152)
    batch = text_batch(plain)
    mine = {k: v[rank : rank + 1] for k, v in batch.items()}
    for layer in ours.model.layers:
        fully_shard(layer, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    ours.train()
    ours(**mine).loss.backward()
    for row in range(2):
        (plain(**{k: v[row : row + 1] for k, v in batch.items()}).loss / 2).backward()
    assert_same({k: v.full_tensor() for k, v in gradients(ours).items()}, gradients(plain), FP32)

    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2)
    sharded = Ministral3ForCausalLM.from_pretrained(f"{folder}/model", distributed_config=config).train()
    patch(sharded)
    loss = sharded(**batch).loss
    loss.backward()
    plain.zero_grad()
    reference = plain(**batch)
    reference.loss.backward()
    local = {"loss": loss, "norm": sharded.model.norm.weight.grad}
    if hasattr(local["norm"], "full_tensor"):
        local["norm"] = local["norm"].full_tensor()
    assert_same(tensors(local), tensors({"loss": reference.loss, "norm": plain.model.norm.weight.grad}), FP32)
    dist.destroy_process_group()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="transformers' tensor parallelism takes the GPU where there is one"
)
def test_two_ranks(tmp_path):
    build(vocab_size=152).save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path),), nprocs=2)


def test_meta_device(kind):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from models import text_config, vlm_config

    with torch.device("meta"):
        auto, config = (
            (AutoModelForCausalLM, text_config()) if kind == "text" else (AutoModelForImageTextToText, vlm_config())
        )
        ours = auto.from_config(config)
    report = patch(ours)
    assert report.patched["rms_norm"] and report.backend["rms_norm"] == "decided when weights are loaded"
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    assert ours(ids).logits.shape == (2, 7, 151)
    # filled with weights after patching, as large models are loaded
    filled = build(kind)
    ours.load_state_dict(filled.state_dict(), assign=True)
    rotary = {n: b for n, b in filled.named_buffers()}
    for name, _ in list(ours.named_buffers()):
        module, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(module), leaf, rotary[name])
    assert_parity(ours.eval(), filled, batch_for(filled))


def test_meta_device_with_labels():
    """Memory and FLOP estimators run a training step on meta tensors."""
    from models import text_config

    with torch.device("meta"):
        ours = Ministral3ForCausalLM(text_config())
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    ours.train()
    assert ours(ids, labels=ids).loss.shape == ()
    patch(ours)
    loss = ours(ids, labels=ids).loss
    loss.backward()
    assert loss.shape == () and ours.lm_head.weight.grad.shape == (151, 48)


def test_autocast(kind, device):
    """bf16 autocast over fp32 weights, held to the rule for bf16 models."""
    plain, ours = twins(kind, device=device)
    assert_error_at_most_eagers(ours, plain, lambda: torch.autocast(device, torch.bfloat16))


def test_fp32_norms_on_a_bf16_model(device):
    """``prepare_model_for_kbit_training`` leaves norms in fp32; autocast then brings their output back to bf16."""
    plain, ours = twins(device=device, dtype=torch.bfloat16)
    for model in (plain, ours):
        for p in model.parameters():
            if p.dim() == 1:
                p.data = p.data.float()
    assert_error_at_most_eagers(ours, plain, lambda: torch.autocast(device, torch.bfloat16))
    batch = inputs(text_batch(plain))
    with torch.autocast(device, torch.bfloat16):
        assert ours(**batch).logits.dtype == plain(**batch).logits.dtype
        assert (
            ours.model(**batch).last_hidden_state.dtype == plain.model(**batch).last_hidden_state.dtype == torch.float32
        )


@pytest.mark.interpreter
def test_grad_scaler_and_accumulation(text_pair):
    """Loss scaled and summed over micro-batches: the gradient of the fused loss takes any incoming gradient."""
    plain, ours = text_pair

    def run(model):
        model.train()
        model.zero_grad()
        for seed in range(3):
            (model(**text_batch(model, seed=seed), num_items_in_batch=50).loss * 1024).backward()
        return gradients(model)

    assert_both(ours, plain, run)


@pytest.mark.interpreter
def test_retained_graph(text_pair):
    plain, ours = text_pair

    def run(model):
        model.train()
        model.zero_grad()
        loss = model(**text_batch(model)).loss
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        return gradients(model)

    assert_both(ours, plain, run)


@pytest.mark.interpreter
def test_two_losses_of_one_forward(text_pair):
    """An auxiliary term on hidden states beside the fused loss."""
    plain, ours = text_pair

    def run(model):
        model.train()
        model.zero_grad()
        out = model(**text_batch(model), output_hidden_states=True)
        (out.loss + out.hidden_states[1].square().mean()).backward()
        return gradients(model)

    assert_both(ours, plain, run)


def test_functional_call(text_pair):
    plain, ours = text_pair
    batch = inputs(text_batch(plain))

    def run(model):
        weights = {n: p.detach() * 1.1 for n, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, kwargs=batch).logits

    assert_both(ours, plain, run)


def test_no_warnings_when_all_is_fused(kind, caplog):
    plain, ours = twins(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(ours, batch_for(plain))
    assert not [r for r in caplog.records if r.name == "m3kernels"]


def test_patched_block_restores_after_an_exception(text_pair):
    plain, _ = text_pair
    batch = text_batch(plain)
    before = observe(plain, batch)
    with pytest.raises(KeyError), patched(plain):
        assert is_patched(plain)
        raise KeyError
    assert not is_patched(plain)
    assert_same(observe(plain, batch), before, 0.0)
