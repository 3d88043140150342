"""Tokens and masks, with mistral-common's own answers as the reference."""

import itertools
import json
import random

import numpy as np
import pytest
from data_chats import (
    BOS,
    CHATS,
    CONTROL,
    END_INST,
    END_SYSTEM,
    EOS,
    IMG,
    IMG_END,
    INST,
    SYSTEM,
    assistant,
    encoder,
    image,
    letter,
    record,
    text,
    user,
)
from data_folders import mistral_folder
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.rows import read_row


def by_mistral_common(chat: dict, *, version: str = "v13") -> tuple[list[int], list[bool]]:
    """Tokens of the whole, and the mask by the difference of prefixes, each with decoded images."""
    files = {
        mode: str(mistral_folder(version) / "tekken.json") for mode in (ValidationMode.finetuning, ValidationMode.test)
    }
    whole, prefix = (MistralTokenizer.from_file(path, mode=mode) for mode, path in files.items())
    makers = {
        "system": lambda m: SystemMessage(content=m["content"]),
        "user": lambda m: UserMessage(content=[_chunk(part) for part in m["content"]]),
        "tool": lambda m: ToolMessage(content=m["content"], tool_call_id="call00000"),
        "assistant": lambda m: AssistantMessage(
            content=[_chunk(p) for p in m["content"]] if isinstance(m["content"], list) else m["content"],
            tool_calls=[ToolCall.model_validate(c | {"id": "call00000"}) for c in m.get("tool_calls", [])] or None,
        ),
    }
    messages = [makers[m["role"]](m) for m in chat["conversation"]]
    tools = [Tool.model_validate(tool) for tool in chat.get("tools", [])] or None

    def run(tokenizer, stop):
        return tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages[:stop], tools=tools)).tokens

    tokens, mask, stop = run(whole, len(messages)), [], 0
    for is_answer, turns in itertools.groupby(chat["conversation"], key=lambda m: m["role"] == "assistant"):
        stop += len(list(turns))
        found = run(whole if is_answer else prefix, stop)
        assert tokens[: len(found)] == found, "not a prefix"
        mask += [is_answer] * (len(found) - len(mask))
    return tokens, mask


def _chunk(part):
    return TextChunk(text=part["text"]) if part["type"] == "text" else ImageChunk(image=part["image"])


@pytest.mark.parametrize("backend", ["mistral", "processor"])
@pytest.mark.parametrize("name", CHATS)
def test_ids_and_masks_are_those_of_mistral_common(name, backend):
    tokens, mask = by_mistral_common(CHATS[name])
    encoded = encoder(backend).encode(CHATS[name])
    assert encoded.tokens.tolist() == tokens
    assert encoded.supervised.tolist() == mask
    assert tokens.count(BOS) == 1 and encoded.tokens.dtype == np.int64


def test_random_chats_are_the_same_by_both_backends():
    rng = random.Random(0)
    words = [*CONTROL, "a", "Bc ", "\n", " d", "é", "1+1", "\n\n", "<s_menu>", "[INST"]
    for _ in range(60):
        turns = []
        for _ in range(rng.randint(1, 3)):
            parts = ["".join(rng.choices(words, k=rng.randint(1, 5))) + "q" for _ in range(rng.randint(1, 2))]
            turns.append(user(*parts, *[image(30, 60)] * rng.randint(0, 2)))
            turns.append(assistant("w" + "".join(rng.choices(words, k=rng.randint(1, 6)))))
        tokens, mask = by_mistral_common(record(*turns))
        for backend in ("mistral", "processor"):
            encoded = encoder(backend).encode(record(*turns))
            assert encoded.tokens.tolist() == tokens, turns
            assert encoded.supervised.tolist() == mask, turns


@pytest.mark.parametrize("backend", ["mistral", "processor"])
def test_concrete_ids_and_labels(backend):
    encoded = encoder(backend).encode(record(user("A"), assistant("B")))
    assert encoded.tokens.tolist() == [BOS, INST, letter("A"), END_INST, letter("B"), EOS]
    assert encoded.supervised.tolist() == [False, False, False, False, True, True]
    # as a loss shifts them: the last prompt token predicts the answer, the answer its end
    labels = np.where(encoded.supervised[1:], encoded.tokens[1:], -100).tolist()
    assert labels == [-100, -100, -100, letter("B"), EOS]


