"""``Ministral3.generate`` and ``stream``: transformers' options on our own model."""

import gc
import json
import weakref

import pytest
import torch
from native import like, twins

import m3kernels
from m3kernels.models.generation import kept
from m3kernels.models.generation.prompt import GenerationError
from m3kernels.models.ministral3 import AdapterConfig, Ministral3, add_adapters, merge_adapters, targets_of
from models import IMAGES, build, inputs, redraw, text_batch, vlm_batch

GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": -1}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_rows_are_those_of_transformers(patched):
    hf, ours = twins("vlm")
    if patched:
        m3kernels.patch(ours)
    for batch in (text_batch(hf, batch=3, padding="left"), text_batch(hf)):
        want = hf.generate(**inputs(batch), **GREEDY)
        assert torch.equal(ours.generate(**inputs(batch), **GREEDY), want)
    batch = inputs(vlm_batch(hf, IMAGES))
    assert torch.equal(ours.generate(**batch, **GREEDY), m3kernels.generate(hf, **batch, **GREEDY))


def test_bursts():
    hf, ours = twins()
    batch = inputs(text_batch(hf, batch=2, seq=9))
    free = hf.generate(**batch, **GREEDY)[:, 9:].tolist()
    end = free[0][4]
    stops = {**GREEDY, "eos_token_id": end}
    runs = ours.stream(**batch, **stops), ours.generate(**batch, **stops, stream=True)
    with pytest.raises(GenerationError, match="another call"):
        list(runs[0])
    bursts = list(runs[1])
    assert max(len(row) for burst in bursts for row in burst) == 1
    for row in range(2):
        kept_tokens = free[row][: free[row].index(end)] if end in free[row] else free[row]
        assert [token for burst in bursts for token in burst[row]] == kept_tokens == runs[1].results[row].tokens
    assert runs[1].results[0].reason == "stop"
    assert max(len(burst[1]) for burst in ours.stream(**batch, **GREEDY, every=4)) == 4
    with pytest.raises(ValueError, match="either stream=True"):
        ours.generate(**batch, stream=True, streamer=object())


def test_a_run_keeps_its_model():
    model = like(build())
    gone = weakref.ref(model)
    run = model.stream(torch.full((1, 4), 20), max_new_tokens=5, eos_token_id=None)
    del model
    assert len(list(run)) == 5 and gone() is not None
    del run
    gc.collect()
    assert gone() is None


def test_nothing_outlives_the_model():
    model = like(build())
    model.generate(torch.full((1, 4), 20), max_new_tokens=3)
    gone, generator = weakref.ref(model), weakref.ref(kept._kept[model].generator)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None and generator() is None, "memory would stay until the next collection"
    finally:
        gc.enable()


def test_changes_of_the_model():
    model = like(build())
    batch = inputs(text_batch(model, seq=9))
    say = lambda: model.generate(**batch, **GREEDY)
    first = say()
    generator = kept._kept[model].generator
    for p in model.parameters():
        p.data.mul_(1.1).add_(0.03)  # without a trace
    second = say()
    assert kept._kept[model].generator is generator and not torch.equal(second, first)
    add_adapters(model, AdapterConfig(rank=3), targets_of(model))
    assert torch.equal(say(), second) and not kept._kept[model].generator.fused
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    third = say()
    assert not torch.equal(third, second)
    merge_adapters(model)
    assert torch.equal(say(), third) and kept._kept[model].generator.fused
    fourth = model.double().generate(**batch, **GREEDY)
    assert torch.equal(fourth, third)
    seen = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(say(), fourth) and len(seen) == 10
    hook.remove()
    assert torch.equal(say(), fourth) and len(seen) == 10


def test_defaults_of_the_checkpoint(tmp_path):
    hf = redraw(build("vlm"), seed=2)
    hf.generation_config.max_new_tokens = 7
    hf.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    ours = Ministral3.from_pretrained(tmp_path)
    ids = text_batch(hf)["input_ids"]
    assert torch.equal(ours.generate(ids), hf.generate(ids, do_sample=False)) and written["max_new_tokens"] == 7
    assert ours.generate(ids, max_new_tokens=2).shape == (2, 23)
    with pytest.raises(TypeError, match="takes no max_tokens"):
        ours.generate(ids, max_tokens=2)


def test_a_stream_gives_nothing_of_another_call():
    """Not even its first token, which was drawn before."""
    model = like(hf := build())
    first, other = (text_batch(hf, seed=seed)["input_ids"] for seed in (1, 2))
    run = model.stream(first, **GREEDY)
    model.generate(other, **GREEDY)
    with pytest.raises(GenerationError, match="another call has begun"):
        next(run)
