"""FP8 weights, FP8 keys and values, and drawn tokens through the engine."""

import hf_folders
import pytest
import tiny_checkpoints
import torch
import tp_jobs
from hf_folders import save_fp8
from native import twins
from pool import run
from prompts import text_prompts

from m3kernels.cli import main
from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.loading import check_fp8, find
from m3kernels.models.generation.loading import load as load_for_generation
from m3kernels.models.generation.prompt import GenerationError, Sampling
from m3kernels.models.generation.step import DecodeStep, module_step
from m3kernels.models.ministral3 import Ministral3, quantize_
from m3kernels.models.ministral3.cache import KVCache
from m3kernels.models.ministral3.layers import Sequences
from m3kernels.models.ministral3.quantized import quantized_layers
from m3kernels.models.ministral3.tokens import Tokens
from m3kernels.ops.fp8_dequantize import FP8
from m3kernels.parity.core import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (5, 17, 30)


def tokens(generations):
    return [generation.tokens for generation in generations]


@torch.no_grad()
def prefilled(model, dtype=None):
    """A cache with three prompts in it, and positions after them."""
    ids = torch.tensor([token for prompt in text_prompts(*LENGTHS) for token in prompt.tokens], device=DEVICE)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(DEVICE)
    cache = KVCache(len(LENGTHS), dtype=dtype)
    model.hidden_states(
        Tokens(ids, positions, Sequences(LENGTHS, (0, 1, 2), ids.device), None, (len(ids),)), cache=cache
    )
    cache.end(len(ids))
    return cache, torch.tensor(LENGTHS, device=DEVICE)


@torch.no_grad()
def two_steps(step, model, dtype=None):
    """Logits of two tokens of every row, one after the other."""
    cache, positions = prefilled(model, dtype)
    found = []
    for ids in ([11, 12, 13], [14, 15, 16]):
        ids = torch.tensor(ids, device=DEVICE)
        if step is DecodeStep:
            found.append(DecodeStep(model)(ids, positions, (positions + 1).int(), cache))
            cache.lengths = [n + 1 for n in cache.lengths]
        else:
            found.append(module_step(model)(ids, positions, (positions + 1).int(), cache))
            cache.end(1)
        positions = positions + 1
    return torch.stack(found)


def test_fused_steps_over_fp8_keys_and_values_are_the_modules_own():
    model = twins("text", device=DEVICE)[1].eval()
    exact, fused = two_steps(DecodeStep, model), two_steps(DecodeStep, model, FP8)
    assert relative_error(fused, two_steps(module_step, model, FP8)) < 1e-5
    # a rounding of 2^-4 at most in each key and value
    assert 1e-4 < relative_error(fused, exact) < 2.0**-4
    assert relative_error(exact, two_steps(module_step, model)) < 1e-5


def test_an_fp8_cache_through_the_engine():
    model = twins("text", device=DEVICE)[1]
    generator = Generator(model, kv_dtype="fp8", chunk=9)
    prompts = text_prompts(5, 17, 30)
    first = tokens(generator.generate(prompts, Sampling(max_new_tokens=6)))
    assert generator._state.cache.layer(0).keys.dtype == FP8 and generator.fused
    # what the last call left is read again
    assert tokens(generator.generate(prompts, Sampling(max_new_tokens=6))) == first


@pytest.mark.parametrize(
    ("scale", "quantize", "fused"), [("tensor", "keep", True), ("block", "keep", False), ("one", "fp8", True)]
)
def test_fp8_weights_give_the_tokens_of_their_numbers(tmp_path, scale, quantize, fused):
    folder = save_fp8(tmp_path, scale)
    model = Ministral3.from_pretrained(folder, dtype=torch.float32, quantize=quantize, device=DEVICE)
    generator, prompts = Generator(model), text_prompts(5, 17)
    assert generator.fused == fused and (fused or "scale for each block" in generator.why_not)
    if quantize == "keep":
        plain = Ministral3.from_pretrained(folder, dtype=torch.float32, device=DEVICE)
        wanted = tokens(Generator(plain).generate(prompts, Sampling(max_new_tokens=10)))
    else:
        wanted = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            ids = list(prompt.tokens)
            for _ in range(10):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids], device=DEVICE)).logits[0, -1].argmax()))
            wanted[row] = ids[-10:]
    assert tokens(generator.generate(prompts, Sampling(max_new_tokens=10))) == wanted
    if fused:
        assert relative_error(two_steps(DecodeStep, model), two_steps(module_step, model)) < 1e-5