@pytest.mark.parametrize("backend", ["mistral", "processor"])
def test_a_literal_end_of_instruction_does_not_move_the_mask(backend):
    encoded = encoder(backend).encode(record(user("A[/INST]B</s>"), assistant("C")))
    tokens = encoded.tokens.tolist()
    assert (tokens.count(END_INST), tokens.count(EOS)) == (1, 1)
    assert tokens[encoded.supervised.argmax() :] == [letter("C"), EOS]
    # the naive mask, from the first [/INST] of re-tokenised text, would take user text for an answer
    naive = encoder("processor").chat.tokenizer("<s>[INST]A[/INST]B</s>[/INST]C</s>", add_special_tokens=False)[
        "input_ids"
    ]
    assert naive != tokens and naive.index(END_INST) < tokens.index(END_INST)


def test_plain_is_prompt_and_completion():
    encoded = encoder("plain").encode(record(user(image(56, 28), "A"), assistant("B"), user("C"), assistant("D")))
    line = letter("\n")
    assert encoded.tokens.tolist()[:4] == [BOS, IMG, IMG, IMG_END]
    rest = [letter("A"), line, letter("B"), EOS, letter("C"), line, letter("D"), EOS]
    assert encoded.tokens.tolist()[4:] == rest
    assert encoded.supervised.tolist() == [False] * 6 + [True] * 2 + [False] * 2 + [True] * 2
    tekken = Encoder.open(mistral_folder(), backend="plain")
    again = tekken.encode(record(user(image(56, 28), "A"), assistant("B"), user("C"), assistant("D")))
    assert again.tokens.tolist() == encoded.tokens.tolist()
    assert tekken.encode(record(user("[/INST]"), assistant("[IMG]"))).tokens.tolist().count(END_INST) == 0
    with pytest.raises(BadRecord, match="tools need a chat format"):
        tekken.encode(CHATS["tools"])


@pytest.mark.parametrize("version", ["v3", "v7", "v11"])
@pytest.mark.parametrize("name", ["system", "turns", "images", "tools"])
def test_masks_hold_for_older_formats_that_move_the_system_prompt(name, version):
    """v3 puts it before the last user turn, so that prefixes differ; the lengths of messages do not."""
    made = Encoder.open(mistral_folder(version))
    encoded = made.encode(CHATS[name])
    answers = made.chat.tekken.decode(encoded.tokens[encoded.supervised].tolist(), special_token_policy="keep")
    assert (
        answers.count("</s>") == encoded.tokens.tolist().count(EOS) == encoded.supervised[encoded.tokens == EOS].sum()
    )
    expected = {"system": "B\n\n</s>", "turns": "B</s>D</s>F</s>", "images": "a cat</s>b</s>"}
    assert answers.replace("F ", "F") == expected.get(name, answers) and "It is 3</s>"[-4:] == answers[-4:]


@pytest.mark.parametrize("backend", ["mistral", "processor", "plain"])
@pytest.mark.parametrize("name", ["one", "literals", "turns", "images", "image last"])
def test_the_prompt_is_what_stands_before_the_last_answer(name, backend):
    whole, prompt = encoder(backend).encode(CHATS[name]), encoder(backend).prompt(CHATS[name])
    assert whole.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
    assert whole.supervised[len(prompt.tokens) :].all() and not whole.supervised[len(prompt.tokens) - 1]
    assert not prompt.supervised.any() and prompt.sizes == whole.sizes
    answer = encoder(backend).decode(whole.tokens[len(prompt.tokens) :])
    if name != "literals":
        assert answer == encoder(backend).answer(CHATS[name])


def test_a_system_prompt_is_put_where_there_is_none():
    made = Encoder.open(mistral_folder(), system_prompt="S")
    assert made.encode(record(user("A"), assistant("B"))).tokens.tolist()[:4] == [BOS, SYSTEM, letter("S"), END_SYSTEM]
    assert made.encode(CHATS["system"]).tokens.tolist().count(SYSTEM) == 1
    assert made.fingerprint != encoder("mistral").fingerprint


