"""The engine against Hugging Face's own generate, token for token, and what it promises about caches, bursts and refusals."""

import numpy as np
import pytest
import torch
from native import twins
from prompts import by_transformers, image_prompt, text_prompts

from m3kernels.models.generation import engine, prefill
from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.prompt import GenerationError, Prompt, Sampling
from m3kernels.models.ministral3 import AdapterConfig, adapter_parameters, add_adapters, merge_adapters, targets_of
from models import IMAGE_TOKEN

NEW = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def greedy(new=NEW, **options):
    return Sampling(max_new_tokens=new, **options)


def tokens(generations):
    return [generation.tokens for generation in generations]


@pytest.fixture(scope="module")
def text():
    return twins("text", device=DEVICE)


@pytest.fixture(scope="module")
def vlm():
    return twins("vlm", device=DEVICE)


# beyond the eight original positions, where the query scale acts, from the first prompt on
@pytest.mark.parametrize("chunk", [3, 16, 8192])
def test_ragged_prompts_as_transformers_does_one_by_one(text, chunk):
    hf, ours = text
    prompts = text_prompts(5, 1, 30, 17, 64)
    wanted = [by_transformers(hf, prompt, NEW) for prompt in prompts]
    generator = Generator(ours, chunk=chunk)
    assert generator.fused and tokens(generator.generate(prompts, greedy())) == wanted
    assert by_transformers(hf, prompts[2], NEW, cache_implementation="static") == wanted[2]


