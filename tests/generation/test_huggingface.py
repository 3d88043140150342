"""m3kernels.generate on Hugging Face models: their own generate token for token, on their own weights."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_patch_fp8 import BLOCKS, dequantised, quantise
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.finegrained_fp8 import FP8Linear

import m3kernels
from m3kernels.models.generation import kept
from m3kernels.models.generation.borrowing import Source
from m3kernels.models.generation.prompt import GenerationError
from models import FP32, IMAGES, VOCAB, assert_same, build, inputs, observe, redraw, text_batch, vlm_batch

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


def theirs(model: nn.Module, batch: dict, **options) -> torch.Tensor:
    return model.generate(**batch, **{**GREEDY, **options})


def ours(model: nn.Module, batch: dict, **options) -> torch.Tensor:
    return m3kernels.generate(model, **batch, **{**GREEDY, **options})


def assert_same_tokens(model: nn.Module, batch: dict, **options) -> torch.Tensor:
    want = theirs(model, batch, **options)
    got = ours(model, batch, **options)
    assert torch.equal(got, want), f"{got.tolist()}\n{want.tolist()}"
    return want


def left(batch: dict) -> dict:
    """A batch padded on the right, padded on the left."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    moved = {key: batch[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    return {**batch, **moved}


# --- the same tokens as transformers

