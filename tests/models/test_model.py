"""The native model in plain PyTorch: logits, loss and gradients are those of Hugging Face."""

import pytest
import torch
from hf_folders import SIZES, save, save_fp8
from hf_folders import load as hf_load
from native import kept, like, seen, trained, twins

from m3kernels.models.ministral3 import CheckpointError, Config, ConfigError, Ministral3, layers, text, vision
from m3kernels.models.ministral3 import config as config_module
from models import (
    FP32,
    FP64,
    VOCAB,
    assert_same,
    batch_for,
    distance,
    float64_islands,
    on,
    released_rope,
    rope,
    text_batch,
    text_config,
    vlm_batch,
)

BOUNDS = {torch.float32: FP32, torch.float64: FP64}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
# around the original length of 8, and far beyond
STARTS = (0, 7, 8, 100, 100_000)


@DTYPES
@pytest.mark.parametrize("kind", ["text", "vlm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients(kind, dtype, attention):
    hf, ours = twins(kind, dtype=dtype, attention=attention)
    batch = batch_for(hf)
    if dtype == torch.float64:
        with float64_islands():
            assert_same(trained(ours, batch), trained(hf, batch), FP64)
    else:
        assert_same(trained(ours, batch), trained(hf, batch), FP32)


@DTYPES
@pytest.mark.parametrize("theta", [1e6, 1e9])
@pytest.mark.parametrize("start", STARTS)
def test_logits_at_positions_around_the_original_length(dtype, theta, start):
    hf, ours = twins(dtype=dtype, rope_parameters=rope(rope_theta=theta))
    batch = text_batch(hf) | {"position_ids": torch.arange(start, start + 21)[None]}
    assert_same(seen(ours, batch), seen(hf, batch), BOUNDS[dtype])


@DTYPES
@pytest.mark.parametrize(
    "images",
    [[[]], [[(2, 3)]], [[(2, 3), (1, 4), (1, 1)]], [[], [(2, 2)]], [[(3, 1), (2, 5)], [], [(4, 4)]]],
    ids=["none", "one", "several", "one of two rows", "ragged"],
)
def test_logits_with_images_of_different_sizes(dtype, images):
    hf, ours = twins("vlm", dtype=dtype)
    batch = vlm_batch(hf, images)
    assert_same(seen(ours, batch), seen(hf, batch), BOUNDS[dtype])


@DTYPES
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_with_padding(dtype, padding):
    hf, ours = twins(dtype=dtype)
    batch = text_batch(hf, batch=3, padding=padding)
    assert_same(seen(ours, batch), seen(hf, batch), BOUNDS[dtype])
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert_same(seen(ours, batch), seen(hf, batch), BOUNDS[dtype])


def test_padding_with_holes_and_a_row_of_nothing_else():
    hf, ours = twins(dtype=torch.float64)
    batch = text_batch(hf, batch=3)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 5:9] = 0
    batch["attention_mask"][2] = 0
    assert_same(seen(ours, batch), seen(hf, batch), FP64)
    logits = ours(**batch).logits
    assert logits.shape == (3, 21, VOCAB) and not logits[~kept(batch)].any()


@pytest.mark.parametrize("padding", ["", "right"])
def test_loss_of_a_padded_batch(padding):
    hf, ours = twins(dtype=torch.float64)
    batch = text_batch(hf, batch=3, padding=padding)
    with float64_islands():
        assert_same(trained(ours, batch), trained(hf, batch), FP64)


def test_labels_after_padding_do_not_count():
    """Where the token before a label is padding nothing is computed, so nothing is predicted."""
    hf, ours = twins(dtype=torch.float64)
    batch = text_batch(hf, padding="left")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = batch["attention_mask"].argmax(1)
    clean = batch["labels"].clone()
    clean[torch.arange(2), first] = -100
    with float64_islands():
        assert_same(trained(ours, batch), trained(hf, {**batch, "labels": clean}), FP64)


@DTYPES
def test_packed_sequences(dtype):
    hf, ours = twins(dtype=dtype)
    lengths = (5, 1, 13, 2)
    ids = torch.randint(11, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    apart = torch.cat([hf(row).logits for row in ids.split(lengths, dim=1)], dim=1)
    bounds = [0, 5, 6, 19, 21]
    for packed in (
        ours(ids, position_ids=positions).logits,
        ours(ids, cu_seqlens=bounds).logits,
        ours(ids[0], cu_seqlens=torch.tensor(bounds), position_ids=positions).logits[None],
    ):
        assert distance(packed, apart) <= BOUNDS[dtype]
    assert distance(ours(ids).logits, apart) > 1e-2


def test_packed_images():
    hf, ours = twins("vlm", dtype=torch.float64)
    batch = vlm_batch(hf, [[(2, 3)], [(1, 2), (2, 2)]])
    mask = batch["attention_mask"].bool()
    packed = {
        "input_ids": batch["input_ids"][mask],
        "labels": batch["labels"][mask],
        "cu_seqlens": [0, *mask.sum(1).cumsum(0)],
    }
    images = {key: batch[key] for key in ("pixel_values", "image_sizes")}
    assert distance(ours(**packed, **images).logits, hf(**batch).logits[mask]) <= FP64


def test_a_frozen_tower_records_nothing_but_what_pixels_want():
    hf, ours = (model.train() for model in twins("vlm", dtype=torch.float64))
    for model in (hf, ours):
        model.model.vision_tower.requires_grad_(False)
    features = []
    ours.model.vision_tower.register_forward_hook(lambda *seen: features.append(seen[2]))
    batch = vlm_batch(ours, [[(2, 3)], [(1, 2)]])
    ours(**batch).loss.backward()
    assert not features[0].requires_grad and ours.model.multi_modal_projector.linear_1.weight.grad is not None
    grads = []
    for model in (hf, ours):
        pixels = batch["pixel_values"].detach().clone().requires_grad_()
        with float64_islands():
            model(**{**batch, "pixel_values": pixels}).loss.backward()
        grads.append(pixels.grad)
    assert features[1].requires_grad and distance(grads[1], grads[0]) <= FP64


@DTYPES
@pytest.mark.parametrize("chunks", [[21], [20, 1], [1] * 5 + [16], [8, 8, 5], [3, 1, 1, 9, 7]], ids=str)
def test_cached_and_chunked_prefill(dtype, chunks):
    hf, ours = twins(dtype=dtype)
    ids = text_batch(hf)["input_ids"]
    whole, cache, parts = seen(hf, {"input_ids": ids}), None, []
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            out = ours(chunk, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
    assert cache.lengths == [21, 21]
    assert_same({"logits": torch.cat(parts, dim=1).flatten(0, 1)}, whole, BOUNDS[dtype])


@pytest.mark.parametrize("kind, window", [("vlm", None), ("text", 5)])
def test_cached_decode_of_a_padded_batch(kind, window):
    """A window counts tokens; transformers counts columns, which is the same where padding is on the left."""
    hf, ours = twins(kind, dtype=torch.float64, **({"sliding_window": window} if window else {}))
    batch = vlm_batch(hf, [[(2, 3), (1, 4)], [(3, 2)]]) if kind == "vlm" else text_batch(hf, padding="left")
    batch.pop("labels")
    nexts = torch.randint(11, VOCAB, (2, 4), generator=torch.Generator().manual_seed(3))
    longer = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], nexts], dim=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1),
    }
    want = hf(**longer).logits[:, -4:]
    with torch.no_grad():
        cache = ours(**batch, use_cache=True).cache
        for i in range(4):
            mask = longer["attention_mask"][:, : batch["input_ids"].shape[1] + i + 1]
            got = ours(nexts[:, i : i + 1], attention_mask=mask, cache=cache).logits
            assert distance(got[:, 0], want[:, i]) <= FP64


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"sliding_window": 5},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "num_hidden_layers": 1},
        {"head_dim": 64, "intermediate_size": 7},
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"rope_parameters": rope(truncate=False)},
        {"rope_parameters": rope(attention_factor=1.7)},
        {"rope_parameters": rope(mscale=None)},
        {"rope_parameters": rope(mscale=2.0, mscale_all_dim=0.3)},
        {"rope_parameters": rope(beta_fast=3.0, beta_slow=0.05)},
        {"rope_parameters": rope(beta_fast=None, beta_slow=None)},
        {"rope_parameters": rope(factor=0.5)},
        {"rope_parameters": rope(llama_4_scaling_beta=0)},
        {"rope_parameters": rope(rope_type="default")},
    ],
    ids=lambda value: "-".join(map(str, value.items())),
)
def test_text_configurations(changes):
    hf, ours = twins(dtype=torch.float64, **changes)
    batch = text_batch(hf, padding="right")
    assert_same(seen(ours, batch), seen(hf, batch), FP64)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"text": {"rms_norm_eps": 0.1}},
        {"vision": {"num_attention_heads": 1, "num_hidden_layers": 3}, "vision_feature_layer": -2},
        {"vision_feature_layer": 1},
        {"vision": {"hidden_act": "gelu"}, "multimodal_projector_bias": True},
        {"projector_hidden_act": "relu"},
        {"spatial_merge_size": 1},
    ],
    ids=lambda value: "-".join(map(str, value.items())),
)
def test_vision_configurations(changes):
    hf, ours = twins("vlm", dtype=torch.float64, **changes)
    size = changes.get("spatial_merge_size", 2)
    batch = vlm_batch(hf, [[(2, 4)], [(4, 2)]])
    if size == 1:
        batch["image_sizes"] //= 2  # a patch is a token
    assert_same(seen(ours, batch), seen(hf, batch), FP64)


