"""Caches, generation and image inputs: a patched model does what its unpatched twin does."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from m3kernels import patch
from models import (
    FP32,
    IMAGES,
    assert_both,
    assert_parity,
    assert_same,
    batch_for,
    build,
    inputs,
    redraw,
    tensors,
    text_batch,
    twins,
    vlm_batch,
)

NEW = Version(transformers.__version__) >= Version("5.23.0")


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