MODELS = {
    "text": {"kind": "text"},
    "vlm": {"kind": "vlm"},
    "tied": {"kind": "text", "tie_word_embeddings": True},
    "tied vlm": {"kind": "vlm", "tie_word_embeddings": True},
    "window": {"kind": "text", "sliding_window": 6},
    "gelu": {"kind": "text", "hidden_act": "gelu"},
    "one head": {"kind": "text", "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_batches(name, cache, device):
    """12 columns, the query scale from position 8 on: rows go over the original length while they are generated."""
    model = build(**MODELS[name], device=device)
    batch = inputs(text_batch(model, batch=3, seq=12, padding="left"))
    found = assert_same_tokens(model, batch, cache_implementation=cache)
    assert len(found[:, 12:].unique()) > 5, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("name", ["text", "window"])
def test_prompts_beyond_the_original_length(name, device):
    model = build(**MODELS[name], device=device)
    batch = inputs(text_batch(model, batch=2, seq=70, padding="left"))
    assert_same_tokens(model, batch, max_new_tokens=24)


def test_two_models_differ(device):
    """What is compared above can differ."""
    model, other = build(device=device), redraw(build(device=device), seed=1)
    batch = inputs(text_batch(model))
    assert not torch.equal(ours(model, batch), ours(other, batch))
    scaled = build(device=device, rope_parameters={**model.config.rope_parameters, "llama_4_scaling_beta": 3.0})
    assert not torch.equal(ours(model, batch), ours(scaled, batch))


@pytest.mark.parametrize("images", [IMAGES, [[(2, 3)], [(1, 1), (2, 2), (1, 4)], []]], ids=["two and one", "none too"])
def test_images(images, device):
    model = build("vlm", device=device)
    batch = left(inputs(vlm_batch(model, images)))
    found = assert_same_tokens(model, batch)
    blind = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    blind["input_ids"] = torch.where(batch["input_ids"] == 10, 20, batch["input_ids"])
    assert not torch.equal(ours(model, blind), found)


def test_right_padding_is_left_padding(device):
    model = build("vlm", device=device)
    batch = inputs(vlm_batch(model, IMAGES))
    seq = batch["input_ids"].shape[1]
    got = ours(model, batch)
    assert torch.equal(got[:, :seq], batch["input_ids"])
    assert torch.equal(got[:, seq:], theirs(model, left(batch))[:, seq:])


def test_padding_is_found_without_a_mask(device):
    model = build(device=device)
    batch = inputs(text_batch(model, batch=3, padding="left"))
    del batch["attention_mask"]
    assert_same_tokens(model, batch)
    # an id that ends sequences as well is no padding
    assert_same_tokens(model, batch, eos_token_id=0, pad_token_id=0)


@pytest.mark.parametrize("how", ["one id", "several", "tensor", "from the model", "never"])
def test_ends_of_sequences(how, device):
    model = build(device=device)
    batch = inputs(text_batch(model, batch=3, seq=9))
    free = theirs(model, batch)[:, 9:]
    first, second = int(free[0, 3]), int(free[1, 5])
    options = {
        "one id": {"eos_token_id": first},
        "several": {"eos_token_id": [first, second], "pad_token_id": 7},
        "tensor": {"eos_token_id": torch.tensor([first, second], device=device)},
        "from the model": {},
        "never": {"eos_token_id": -1},
    }[how]
    if how == "from the model":
        model.generation_config.eos_token_id = first
        want = model.generate(**batch, max_new_tokens=12, do_sample=False)
        got = m3kernels.generate(model, **batch, max_new_tokens=12)
        assert torch.equal(got, want)
    else:
        want = assert_same_tokens(model, batch, **options)
    if how != "never":
        assert want[0, 12] == first and len(want[0, 13:].unique()) <= 1, "the row ends"


def test_all_rows_end_early(device):
    model = build(device=device)
    batch = inputs(text_batch(model, batch=1, seq=9))
    end = int(theirs(model, batch)[0, 9 + 4])
    assert assert_same_tokens(model, batch, eos_token_id=end).shape[1] <= 9 + 5


# --- options


CONFIGURED = {
    "nothing": ({}, None, {}),
    "the call": ({"max_new_tokens": 3}, None, {"max_new_tokens": 5}),
    "the config": ({"max_new_tokens": 3}, {"max_new_tokens": 4}, {}),
    "the call over the config": ({}, {"max_new_tokens": 4}, {"max_new_tokens": 6}),
    "the model": ({"max_new_tokens": 3}, {"top_k": 5}, {}),
    "max_length": ({}, None, {"max_length": 15}),
    "max_length of the model": ({"max_length": 14}, None, {}),
    "new tokens count more": ({"max_new_tokens": 3}, None, {"max_length": 25}),
    "none of the call": ({"max_new_tokens": 3, "max_length": 25}, None, {"max_new_tokens": None}),
    "no end in the call": ({"eos_token_id": list(range(VOCAB)), "max_new_tokens": 4}, None, {"eos_token_id": None}),
    "no end in the config": ({"eos_token_id": list(range(VOCAB)), "max_new_tokens": 4}, {"eos_token_id": None}, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGURED)
def test_precedence_of_options(name):
    of_model, config, call = CONFIGURED[name]
    model = build()
    for key, value in of_model.items():
        setattr(model.generation_config, key, value)
    config = config and GenerationConfig(**config)
    batch = inputs(text_batch(model, seq=9))
    want = model.generate(**batch, generation_config=config, **call)
    got = m3kernels.generate(model, **batch, generation_config=config, **call)
    assert torch.equal(got, want)


def test_no_ids_begin_with_bos():
    model = build()
    want = model.generate(bos_token_id=5, max_new_tokens=6, do_sample=False)
    assert torch.equal(m3kernels.generate(model, bos_token_id=5, max_new_tokens=6), want)
    model.generation_config.bos_token_id = None
    with pytest.raises(GenerationError, match="give input_ids"):
        m3kernels.generate(model, max_new_tokens=6)


def test_output_class_and_dtype():
    model = build()
    batch = inputs(text_batch(model))
    want = theirs(model, batch, return_dict_in_generate=True)
    got = ours(model, batch, return_dict_in_generate=True)
    assert type(got) is type(want) and torch.equal(got.sequences, want.sequences)
    assert ours(model, {"input_ids": batch["input_ids"].int()}).dtype == torch.int32


class Recorder:
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


def test_streamers_get_what_transformers_gives_them():
    model = build()
    batch = inputs(text_batch(model, batch=1, seq=9))
    free = theirs(model, batch)[0, 9:].tolist()
    end = max(free, key=free.index)
    recorders = Recorder(), Recorder()
    theirs(model, batch, eos_token_id=end, streamer=recorders[0])
    ours(model, batch, eos_token_id=end, streamer=recorders[1])
    assert recorders[1].seen == recorders[0].seen and len(recorders[1].seen) > 4


REFUSED = {
    "num_beams=3": {"num_beams": 3},
    "num_return_sequences=2": {"num_return_sequences": 2},
    "logits_processor": {"logits_processor": [lambda ids, scores: scores]},
    "stopping_criteria": {"stopping_criteria": [lambda ids, scores: False]},
    "assistant_model": {"assistant_model": nn.Identity()},
    "guidance_scale=1.5": {"guidance_scale": 1.5},
    "repetition_penalty=1.2": {"repetition_penalty": 1.2},
    "bad_words_ids": {"bad_words_ids": [[3]]},
    "prompt_lookup_num_tokens=3": {"prompt_lookup_num_tokens": 3},
    "output_scores=True": {"output_scores": True},
    "min_new_tokens=4": {"min_new_tokens": 4},
    "stop_strings": {"stop_strings": ["x"]},
    "max_time=1.0": {"max_time": 1.0},
    "penalty_alpha=0.6": {"penalty_alpha": 0.6},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 3, 48)},
    "position_ids": {"position_ids": torch.zeros(2, 21)},
    "custom_generate": {"custom_generate": "a/b"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_not_there(name):
    model = build()
    with pytest.raises(GenerationError, match=r"hf_model\.generate") as error:
        ours(model, inputs(text_batch(model)), **REFUSED[name])
    assert str(error.value).startswith(name)


def test_refused_options_may_stand_in_configs():
    model = build()
    model.generation_config.repetition_penalty = 1.3
    batch = inputs(text_batch(model))
    with pytest.raises(GenerationError, match="repetition_penalty=1.3, from the generation config"):
        ours(model, batch)
    assert torch.equal(ours(model, batch, repetition_penalty=1.0), theirs(model, batch, repetition_penalty=1.0))


def test_empty_lists_of_processors_and_criteria_change_nothing():
    model = build()
    options = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()}
    assert_same_tokens(model, inputs(text_batch(model)), **options)


def test_wrong_inputs():
    model, vlm = build(), build("vlm")
    batch, seen = inputs(text_batch(model)), inputs(vlm_batch(vlm, IMAGES))
    wrong = [
        (model, {}, {"nonsense": 1}, TypeError, "takes no nonsense"),
        (model, {}, {"max_length": 21, "max_new_tokens": None}, GenerationError, "nothing is left to generate"),
        (model, {}, {"do_sample": True, "temperature": 0.0}, GenerationError, "temperature=0.0"),
        (model, {}, {"max_new_tokens": 1000}, GenerationError, "256 positions"),
        (model, {}, {"max_new_tokens": 1.5}, GenerationError, "max_new_tokens=1.5; allowed: a whole number"),
        (model, {}, {"max_length": "9", "max_new_tokens": None}, GenerationError, "max_length='9'; allowed"),
        (model, {}, {"do_sample": True, "temperature": "a"}, GenerationError, "temperature='a'; allowed: a number"),
        (model, {}, {"do_sample": True, "seed": "a"}, GenerationError, "seed='a'; allowed: a whole number"),
        (model, {}, {"generation_config": {"max_new_tokens": 3}}, TypeError, "generation_config is a dict"),
        (
            model,
            {"input_ids": batch["input_ids"].tolist()},
            {},
            GenerationError,
            "input_ids are a list; allowed: a tensor",
        ),
        (model, {"input_ids": batch["input_ids"] > 20}, {}, GenerationError, "torch.bool; allowed"),
        (model, {"attention_mask": [[1] * 21] * 2}, {}, GenerationError, "attention_mask is a list"),
        (
            vlm,
            {**seen, "pixel_values": seen["pixel_values"].numpy()},
            {},
            GenerationError,
            "pixel_values are a ndarray",
        ),
        (model, {"attention_mask": torch.ones(2, 20)}, {}, GenerationError, "attention_mask is"),
        (model, {"attention_mask": torch.zeros(2, 21)}, {}, GenerationError, "0 everywhere"),
        (model, {"input_ids": torch.zeros(21, dtype=torch.long)}, {}, GenerationError, "allowed: .batch, seq."),
        (model, {"input_ids": torch.full((1, 4), VOCAB)}, {}, GenerationError, "the model has 151"),
        (model, {"pixel_values": torch.zeros(1, 3, 8, 8)}, {}, GenerationError, "no vision tower"),
        (vlm, {**seen, "image_sizes": seen["image_sizes"][:2]}, {}, GenerationError, "image_sizes are"),
        (vlm, {**seen, "input_ids": seen["input_ids"].flip(0)}, {}, GenerationError, "image tokens; images have"),
    ]
    for target, changes, options, error, message in wrong:
        with pytest.raises(error, match=message):
            ours(target, {**(batch if target is model else {}), **changes}, **options)


# --- the model's weights


def storages(model: nn.Module) -> dict[str, tuple]:
    return {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_weights_are_used_where_they_are(kind, patched, tmp_path):
    model, twin = build(kind), build(kind)
    if patched:
        m3kernels.patch(model)
    batch = inputs(text_batch(model))
    state, places = copy.deepcopy(model.state_dict()), storages(model)
    classes = [type(module) for module in model.modules()]
    ours(model, batch)
    shell = kept._kept[model].generator.model
    assert storages(model) == places
    assert {id(p) for p in shell.parameters()} == {id(p) for p in model.parameters()}
    assert_same(dict(model.state_dict()), state, 0.0)
    assert [type(module) for module in model.modules()] == classes
    model.save_pretrained(tmp_path)
    assert_same(dict(type(model).from_pretrained(tmp_path).state_dict()), state, 0.0)
    batch = text_batch(model)
    assert_same(observe(model, batch), observe(twin, batch), FP32)


def test_tied_heads_stay_tied():
    model = build("vlm", tie_word_embeddings=True)
    ours(model, inputs(text_batch(model)))
    shell = kept._kept[model].generator.model
    assert shell.lm_head.weight is shell.get_input_embeddings().weight is model.lm_head.weight


def test_a_shell_that_is_laid_side_by_side_would_move_them():
    """What ``borrows_weights`` prevents."""
    model = build()
    places = storages(model)
    shell = Source.of(model).shell()
    assert storages(model) == places
    del shell.borrows_weights
    m3kernels.patch(shell)
    assert storages(model) != places


def test_training_in_between(device):
    """Steps change weights in place, some without a trace; the prompt is the same."""
    model = build(device=device)
    batch = text_batch(model)
    first = assert_same_tokens(model, inputs(batch))
    generator = kept._kept[model].generator
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    second = assert_same_tokens(model, inputs(batch))
    for p in model.parameters():
        p.data.mul_(1.1).add_(0.02)
    third = assert_same_tokens(model, inputs(batch))
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert kept._kept[model].generator is generator and model.training


def test_exchanged_weights(device):
    model = build(device=device)
    batch = inputs(text_batch(model))
    ours(model, batch)
    generator = kept._kept[model].generator
    assert_same_tokens(model.double(), batch)
    assert kept._kept[model].generator is not generator
    other = redraw(build(device=device), seed=4).double()
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(assert_same_tokens(model, batch), ours(other, batch))
    model.model.layers[0].mlp = copy.deepcopy(build(device=device).double().model.layers[1].mlp)
    assert_same_tokens(model, batch)


def test_nothing_outlives_the_model():
    model = build()
    ours(model, inputs(text_batch(model)))
    shell = weakref.ref(kept._kept[model].generator.model)
    copied = copy.deepcopy(model)
    assert copied not in kept._kept and not any("generator" in key for key in vars(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and shell() is None


def test_low_precision_runs_and_keeps_its_dtype():
    model = build(dtype=torch.bfloat16)
    got = ours(model, inputs(text_batch(model)))
    assert got.shape == (2, 33) and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["text", "vlm"])
@pytest.mark.parametrize("per", ["tensor", "blocks"])
def test_fp8_weights_as_they_are(per, kind):
    """As the layers with their weights dequantised, which is what transformers runs where it has no FP8 kernels."""
    model = quantise(build(kind), BLOCKS[per == "blocks"])
    plain = dequantised(model)
    batch = inputs(text_batch(model, batch=2, padding="left"))
    places = storages(model)
    assert torch.equal(ours(model, batch), theirs(plain, batch))
    generator = kept._kept[model].generator
    assert {id(p) for p in generator.model.parameters()} <= {id(p) for p in model.parameters()}
    assert storages(model) == places and generator.fused == (per == "tensor")
    ours(model, batch)
    assert kept._kept[model].generator is generator
    layers = [m for m in model.modules() if isinstance(m, FP8Linear)]
    for layer in layers:
        layer.weight_scale_inv.data.mul_(0.7)
    assert not torch.equal(ours(model, batch), theirs(plain, batch)), "scales count"
    layers[0].weight_scale_inv = nn.Parameter(layers[0].weight_scale_inv.to(torch.bfloat16), requires_grad=False)
    with pytest.raises(GenerationError, match=r"q_proj, an FP8 layer: scales are torch.bfloat16.*hf_model\.generate"):
        ours(model, batch)


# --- models that it does not take


def _hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output)
    return "model.layers.0 has a forward hook"


def _replaced(model):
    model.model.layers[1].mlp.forward = lambda x: x
    return r"model.layers.1.mlp was replaced on the instance"


def _other_linear(model):
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    model.model.layers[0].mlp.up_proj = Linear4bit(48, 84, bias=False)
    return "up_proj is a bitsandbytes.nn.modules.*Linear4bit"


def _offloaded(model):
    model.model.layers[1].to("meta")
    return "meta device"


def _mixed(model):
    model.model.norm.to(torch.bfloat16)
    return "bfloat16, float32"


def _dropping(model):
    model.config.attention_dropout = 0.1
    model.train()
    return r"attention dropout 0.1.*model.eval"


def _biased(model):
    model.lm_head = nn.Linear(48, VOCAB)
    return "lm_head has weight, bias"


def _resized(model):
    model.lm_head = nn.Linear(48, VOCAB + 3, bias=False)
    return r"lm_head.weight is .154, 48., by the model's config .151, 48."


@pytest.mark.parametrize(
    "change", [_hooked, _replaced, _other_linear, _offloaded, _mixed, _dropping, _biased, _resized]
)
def test_models_that_are_refused(change):
    model = build()
    message = change(model)
    with pytest.raises(GenerationError, match=message):
        ours(model, inputs(text_batch(build())))


def test_other_models_are_refused():
    with pytest.raises(GenerationError, match="Ministral3Model has no head"):
        m3kernels.generate(build().model, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(GenerationError, match="is not supported"):
        m3kernels.generate(nn.Linear(3, 3), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(GenerationError, match="needs a transformers model"):
        m3kernels.generate("mistralai/Ministral-3-3B", torch.zeros(1, 3, dtype=torch.long))


# --- draws


def test_draws_follow_the_seed():
    model = build()
    batch = inputs(text_batch(model, batch=3, padding="left"))
    say = lambda **options: ours(model, batch, do_sample=True, temperature=1.5, **options)
    first = say(seed=3)
    assert torch.equal(say(seed=3), first) and not torch.equal(say(seed=4), first)
    torch.manual_seed(5)
    unseeded = say()
    assert not torch.equal(say(), unseeded), "two calls draw anew"
    torch.manual_seed(5)
    assert torch.equal(say(), unseeded)
    assert torch.equal(say(seed=3, top_k=1), ours(model, batch)), "one candidate is the likeliest"


def test_draws_stay_among_transformers_candidates():
    """Of 500 first tokens none is one that transformers' filters exclude, and each of theirs comes as often as it should."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model = build()
    ids = text_batch(model, batch=1, seq=9)["input_ids"]
    scores = model(ids).logits[:, -1]
    for warp in (TemperatureLogitsWarper(2.0), TopKLogitsWarper(9), TopPLogitsWarper(0.8)):
        scores = warp(ids, scores)
    p = scores.softmax(-1)[0]
    options = {"do_sample": True, "temperature": 2.0, "top_k": 9, "top_p": 0.8, "max_new_tokens": 1}
    drawn = ours(model, {"input_ids": ids.expand(500, -1)}, **options, seed=1)[:, -1]
    counts = torch.bincount(drawn, minlength=VOCAB)
    assert 2 < int((p > 0).sum()) <= 9 and not counts[p == 0].any()
    spread = (500 * p * (1 - p)).sqrt()
    assert ((counts - 500 * p).abs() <= 4.5 * spread + 1e-3).all()
    narrower = ours(model, {"input_ids": ids.expand(100, -1)}, **{**options, "top_k": 2, "top_p": 1.0}, seed=1)[:, -1]
    assert len(narrower.unique()) == 2


def test_the_default_of_top_k_is_transformers():
    model = build()
    ids = text_batch(model, batch=1, seq=9)["input_ids"].expand(400, -1)
    flat = {"do_sample": True, "temperature": 1000.0, "max_new_tokens": 1, "seed": 0}
    assert len(ours(model, {"input_ids": ids}, **flat)[:, -1].unique()) == 50
    assert len(ours(model, {"input_ids": ids}, **flat, top_k=None)[:, -1].unique()) > 100


def test_a_generator_for_every_kv_dtype():
    model = build(head_dim=16)
    batch = inputs(text_batch(model))
    ours(model, batch, kv_dtype="fp8")
    assert kept._kept[model].generator.kv_dtype == torch.float8_e4m3fn
    assert_same_tokens(model, batch)
    with pytest.raises(GenerationError, match="kv_dtype='fp4'"):
        ours(model, batch, kv_dtype="fp4")


def test_threads_wait_for_one_another():
    model = build()
    batches = [inputs(text_batch(model, seed=seed)) for seed in (1, 2, 3)]
    want = [theirs(model, batch) for batch in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        got = list(pool.map(lambda batch: ours(model, batch), batches * 3))
    assert all(torch.equal(rows, expected) for rows, expected in zip(got, want * 3))
