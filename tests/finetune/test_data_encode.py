"""Tokens, masks and pixels, with mistral-common's own answers as the reference."""

import functools
import io
import itertools
import pickle
import random

import numpy as np
import pytest
from data_folders import mistral_folder, processor_folder
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.records import BadRecord

BOS, EOS, INST, END_INST, IMG, PAD, BREAK, IMG_END, SYSTEM, END_SYSTEM = 1, 2, 3, 4, 10, 11, 12, 13, 17, 18
CONTROL = [
    "[/INST]",
    "[INST]",
    "</s>",
    "<s>",
    "[IMG]",
    "[IMG_END]",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[/TOOL_RESULTS]",
    "<pad>",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds [ARGS] numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@functools.cache
def encoder(backend: str) -> Encoder:
    folders = {"mistral": mistral_folder, "processor": processor_folder}
    folder = folders.get(backend, functools.partial(processor_folder, template=False))()
    made = Encoder.open(folder)
    assert made.backend == backend
    return made


def user(*content):
    return {"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in content]}


def text(value):
    return {"type": "text", "text": value}


def image(width, height, colour="red", mode="RGB"):
    return {"type": "image", "image": Image.new(mode, (width, height), colour)}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def record(*turns, **fields):
    return {"conversation": list(turns), **fields}


def letter(character: str) -> int:
    return 1000 + ord(character)


CHATS = {
    "one": record(user("Hello"), assistant("Hi there")),
    "literals": record(user(" ".join(CONTROL)), assistant("No " + "".join(CONTROL)), user("\ue000[/INST]"), assistant("x")),
    "system": record({"role": "system", "content": "Be [INST] brief"}, user("A\n"), assistant("B\n\n")),
    "turns": record(user("A"), assistant("B"), user("C"), assistant("D"), user("é ü 漢"), assistant("F ")),
    "images": record(
        user(image(300, 400), "What?\n", image(100, 40), "and"), assistant("a cat"), user("again", image(28, 28)), assistant("b")
    ),
    "image last": record(user("A", image(60, 30)), assistant("B")),
    "two texts": record(user("A", "B", image(60, 30)), assistant("C")),
    "runs": record(user("A", "B"), user("C"), assistant("D"), assistant([text("E"), text("F")])),
    "tools": record(
        user("1+2"),
        assistant(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": "é [ARGS]"}}}]),
        {"role": "tool", "content": "3 [/TOOL_RESULTS]"},
        assistant("It is 3"),
        tools=[TOOL],
    ),
}  # fmt: skip


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
        ([{"role": "bot", "content": "A"}, assistant("B")], "unknown role 'bot'"),
        ([{"role": "user", "content": 3}, assistant("B")], "content is 3"),
        ([{"role": "user", "content": [{"type": "video"}]}, assistant("B")], "type 'video'"),
        ([user({"type": "image", "image": None}), assistant("B")], "has no image"),
        ([user("A"), assistant([text("B"), image(28, 28)])], "only user turns can"),
        ([user("A"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])], "no JSON"),
        ([{"role": "tool", "content": "1"}, assistant("B")], "answers no tool call"),
        ([user({"type": "image", "image": "/nowhere/a.png"}), assistant("B")], "a.png does not exist"),
        ([user({"type": "image", "image": 7}), assistant("B")], "allowed: a path"),
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


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (29, 28), (300, 400), (1540, 1540), (1541, 3000), (5000, 9)])
@pytest.mark.parametrize("backend", ["mistral", "processor"])
def test_sizes_from_the_header_are_those_of_the_pixels(backend, size):
    made = encoder(backend)
    encoded = made.encode(record(user(image(*size), "A"), assistant("B")))
    (array,) = made.pixels(encoded)
    assert array.shape == (3, *encoded.sizes[0]) and array.dtype == np.float32
    height, width = encoded.sizes[0]
    assert encoded.tokens.tolist().count(IMG) == (height // 28) * (width // 28)
    assert encoded.tokens.tolist().count(BREAK) == height // 28 - 1


def test_mistral_pixels_are_those_of_mistral_common():
    pixels = np.random.default_rng(0).integers(256, size=(45, 70, 4), dtype=np.uint8)
    picture = {"type": "image", "image": Image.fromarray(pixels, "RGBA")}
    whole = MistralTokenizer.from_file(str(mistral_folder() / "tekken.json"), mode=ValidationMode.finetuning)
    messages = [UserMessage(content=[ImageChunk(image=picture["image"])]), AssistantMessage(content="B")]
    (expected,) = whole.encode_chat_completion(ChatCompletionRequest(messages=messages)).images
    made = encoder("mistral")
    (found,) = made.pixels(made.encode(record(user(picture), assistant("B"))))
    np.testing.assert_array_equal(found, expected)


def test_a_lower_image_limit_shrinks_and_a_higher_one_is_refused():
    for folder in (mistral_folder(), processor_folder()):
        made = Encoder.open(folder, max_image_size=280)
        encoded = made.encode(record(user(image(1000, 500), "A"), assistant("B")))
        assert encoded.sizes == ((140, 280),)
        assert made.pixels(encoded)[0].shape == (3, 140, 280)
        for wrong in (2000, 27):
            with pytest.raises(FinetuneError, match="allowed: 28 to 1540"):
                Encoder.open(folder, max_image_size=wrong)


def jpeg(orientation=None) -> bytes:
    picture = Image.effect_noise((100, 30), 80).convert("RGB").point(lambda v: v // 4)
    picture.paste("white", (0, 0, 50, 30))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("backend", ["mistral", "processor"])
def test_exif_turns_the_image_and_its_size(backend):
    made = encoder(backend)
    bright = {}
    for orientation in (None, 3, 6, 8):
        reference = {"bytes": jpeg(orientation), "path": None}
        encoded = made.encode(record(user({"type": "image", "image": reference}), assistant("B")))
        assert encoded.sizes == (((56, 112),) if orientation in (None, 3) else ((112, 56),))
        (array,) = made.pixels(encoded)
        bright[orientation] = [array[0, :28].mean() > 0.3, array[0, :, :28].mean() > 0.3]
    # the white half is left, right, above and below: not turned, 6 and 8 would be as None
    assert bright[None][1] and not bright[3][1] and bright[6][0] and not bright[8][0]


def test_corrupt_pixels_are_found_when_they_are_decoded(tmp_path):
    whole = jpeg()
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole[: len(whole) - 300])
    made = encoder("mistral")
    encoded = made.encode(record(user({"type": "image", "image": str(path)}), assistant("B")))
    with pytest.raises(BadRecord, match=r"cut.jpg is corrupt \("):
        made.pixels(encoded)
    path.write_bytes(jpeg(6))
    assert made.pixels(encoded)[0].shape == (3, 56, 112)


def test_too_many_pixels_are_refused_by_the_header():
    header = io.BytesIO()
    Image.new("1", (20000, 9000)).save(header, "PNG")
    reference = {"bytes": header.getvalue(), "path": "bomb.png"}
    with pytest.raises(BadRecord, match="bomb.png has too many pixels"):
        encoder("mistral").encode(record(user({"type": "image", "image": reference}), assistant("B")))


def test_encode_decodes_no_pixel(tmp_path, monkeypatch):
    paths = []
    for suffix in ("png", "jpg", "webp", "gif"):
        paths.append(tmp_path / f"a.{suffix}")
        Image.new("RGB", (40, 40)).save(paths[-1])

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for path in paths:
        chat = record(user({"type": "image", "image": str(path)}), assistant("B"))
        assert encoder("mistral").encode(chat).sizes == ((56, 56),)


def test_encoders_pickle_and_fingerprints_tell_them_apart():
    made = Encoder.open(mistral_folder(), max_image_size=280)
    again = pickle.loads(pickle.dumps(made))
    assert again.fingerprint == made.fingerprint and again.backend == "mistral"
    assert again.encode(CHATS["images"]).tokens.tolist() == made.encode(CHATS["images"]).tokens.tolist()
    others = {
        made.fingerprint,
        encoder("mistral").fingerprint,
        encoder("processor").fingerprint,
        encoder("plain").fingerprint,
    }
    assert len(others) == 4
    assert (made.eos_token, made.pad_token, made.image_token) == (EOS, PAD, IMG)
    assert (encoder("processor").eos_token, encoder("processor").pad_token, encoder("processor").image_token) == (
        2,
        11,
        10,
    )


def test_wrong_folders_are_refused(tmp_path):
    for given, reason in [
        (tmp_path / "none", "is no folder"),
        (tmp_path, "neither tekken.json nor tokenizer.json"),
    ]:
        with pytest.raises(FinetuneError, match=reason):
            Encoder.open(given)
    with pytest.raises(FinetuneError, match="allowed: auto, mistral"):
        Encoder.open(mistral_folder(), backend="hf")
    with pytest.raises(FinetuneError, match="no chat template"):
        Encoder.open(processor_folder(template=False), backend="processor")