@pytest.mark.parametrize("theta", [1e6, 1e9])
@pytest.mark.parametrize("changes", [{}, {"truncate": False}, {"beta_fast": 16.0, "beta_slow": 2.0}], ids=str)
def test_released_frequencies(theta, changes):
    """Of the released configs (floor and ceiling matter: 25 to 37 % without), against transformers' bits."""
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding

    released = released_rope(rope_theta=theta, **changes)
    hf = text_config(rope_parameters=released, head_dim=128, max_position_embeddings=262_144)
    mine, theirs = Config.from_hf(hf).text, Ministral3RotaryEmbedding(hf)
    assert torch.equal(mine.rope.inv_freq(128), theirs.inv_freq)
    assert mine.rope.attention_factor == theirs.attention_scaling == 1.0
    assert mine.rope.llama4 == (0.1, 16384)


def test_frequencies_survive_a_cast():
    hf, ours = twins("vlm")
    ours = ours.to(torch.bfloat16).float()
    hf.load_state_dict({k: v.bfloat16().float() for k, v in hf.state_dict().items()})
    batch = vlm_batch(hf, [[(2, 3)]])
    assert_same(seen(ours, batch), seen(hf, batch), FP32)


WRONG = {
    "scale by index": lambda m: m.setattr(text, "query_scale", lambda p, *rest: torch.ones(len(p), 1, 1).double()),
    "log of the position": lambda m: m.setattr(
        text, "query_scale", lambda p, b, o, d: (1 + b * torch.log(1 + p / o))[:, None, None].to(d)
    ),
    "interleaved pairs": lambda m: m.setattr(
        layers, "rotate_half", lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    ),
    "no attention factor": lambda m: m.setattr(config_module, "_attention_factor", lambda *a: 1.0),
    "sequences see each other": lambda m: m.setattr(
        layers.SequenceAttention,
        "forward",
        lambda s, q, k, v, *rest: s.one(q, k.transpose(0, 1), v.transpose(0, 1)),
    ),
    "not causal": lambda m: m.setattr(
        layers.SequenceAttention, "causal", property(lambda s: False, lambda s, v: None), raising=False
    ),
    "columns before rows": lambda m: m.setattr(vision, "places", lambda g, d, f=vision.places: f(g, d).flip(-1)),
    "head mean": lambda m: m.setattr(
        layers.RMSNorm, "forward", lambda s, x, u=None: (s.weight * x, x if u is None else x + u)
    ),
}


