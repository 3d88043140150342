"""Forward, gradients, masks, packing and recorded outputs: a patched model does what its unpatched twin does."""

import pytest
import torch

from models import assert_both, assert_parity, batch_for, inputs, text_batch, twins


def positions(rows: list[list[int]]) -> torch.Tensor:
    """One row of positions per list, counting up from 0 for each length in it."""
    return torch.tensor([[p for length in row for p in range(length)] for row in rows])


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
    if device == "cuda" and make in (_left, _left_with_positions, _right):
        # padding that sees nothing: 0 from our kernels and SDPA, the mean of all values from transformers' eager attention
        plain.set_attn_implementation("sdpa")
    assert_parity(ours, plain, place(make(plain), device))


def test_flex_attention(device):
    if device == "cuda":
        pytest.skip("Inductor's flex_attention refuses these models' head of 10")
    # transformers compiles flex_attention, which takes 50 s and is not what is tested
    plain, ours = twins(attention="flex_attention", device=device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # it has no backward on CPU
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
