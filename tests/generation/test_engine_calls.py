"""What one call of the engine leaves to the next: after errors, beside runs that were not taken to their end, in other modes."""

import pytest
import torch
from native import twins
from prompts import by_transformers, text_prompts

from m3kernels.models.generation import prefill
from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.prompt import GenerationError, Prompt, Sampling
from m3kernels.models.ministral3 import AdapterConfig, adapter_parameters, add_adapters, quantize_, targets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def greedy(new=12):
    return Sampling(max_new_tokens=new)


def tokens(generations):
    return [generation.tokens for generation in generations]


@pytest.fixture
def ours():
    return twins("text", device=DEVICE)[1]


@pytest.fixture
def out_of_memory(monkeypatch):
    """A start that fails in its third chunk."""

    def start(generator, prompts):
        forward, calls = prefill.Prefill._forward, []

        def failing(self, *arguments):
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return forward(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(prefill.Prefill, "_forward", failing)
            with pytest.raises(RuntimeError, match="out of memory"):
                generator.start(prompts, greedy())

    return start


def test_a_failed_start_leaves_no_other_prompts_keys_behind(ours, out_of_memory):
    generator = Generator(ours, chunk=8)
    begin, one, other = (prompt.tokens for prompt in text_prompts(30, 31, 32))
    first, second = Prompt(begin + one), Prompt(begin + other)
    wanted = [tokens(Generator(ours).generate([prompt], greedy())) for prompt in (first, second)]
    assert tokens(generator.generate([first], greedy())) == wanted[0]
    # some chunks of the second lie where the first one's were
    out_of_memory(generator, [second])
    assert tokens(generator.generate([first], greedy())) == wanted[0]
    out_of_memory(generator, [second])
    assert tokens(generator.generate([second], greedy())) == wanted[1]


def test_a_failed_start_ends_the_run_before_it(ours, out_of_memory):
    generator = Generator(ours, chunk=8)
    prompt, other = text_prompts(30, 31)
    run = generator.start([prompt], greedy())
    next(run)
    out_of_memory(generator, [other])
    with pytest.raises(GenerationError, match="another call has begun"):
        list(run)


def test_a_first_token_is_its_own_runs(ours):
    generator = Generator(ours)
    prompts = text_prompts(9, 10)
    wanted = [tokens(generator.generate([prompt], greedy(1))) for prompt in prompts]
    assert wanted[0] != wanted[1]
    runs = [generator.start([prompt], greedy(1)) for prompt in prompts]
    assert [list(run) for run in runs] == [[own] for own in wanted]


def test_a_run_goes_on_after_its_cache_was_forgotten(ours):
    generator, (prompt,) = Generator(ours), text_prompts(9)
    wanted = tokens(generator.generate([prompt], greedy()))
    run = generator.start([prompt], greedy())
    next(run)
    generator.forget()
    list(run)
    assert tokens(run.results) == wanted
    # its later tokens are the beginning of nothing
    (later,) = (Prompt(tuple(row[1:]) + prompt.tokens) for row in wanted)
    assert tokens(generator.generate([later], greedy())) == tokens(Generator(ours).generate([later], greedy()))


def test_no_dropout_in_training_mode_and_each_modules_mode_comes_back(ours):
    add_adapters(ours, AdapterConfig(rank=4, dtype=None, dropout=0.5), targets_of(ours))
    for parameter in adapter_parameters(ours).values():
        torch.nn.init.normal_(parameter, std=0.1)
    generator, prompts = Generator(ours.eval()), text_prompts(9)
    wanted = tokens(generator.generate(prompts, greedy()))
    ours.train()
    ours.model.language_model.norm.eval()
    assert tokens(generator.generate(prompts, greedy())) == wanted
    assert [name for name, module in ours.named_modules() if not module.training] == ["model.language_model.norm"]


def test_inside_and_outside_of_inference_mode():
    hf, ours = twins("text", device=DEVICE)
    with torch.inference_mode():
        made_inside = twins("text", device=DEVICE)[1]
    (prompt,) = text_prompts(9)
    wanted = [by_transformers(hf, prompt, 12)]
    for model in (ours, made_inside):
        generator = Generator(model)
        for inside in (True, False, True):
            with torch.inference_mode(inside):
                assert tokens(generator.generate([prompt], greedy())) == wanted


def test_adapters_and_hooks_that_come_later_are_noticed(ours):
    generator, prompts = Generator(ours), text_prompts(9)
    before = tokens(generator.generate(prompts, greedy()))
    hook = ours.lm_head.register_forward_hook(lambda module, inputs, logits: -logits)
    hooked = tokens(generator.generate(prompts, greedy()))
    assert hooked == tokens(Generator(ours).generate(prompts, greedy())) != before and "hooks" in generator.why_not
    hook.remove()
    assert tokens(generator.generate(prompts, greedy())) == before and generator.fused
    add_adapters(ours, AdapterConfig(rank=4, dtype=None), targets_of(ours))
    for parameter in adapter_parameters(ours).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = tokens(generator.generate(prompts, greedy()))
    assert adapted == tokens(Generator(ours).generate(prompts, greedy())) != before and not generator.fused


def test_other_scales_of_fp8_weights_are_noticed(ours):
    generator, prompts = Generator(quantize_(ours)), text_prompts(40)
    before = tokens(generator.generate(prompts, greedy()))
    layer = ours.model.language_model.layers[0].self_attn.v_proj
    for change in (lambda: layer.weight_scale.mul_(8), lambda: setattr(layer, "weight_scale", layer.weight_scale * 4)):
        change()
        changed = tokens(generator.generate(prompts, greedy()))
        assert changed == tokens(Generator(ours).generate(prompts, greedy())) != before
        before = changed