@pytest.mark.parametrize(("scale", "quantize"), [("tensor", "keep"), ("block", "keep"), ("block", "fp8")])
def test_fp8_weights_over_ranks_are_those_of_one_process(tmp_path, scale, quantize, monkeypatch):
    monkeypatch.setattr(hf_folders, "BLOCK", 16)  # which half of each layer's heads has whole
    for found in run(2, tp_jobs.quantised, str(save_fp8(tmp_path, scale)), quantize):
        assert found["many"] == found["one"] and found["scales equal"] and found["halves"]


def test_the_command(capsys):
    model = load_for_generation(find(tiny_checkpoints.checkpoint()), fp8=True)
    prompt = tiny_checkpoints.chat().prompt("Say hello.")
    (answer,) = Generator(model, kv_dtype="fp8").generate([prompt], Sampling(max_new_tokens=8, stop_tokens=(2,)))
    options = ["--hf-model-path", str(tiny_checkpoints.checkpoint()), "--device", "cpu", "--max-new-tokens", "8"]
    assert main(["generate", *options, "--prompt", "Say hello.", "--fp8", "--kv-dtype", "fp8"]) == 0
    assert f"Completion: {tiny_checkpoints.chat().decode(answer.tokens)}" in capsys.readouterr().out
    with pytest.raises(GenerationError, match="with an adapter over tp=2: .* take tp=1, or save the merged model"):
        check_fp8(True, "adapter", 2)


def test_what_fp8_weights_are_made_of(tmp_path):
    kept = load_for_generation(find(save_fp8(tmp_path)), fp8=True)
    assert {layer.weight_scale.dim() for layer in quantized_layers(kept).values()} == {0}
    merged = load_for_generation(find(tiny_checkpoints.checkpoint(), adapter=tiny_checkpoints.adapter()))
    prompts, sampling = [tiny_checkpoints.chat().prompt("Say hello.")], Sampling(max_new_tokens=8)
    wanted = tokens(Generator(quantize_(merged)).generate(prompts, sampling))
    ours = load_for_generation(find(tiny_checkpoints.checkpoint(), adapter=tiny_checkpoints.adapter()), fp8=True)
    assert quantized_layers(ours) and tokens(Generator(ours).generate(prompts, sampling)) == wanted


def test_fp8_weights_over_ranks_that_cannot_be(tmp_path):
    for dp, tp_cut in run(2, tp_jobs.quantised_refusals, str(save_fp8(tmp_path, "block"))):
        assert "take dp=1" in dp and "cut within a block of [32, 32]" in tp_cut


def test_drawn_tokens_follow_the_seed_and_the_filters():
    hf, ours = twins("text", device=DEVICE)
    prompts, generator = text_prompts(5, 17), Generator(ours)
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 4}
    first = tokens(generator.generate(prompts, Sampling(**options, seed=5)))
    assert tokens(generator.generate(prompts, Sampling(**options, seed=5))) == first
    assert tokens(generator.generate(prompts, Sampling(**options, seed=6))) != first
    assert tokens(generator.generate(prompts[:1], Sampling(**options, seed=5))) == first[:1]
    likeliest = 0
    for prompt, drawn in zip(prompts, first):
        ids = torch.tensor([prompt.tokens + tuple(drawn)], device=DEVICE)
        with torch.no_grad():
            best = hf(ids).logits[0, len(prompt.tokens) - 1 : -1].topk(4).indices
        assert (best == torch.tensor(drawn, device=DEVICE)[:, None]).any(-1).all()
        likeliest += int((best[:, 0] == torch.tensor(drawn, device=DEVICE)).sum())
    assert likeliest < 20
    # a quantised model draws, too
    assert len(Generator(quantize_(ours)).generate(prompts, Sampling(**options))[0].tokens) == 12