@pytest.mark.parametrize("variant", WRONG)
def test_wrong_variants_are_seen(variant, monkeypatch):
    WRONG[variant](monkeypatch)
    hf, ours = twins("vlm", dtype=torch.float64)
    batch = vlm_batch(hf, [[(2, 3), (4, 1)], [(3, 2)]])
    assert distance(seen(ours, batch)["logits"], seen(hf, batch)["logits"]) > 100 * FP32


@pytest.mark.parametrize("layout", ["disk", "runtime", "text"])
@pytest.mark.parametrize("size", SIZES)
def test_from_pretrained(tmp_path, size, layout):
    folder = save(tmp_path / "hf", size, layout)
    ours, hf = Ministral3.from_pretrained(folder, dtype=torch.float64), hf_load(folder, torch.float64)
    assert ours.config.tied == SIZES[size]["tied"] and not ours.training
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == ours.config.tied
    batch = text_batch(hf)
    assert_same(seen(ours, batch), seen(hf, batch), FP64)
    assert Ministral3.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", ["tensor", "one", "block"])
def test_fp8_checkpoints_are_dequantised(tmp_path, scale):
    folder = save_fp8(tmp_path / "hf", scale)
    # in bf16 first: transformers 5.17 dequantises to nothing else
    ours, hf = Ministral3.from_pretrained(folder).float(), hf_load(folder).float()
    batch = text_batch(hf)
    assert_same(seen(ours, batch), seen(hf, batch), FP32)


