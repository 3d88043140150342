"""Answers as text, with Hugging Face's generate and scripted tokens as references."""

from types import SimpleNamespace

import pytest
import tiny_checkpoints
import torch
from PIL import Image

from m3kernels.models.generation.engine import Generation
from m3kernels.models.generation.prompt import GenerationError, Prompt, Sampling
from m3kernels.models.generation.session import Answer, Answering, Session
from m3kernels.models.generation.text import Piece

NEW = 12
PICTURE = Image.effect_noise((90, 60), 80).convert("RGB")


@pytest.fixture(scope="module")
def session():
    return Session.open(tiny_checkpoints.checkpoint())


class Script:
    """A generator whose rows say what they are told to, in bursts; ``broken``: Ctrl-C after so many bursts."""

    def __init__(self, *rows, ends="length", broken=None):
        self.rows, self.ends, self.broken = rows, ends, broken
        config = SimpleNamespace(text=SimpleNamespace(vocab_size=tiny_checkpoints.runs.VOCAB))
        self.model = SimpleNamespace(device=torch.device("cpu"), config=config)

    def start(self, prompts, sampling, *, every):
        self.every, self.sampling, self.stopped = every, sampling, []
        self.results = [Generation() for _ in self.rows]
        return self

    def stop(self, row):
        self.stopped.append(row)
        self.results[row].reason = "stop"

    def __iter__(self):
        for n, begin in enumerate(range(0, max(map(len, self.rows)) + self.every, self.every)):
            if n == self.broken:
                raise KeyboardInterrupt
            yield [[] if r in self.stopped else row[begin : begin + self.every] for r, row in enumerate(self.rows)]
        for result in self.results:
            result.reason = self.ends if result.reason == "interrupted" else result.reason


def ids(text):
    return tiny_checkpoints.chat().encoder.chat.text(text)


def scripted(script, *, every, stop=()):
    prompts = [Prompt((1, 2, 3))] * len(script.rows)
    return Answering(script, tiny_checkpoints.chat(), prompts, Sampling(), stop, every)


def test_answers_are_hugging_faces(session):
    chat = session.chat
    prompts = [
        chat.prompt("Hello"),
        chat.prompt("What is it?", [PICTURE]),
        chat.prompt("and a longer one, to be ragged"),
    ]
    answers = session.answer(prompts, Sampling(max_new_tokens=NEW))
    for prompt, answer in zip(prompts, answers):
        assert answer.text == tiny_checkpoints.expected(prompt, NEW) and answer.text
        assert answer.prompt_tokens == len(prompt.tokens) and answer.new_tokens <= NEW
        assert answer.reason == ("length" if answer.new_tokens == NEW else "stop")


def test_pieces_are_the_answer(session):
    prompt = session.chat.prompt("Hello")
    pieces = list(session.stream(prompt, Sampling(max_new_tokens=NEW)))
    assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == tiny_checkpoints.expected(prompt, NEW)
    assert session.answer(["Hello"], Sampling(max_new_tokens=NEW))[0].text == tiny_checkpoints.expected(prompt, NEW)


def test_a_stop_string_ends_the_row_that_says_it(session):
    prompts = [session.chat.prompt("Hello"), session.chat.prompt("Bye")]
    whole = [answer.text for answer in session.answer(prompts, Sampling(max_new_tokens=NEW))]
    stop = whole[0][4:6]
    first, second = session.answer(prompts, Sampling(max_new_tokens=NEW), stop=[stop, "never said"])
    assert first.text == whole[0][: whole[0].index(stop)] and first.reason == "stop" and first.new_tokens < NEW
    assert (second.text == whole[1]) == (stop not in whole[1])


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_bursts_change_neither_texts_nor_counts(every):
    thoughts = [34, *ids("Hm, END"), 35]
    script = Script([*thoughts, *ids("It is 3. STOP and more")], ids("plain é"))
    run = scripted(script, every=every, stop=["STOP"])
    answers = run.finish()
    said = ids("It is 3. STOP and more")
    upto = next(n for n in range(len(said) + 1) if "STOP" in tiny_checkpoints.chat().decode(said[:n]))
    assert answers == [
        Answer("It is 3. ", "Hm, END", "stop", 3, len(thoughts) + upto),
        Answer("plain é", "", "length", 3, len(ids("plain é"))),
    ]
    assert script.stopped == [0] and run.new_tokens == sum(answer.new_tokens for answer in answers)
    assert run.first_s is not None and run.decode_s >= 0


def test_an_interrupt_leaves_what_there_is():
    run = scripted(Script(ids("one two three ST"), broken=4), every=1, stop=["STOP"])
    with pytest.raises(KeyboardInterrupt):
        for _ in run:
            pass
    said = tiny_checkpoints.chat().decode(ids("one two three ST")[:4])
    assert run.interrupt() in ([], [(0, Piece(said[-1:]))])
    (answer,) = run.answers
    assert answer == Answer(said, "", "interrupted", 3, 4) and list(run) == []
    run = scripted(Script(ids("aST"), broken=len(ids("aST"))), every=1, stop=["STOP"])
    with pytest.raises(KeyboardInterrupt):
        list(run)
    # what was held back is given now
    assert run.interrupt() == [(0, Piece("ST"))] and run.answers[0].text == "aST"


def test_end_tokens_are_the_checkpoints_unless_given(session, monkeypatch):
    script = Script(ids("a"))
    monkeypatch.setattr(session, "generator", script)
    session.answer(["A"])
    assert script.sampling.stop_tokens == session.chat.stop_tokens == (2,)
    session.answer(["A"], Sampling(stop_tokens=(5,)))
    assert script.sampling.stop_tokens == (5,)


def test_bad_stop_strings_are_found_before_prompts_are_read(session):
    with pytest.raises(GenerationError, match="texts of one character"):
        Answering(None, session.chat, [Prompt((1,))], Sampling(), [""], 1)


def test_end_tokens_that_the_model_does_not_have_never_come(tmp_path):
    folder = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "copy")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 10000000]}')
    sampling = Sampling(max_new_tokens=4)
    (want,), (got,) = (
        Session.open(f, device="cpu").answer(["A"], sampling) for f in (tiny_checkpoints.checkpoint(), folder)
    )
    assert got == want


def test_fp8_weights_as_of_the_command():
    session = Session.open(tiny_checkpoints.checkpoint(), device="cpu", fp8=True)
    body = session.generator.model.model.language_model
    assert body.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