@pytest.mark.parametrize("backend", ["mistral", "processor", "plain"])
def test_too_long_is_cut_at_a_turn(backend):
    chat = record(
        user("A"), assistant("B"), user(image(56, 56), "C"), assistant("D"), user("E"), assistant("F"), user("G"), assistant("H")
    )  # fmt: skip
    made = encoder(backend)
    lengths = [len(made.encode(record(*chat["conversation"][:n])).tokens) for n in (2, 4, 6, 8)]
    for limit in range(lengths[0], lengths[-1] + 2):
        encoded = made.encode(chat, seq_length=limit)
        fits = max(n for n, length in enumerate(lengths) if length <= limit)
        assert len(encoded.tokens) == lengths[fits]
        assert encoded.cut_turns == 6 - 2 * fits
        assert encoded.tokens[-1] == EOS and encoded.supervised[-1]
        assert len(encoded.images) == len(encoded.sizes) == int(fits > 0)
    with pytest.raises(BadRecord, match=f"{lengths[0]} tokens.*seq_length is {lengths[0] - 1}"):
        made.encode(chat, seq_length=lengths[0] - 1)
    alone = record(*chat["conversation"][:2])
    with pytest.raises(BadRecord, match=f"{lengths[0]} tokens"):
        made.encode(alone, seq_length=3)


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([], "conversation is"),
        ([user("A")], "no assistant turn"),
        ([user("A"), assistant("  ")], "empty answer"),
        ([user("A"), assistant("")], "empty answer"),
        ([user("A"), assistant("B"), user("C")], "must end with the assistant's"),
        ([{"role": "bot", "content": "A"}, assistant("B")], 'unknown role "bot"'),
        ([{"content": "A"}, assistant("B")], "unknown role null;"),
        ([None, assistant("B")], "turn 0 is null;"),
        ([{"role": "user", "content": 3}, assistant("B")], "content is 3"),
        ([{"role": "user", "content": [{"type": "video"}]}, assistant("B")], 'type "video"'),
        ([user({"type": "image", "image": None}), assistant("B")], "has no image"),
        ([user("A"), assistant([text("B"), image(28, 28)])], "only user turns can"),
        ([user("A"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])], "no JSON"),
        ([{"role": "tool", "content": "1"}, assistant("B")], "answers no tool call"),
        ([user({"type": "image", "image": "/nowhere/a.png"}), assistant("B")], "a.png does not exist"),
        ([user({"type": "image", "image": "/"}), assistant("B")], "the image / is a folder; an image is one file"),
        ([user({"type": "image", "image": 7}), assistant("B")], "is given as a number; allowed: a path"),
        ([user({"type": "image", "image": {"bytes": [137]}}), assistant("B")], "an image's bytes are a list; JSON"),
        ([user({"type": "image", "image": {"bytes": b"text", "path": None}}), assistant("B")], "no image that Pillow"),
    ],
)
def test_bad_records_say_why(turns, reason):
    with pytest.raises(BadRecord, match=reason):
        encoder("mistral").encode({"conversation": turns})


def test_upstream_refusals_are_bad_records():
    turns = [user("A"), {"role": "tool", "content": "1", "tool_call_id": "x"}, assistant("B")]
    for backend in ("mistral", "processor"):
        with pytest.raises(BadRecord, match="refuses the conversation"):
            encoder(backend).encode({"conversation": turns})


def test_junk_is_a_bad_record_and_never_another_error():
    rng = random.Random(1)
    words = [
        "user",
        "assistant",
        "text",
        "image",
        "<image>",
        "a.png",
        "http://",
        "tool",
        "",
        "f",
        "human",
        "{",
        "[1]",
        "data:x",
    ]
    keys = (
        "role content type text image images conversation messages conversations from value tool_calls function name "
        "arguments tools bytes path image_url tool_call_id parameters"
    ).split()

    def junk(depth):
        kind = rng.randrange(7 if depth else 4)
        if kind < 4:
            return rng.choice([None, 3, rng.choice(words), rng.choice(words)])
        if kind == 4:
            return [junk(depth - 1) for _ in range(rng.randrange(3))]
        return {rng.choice(keys): junk(depth - 1) for _ in range(rng.randrange(4))}

    good = {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}
    refused = 0
    for _ in range(1500):
        row = json.loads(json.dumps(good))
        target = rng.choice([row, row["messages"], *row["messages"]])
        if isinstance(target, list):
            target.insert(rng.randrange(3), junk(4))
        else:
            target[rng.choice(keys)] = junk(4)
        try:
            for backend in ("mistral", "processor", "plain"):
                encoder(backend).encode(read_row(row, folder=None), seq_length=64)
        except BadRecord:
            refused += 1
    assert 250 < refused < 1450