def test_a_checkpoint_with_a_head_is_never_tied_whatever_the_flags_say(tmp_path):
    from hf_folders import edit_config

    folder = save(tmp_path / "hf", "8b")
    edit_config(folder, tie_word_embeddings=True)
    ours = Ministral3.from_pretrained(folder)
    assert ours.lm_head.weight is not ours.get_input_embeddings().weight


def test_a_missing_tensor_is_an_error(tmp_path):
    from hf_folders import rewrite

    folder = save(tmp_path / "hf")
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k})
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj"):
        Ministral3.from_pretrained(folder)


def test_outputs_as_transformers_gives_them():
    hf, ours = twins("vlm", dtype=torch.float64)
    batch = vlm_batch(hf, [[(2, 3)], [(1, 2)]])
    columns = torch.tensor([0, 3, 5])
    for keep in (1, 4, columns):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        mine, theirs = (model(**inputs, logits_to_keep=keep).logits for model in (ours, hf))
        assert mine.shape == theirs.shape
        real = kept(batch)[:, -keep:] if isinstance(keep, int) else kept(batch)[:, keep]
        assert distance(mine[real], theirs[real]) <= FP64
    output = ours(**batch)
    assert output[0] is output.loss is output["loss"] and output.logits.requires_grad
    assert isinstance(ours(**batch, return_dict=False), tuple)
    with float64_islands():
        for option in ({"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}):
            assert distance(ours(**batch, **option).loss, hf(**batch, **option).loss) <= FP64
        shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        assert distance(ours(**inputs, shift_labels=shifted).loss, hf(**batch).loss) <= FP64
    assert ours(**batch, skip_logits=True).logits is None


def test_bfloat16_error_is_at_most_transformers():
    from native import twins as make

    hf, ours = make("vlm", dtype=torch.bfloat16)
    truth = like(hf).double()
    off = {"hf": 0.0, "ours": 0.0}
    for seed in range(8):
        batch = vlm_batch(hf, [[(2, 3)], [(1, 4), (2, 2)]], seed=seed)
        exact = seen(truth, on(batch, truth))["logits"]
        for name, model in (("hf", hf), ("ours", ours)):
            off[name] += (seen(model, batch)["logits"].double() - exact).square().sum().item()
    assert off["ours"] <= 1.5**2 * off["hf"]


def raises(match: str, call, error=ValueError) -> None:
    with pytest.raises(error, match=match):
        call()


def test_what_does_not_fit_is_refused():
    hf, ours = twins("vlm")
    batch = vlm_batch(hf, [[(2, 3)]])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    raises("5 features|image tokens", lambda: ours(**{**batch, "input_ids": ids.clamp(min=11)}))
    raises("image_sizes has 2", lambda: ours(**{**batch, "image_sizes": [(16, 24)] * 2}))
    raises("an image of 8 x 400", lambda: ours(**{**batch, "image_sizes": [(8, 400)]}))
    raises("attention_mask is", lambda: ours(ids, attention_mask=mask[:, 1:]))
    raises("attention_mask is", lambda: ours(ids, attention_mask=torch.ones(1, 1, 4, 4)))
    raises("position_ids are", lambda: ours(ids, position_ids=torch.arange(3)))
    raises("cu_seqlens must rise", lambda: ours(ids, cu_seqlens=[0, 5]))
    raises("neither attention_mask", lambda: ours(ids, mask, cu_seqlens=[0, ids.shape[1]]))
    raises("labels are", lambda: ours(ids, labels=ids[:, 1:]))
    cache = ours(ids, use_cache=True).cache
    raises("the cache holds 1", lambda: ours(ids.repeat(2, 1), cache=cache))
    ours.train()
    raises("keeps no gradients", lambda: ours(ids, use_cache=True))
    alone = like(twins()[0])
    raises("without a vision tower", lambda: alone(**batch))
    raises(
        "rope_type is 'linear'",
        lambda: Config.from_hf(text_config(rope_parameters=rope(rope_type="linear"))),
        ConfigError,
    )
    raises(
        "hidden_act is 'sloth'; allowed: .*silu", lambda: Config.from_hf(text_config(hidden_act="sloth")), ConfigError
    )
    raises("cannot share", lambda: Config.from_hf(text_config(num_key_value_heads=4)), ConfigError)
    raises("model_type", lambda: Config.from_hf({"model_type": "llama"}), CheckpointError)