@pytest.mark.parametrize(
    "options", [{"sliding_window": 7}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"}], ids=str
)
def test_other_configs(options):
    hf, ours = twins("text", device=DEVICE, **options)
    prompts = text_prompts(3, 21)
    generator = Generator(ours, chunk=8)
    assert generator.fused == ("hidden_act" not in options)
    assert tokens(generator.generate(prompts, greedy())) == [by_transformers(hf, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("chunk", [5, 8192])
def test_images(vlm, chunk):
    hf, ours = vlm
    prompts = [image_prompt((2, 3), (1, 4)), text_prompts(9)[0], image_prompt((3, 2), seed=2)]
    wanted = [by_transformers(hf, prompt, NEW) for prompt in prompts]
    assert tokens(Generator(ours, chunk=chunk).generate(prompts, greedy())) == wanted
    swapped = Prompt(prompts[0].tokens, tuple(np.flip(image, 2).copy() for image in prompts[0].images))
    assert tokens(Generator(ours).generate([swapped], greedy()))[0] != wanted[0]


def test_patched_models_and_module_steps(text):
    import m3kernels

    hf, ours = twins("text", device=DEVICE)
    prompts = text_prompts(5, 17)
    wanted = [by_transformers(hf, prompt, NEW) for prompt in prompts]
    m3kernels.patch(ours)
    assert tokens(Generator(ours).generate(prompts, greedy())) == wanted

    ours = twins("text", device=DEVICE)[1]
    add_adapters(ours, AdapterConfig(rank=4, dtype=None), targets_of(ours))
    generator = Generator(ours, chunk=4)
    assert not generator.fused and "merge_adapters" in generator.why_not
    assert tokens(generator.generate(prompts, greedy())) == wanted  # fresh adapters change nothing
    for parameter in adapter_parameters(ours).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = tokens(generator.generate(prompts, greedy()))
    merge_adapters(ours)
    assert tokens(generator.generate(prompts, greedy())) == adapted != wanted and generator.fused


def counted(monkeypatch):
    """Tokens that go through the model while prompts are read, and images through the tower."""
    seen = {"tokens": 0, "images": 0}
    forward, features = prefill.Prefill._forward, prefill.Prefill.image_features

    def counting(self, taken, *rest):
        seen["tokens"] += sum(count for _, count in taken)
        return forward(self, taken, *rest)

    def made(self, *arguments):
        found = features(self, *arguments)
        seen["images"] += len(found)
        return found

    monkeypatch.setattr(prefill.Prefill, "_forward", counting)
    monkeypatch.setattr(prefill.Prefill, "image_features", made)
    return seen


def test_what_the_last_call_left_is_reused(vlm, monkeypatch):
    hf, ours = vlm
    seen, generator = counted(monkeypatch), Generator(ours)
    first = [image_prompt((2, 3), seed=3), text_prompts(40)[0]]
    answers = tokens(generator.generate(first, greedy()))
    assert seen == {"tokens": sum(len(prompt.tokens) for prompt in first), "images": 1}

    # the next turn of each conversation, in the other order: their images and tokens are there already
    more = text_prompts(4)[0].tokens
    second = [Prompt(p.tokens + tuple(a) + more, p.images) for p, a in zip(first[::-1], answers[::-1])]
    seen.update(tokens=0, images=0)
    again = tokens(generator.generate(second, greedy(20)))
    assert again == [by_transformers(hf, prompt, 20) for prompt in second]
    # the last drawn token was never computed
    assert seen == {"tokens": 2 * (len(more) + 1), "images": 0}

    # another image at the same place is another prompt
    other = Prompt(second[1].tokens, (np.flip(second[1].images[0], 1).copy(),))
    assert tokens(generator.generate([second[0], other], greedy())) == [
        by_transformers(hf, prompt, NEW) for prompt in (second[0], other)
    ]
    assert seen["images"] == 1


def test_what_prompts_of_a_batch_share_is_computed_once(vlm, monkeypatch):
    hf, ours = vlm
    monkeypatch.setattr(prefill, "WORTH_SHARING", 8)
    seen = counted(monkeypatch)
    base = image_prompt((4, 4), text=9)
    prompts = [Prompt(base.tokens + tail.tokens, base.images) for tail in text_prompts(3, 5, 1)]
    prompts += [text_prompts(6)[0], prompts[1]]
    assert tokens(Generator(ours).generate(prompts, greedy())) == [by_transformers(hf, p, NEW) for p in prompts]
    # the last begins as the first does: what it has in common with the second is that one's own
    assert seen == {"tokens": len(base.tokens) + 3 + 5 + 1 + 6 + 5, "images": 1}


def test_weights_that_change_between_calls_are_noticed(text):
    hf, ours = twins("text", device=DEVICE)
    prompts, generator = text_prompts(40, 30), Generator(ours)
    before = tokens(generator.generate(prompts, greedy()))
    with torch.no_grad():
        for theirs, mine in zip(hf.parameters(), ours.parameters()):
            mine.mul_(1.3)
            theirs.mul_(1.3)
    wanted = [by_transformers(hf, prompt, NEW) for prompt in prompts]
    assert tokens(generator.generate(prompts, greedy())) == wanted != before
    ours.double()
    assert tokens(generator.generate(prompts, greedy())) == wanted


def test_stop_tokens_and_ends_by_hand(text):
    _, ours = text
    prompts, generator = text_prompts(5, 17, 9), Generator(ours)
    free = tokens(generator.generate(prompts, greedy()))
    stop = free[1][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    results = generator.generate(prompts, greedy(stop_tokens=(stop,)))
    assert tokens(results) == expected
    assert [result.reason for result in results] == ["stop" if stop in row else "length" for row in free]

    run = generator.start(prompts, greedy())
    bursts = []
    for burst in run:
        bursts.append(burst)
        if len(bursts) == 3:
            run.stop(0)
    assert tokens(run.results) == [free[0][:3], free[1], free[2]]
    assert run.results[0].reason == "stop" and not any(burst[0] for burst in bursts[3:])
    assert [len(burst[1]) for burst in bursts] == [1] * NEW


@pytest.mark.parametrize("every", [1, 5, 64])
def test_bursts_are_the_tokens_whatever_their_size(text, every):
    _, ours = text
    generator, prompts = Generator(ours), text_prompts(5, 17)
    free = tokens(generator.generate(prompts, greedy(23)))
    bursts = list(generator.start(prompts, greedy(23), every=every))
    assert [sum((burst[row] for burst in bursts), []) for row in range(2)] == free
    assert [len(burst[0]) for burst in bursts] == [1] + [every] * (22 // every) + [22 % every] * (22 % every > 0)


def test_an_interrupted_run_keeps_what_there_is(text):
    _, ours = text
    generator, prompts = Generator(ours), text_prompts(5)
    free = tokens(generator.generate(prompts, greedy()))
    run = generator.start(prompts, greedy())
    for _ in range(3):
        next(run)
    assert run.results[0].tokens == free[0][:3] and run.results[0].reason == "interrupted"
    # the cache is another's now: going on with the first run would be silently wrong
    assert tokens(generator.generate(prompts, greedy())) == free
    with pytest.raises(GenerationError, match="another call has begun"):
        list(run)


def test_training_mode_comes_back(text):
    _, ours = text
    ours.train()
    Generator(ours).generate(text_prompts(5), greedy(2))
    assert ours.training
    ours.eval()


def test_what_is_refused(text, vlm):
    ours, with_images = Generator(text[1]), Generator(vlm[1])
    (prompt,), picture = text_prompts(250), image_prompt((2, 3))
    calls = {
        "there is no prompt": lambda: ours.start([], greedy()),
        "prompt 1 is empty": lambda: ours.start([prompt, Prompt(())], greedy(1)),
        "250 tokens, and max_new_tokens is 7: together 257, and the model has 256.*max_new_tokens=6": lambda: (
            ours.start([prompt], greedy(7))
        ),
        "are tokenizer and weights of one checkpoint": lambda: ours.start([Prompt((3, 151))], greedy()),
        "language model alone": lambda: ours.start([picture], greedy()),
        "6 image tokens for images that make 0": lambda: with_images.start([Prompt(picture.tokens)], greedy()),
        "0 image tokens for images that make 6": lambda: with_images.start([Prompt((11,), picture.images)], greedy()),
        "multiples of 8": lambda: with_images.start(
            [Prompt((IMAGE_TOKEN,), (np.zeros((3, 8, 9), np.float32),))], greedy()
        ),
        "every=0": lambda: ours.start([prompt], greedy(1), every=0),
        "stop token 151": lambda: ours.start([prompt], greedy(1, stop_tokens=(151,))),
        "kv_dtype='int4'": lambda: Generator(text[1], kv_dtype="int4"),
        "chunk=0": lambda: Generator(text[1], chunk=0),
        "max_new_tokens=0": lambda: greedy(0),
        "temperature=-1": lambda: greedy(temperature=-1),
        "top_p=0": lambda: greedy(top_p=0),
        "top_k=-1": lambda: greedy(top_k=-1),
        "seed=-1": lambda: greedy(seed=-1),
    }
    for message, call in calls.items():
        with pytest.raises(GenerationError, match=message):
            call()
    assert ours._state is None  # nothing was begun


def test_room_leaves_some_for_the_next_prompt():
    assert [engine._room(n) for n in (1, 256, 257, 5000, 262_144)] == [256, 256, 512, 5120, 262_144]
