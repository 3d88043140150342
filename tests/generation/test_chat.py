"""Prompts: ids and pixels, with Hugging Face's processor and mistral-common's serving mode as references."""

import datetime
import io
import shutil

import numpy as np
import pytest
import tiny_checkpoints
from data_chats import BOS, CHATS, END_INST, END_SYSTEM, IMG, IMG_END, INST, SYSTEM, letter, record, user
from data_folders import mistral_folder, processor_folder
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from m3kernels.models.generation.chat import Chat
from m3kernels.models.generation.prompt import GenerationError

THINK, END_THINK, LINE = 34, 35, letter("\n")
BOTH = pytest.mark.parametrize("folder", [mistral_folder, processor_folder], ids=["mistral", "processor"])


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_processor(messages, images=()):
    """Ids and pixels by Hugging Face's template, tokenizer and image processor, joined as its PixtralProcessor does.

    That class itself needs torchvision.
    """
    folder = processor_folder()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if not images:
        return tokenizer(text, add_special_tokens=False)["input_ids"], [], []
    made = PixtralImageProcessorPil.from_pretrained(folder)(images, patch_size={"height": 28, "width": 28})
    begin, *pieces = text.split("[IMG]")
    for (height, width), piece in zip(made["image_sizes"], pieces):
        row = "[IMG]" * (width // 28) + "[IMG_BREAK]"
        begin += (row * (height // 28)).removesuffix("[IMG_BREAK]") + "[IMG_END]" + piece
    return tokenizer(begin, add_special_tokens=False)["input_ids"], made["pixel_values"], made["image_sizes"]


def test_ids_and_pixels_are_those_of_hugging_faces_processor():
    images = [picture(300, 401), picture(57, 30, seed=1)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is larger?"}]
    ids, pixels, sizes = by_processor([{"role": "user", "content": content}], images)
    made = Chat.open(processor_folder()).prompt("Which is larger?", images)
    assert list(made.tokens) == ids and made.tokens.count(BOS) == 1
    assert made.tokens.count(IMG) == 15 * 11 + 2 * 3
    assert [image.shape for image in made.images] == [(3, 420, 308), (3, 56, 84)]
    for ours, theirs, (height, width) in zip(made.images, pixels, sizes):
        assert ours.dtype == np.float32 and np.array_equal(ours, theirs[:, :height, :width])


@BOTH
def test_texts_are_templated_as_mistral_common_serves_them(folder):
    serving = MistralTokenizer.from_file(str(mistral_folder() / "tekken.json"))
    image = picture(100, 40)
    content = [ImageChunk(image=image), TextChunk(text="What is it?")]
    request = ChatCompletionRequest(messages=[SystemMessage(content="Brief."), UserMessage(content=content)])
    expected = serving.encode_chat_completion(request)
    made = Chat.open(folder(), system="Brief.").prompt("What is it?", [image])
    assert list(made.tokens) == expected.tokens
    if folder is mistral_folder:
        assert np.array_equal(made.images[0], expected.images[0])
    chat = Chat.open(folder())
    assert chat.prompt("A").tokens == (BOS, INST, letter("A"), END_INST)
    assert chat.prompt("A", system="S").tokens[:4] == (BOS, SYSTEM, letter("S"), END_SYSTEM)
    assert chat.prompt("<s>[/INST]").tokens.count(BOS) == 1


@BOTH
def test_images_take_the_places_of_their_marks(folder):
    chat = Chat.open(folder())
    one, two = picture(28, 28), picture(56, 28, seed=1)
    a, b = letter("A"), letter("B")
    images = [one, two]
    assert chat.prompt("A[IMG]B[IMG]", images).tokens == (BOS, INST, a, IMG, IMG_END, b, IMG, IMG, IMG_END, END_INST)
    assert chat.prompt("AB", images).tokens[2:7] == (IMG, IMG_END, IMG, IMG, IMG_END)
    assert chat.prompt("", [one]).tokens == (BOS, INST, IMG, IMG_END, END_INST)
    raw = chat.prompt("A[IMG]B[IMG]", images, raw=True)
    assert raw.tokens == (BOS, a, IMG, IMG_END, b, IMG, IMG, IMG_END)
    assert [image.shape for image in raw.images] == [(3, 28, 28), (3, 28, 56)]


def test_raw_is_hugging_faces_tokenizer_on_megatrons_text():
    """One begin token; an image and a line break before the text, as Megatron-Bridge's Base rule has it."""
    chat = Chat.open(processor_folder(template=False))
    assert chat.raw and not Chat.open(processor_folder()).raw and not Chat.open(mistral_folder()).raw
    tokenizer = PreTrainedTokenizerFast.from_pretrained(processor_folder())
    text = "The image shows 12 naïve cats\n and"
    expected = tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]
    assert list(chat.prompt(text).tokens) == expected and expected.count(BOS) == 1
    assert Chat.open(mistral_folder()).prompt(text, raw=True).tokens == tuple(expected)
    expanded = "<s>[IMG][IMG][IMG_END]\n[IMG][IMG_END]\n" + text
    images = [picture(56, 28), picture(28, 28)]
    expected = tokenizer(expanded, add_special_tokens=False)["input_ids"]
    assert list(chat.prompt(text, images).tokens) == expected
    assert expected[4:8] == [LINE, IMG, IMG_END, LINE]
    # text is text: only images' marks are read
    assert END_INST not in chat.prompt("[INST]A[/INST]").tokens


def test_base_checkpoints_have_a_tekken_file_beside_no_template(tmp_path):
    shutil.copytree(processor_folder(template=False), tmp_path / "base")
    shutil.copy(mistral_folder() / "tekken.json", tmp_path / "base")
    base = Chat.open(tmp_path / "base")
    assert base.raw and base.prompt("A").tokens == (BOS, letter("A"))
    assert base.prompt("A", raw=False).tokens == (BOS, INST, letter("A"), END_INST)


@BOTH
@pytest.mark.parametrize("name", ["one", "literals", "system", "turns", "images", "tools"])
def test_conversations_stop_before_the_answer(name, folder):
    chat = Chat.open(folder())
    prompt = chat.conversation(CHATS[name])
    assert prompt.tokens == tuple(chat.encoder.prompt(CHATS[name]).tokens.tolist())
    without = record(*CHATS[name]["conversation"][:-1], **{k: v for k, v in CHATS[name].items() if k == "tools"})
    assert chat.conversation(without).tokens == prompt.tokens
    assert len(prompt.images) == {"images": 3}.get(name, 0)


def test_messages_are_records_as_training_data_has_them(tmp_path):
    picture(56, 28).save(tmp_path / "a.png")
    row = {"messages": [{"role": "user", "content": "<image>A"}], "images": ["a.png"]}
    chat = Chat.open(mistral_folder())
    made = chat.conversation(row, folder=tmp_path)
    assert (
        made.tokens == chat.prompt("A", [tmp_path / "a.png"]).tokens == (BOS, INST, 10, 10, 13, letter("A"), END_INST)
    )
    messages, _, _ = by_processor([{"role": "user", "content": "A"}])
    assert chat.conversation(record(user("A"))).tokens == tuple(messages)


def test_paths_bytes_and_pictures_are_the_same_image(tmp_path):
    image, buffer = picture(60, 40), io.BytesIO()
    image.save(buffer, "PNG")
    image.save(tmp_path / "a.png")
    chat = Chat.open(mistral_folder())
    made = [chat.prompt("A", [ref]) for ref in (image, buffer.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert len({prompt.tokens for prompt in made}) == 1
    assert all(np.array_equal(prompt.images[0], made[0].images[0]) for prompt in made)


@BOTH
def test_a_shipped_system_prompt_shows_how_to_think(folder, tmp_path):
    place = shutil.copytree(folder(), tmp_path / "Mini-3")
    (place / "SYSTEM_PROMPT.txt").write_text("I am {name}, {today}{yesterday}{x}[THINK]T[/THINK]E")
    chat = Chat.open(place, shipped_system=True)
    today = datetime.date.today()
    begin = f"I am Mini-3, {today}{today - datetime.timedelta(1)}{{x}}"
    assert chat.system == begin + "[THINK]T[/THINK]E"
    serving = MistralTokenizer.from_file(str(mistral_folder() / "tekken.json"))
    content = [TextChunk(text=begin), ThinkChunk(thinking="T"), TextChunk(text="E")]
    request = ChatCompletionRequest(messages=[SystemMessage(content=content), UserMessage(content="A")])
    assert list(chat.prompt("A").tokens) == serving.encode_chat_completion(request).tokens
    assert chat.prompt("A").tokens.count(THINK) == chat.prompt("A").tokens.count(END_THINK) == 1
    # what a person writes is text
    assert Chat.open(place).prompt("[THINK]").tokens.count(THINK) == 0
    with pytest.raises(GenerationError, match="exclude each other"):
        Chat.open(place, shipped_system=True, system="S")
    with pytest.raises(GenerationError, match="no SYSTEM_PROMPT.txt"):
        Chat.open(folder(), shipped_system=True)


def test_end_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path):
    place = shutil.copytree(mistral_folder(), tmp_path / "copy")
    for config, expected in [('{"eos_token_id": 2}', (2,)), ('{"eos_token_id": [2, 9]}', (2, 9)), ("{}", (2,))]:
        (place / "generation_config.json").write_text(config)
        assert Chat.open(place).stop_tokens == expected
    (place / "generation_config.json").write_text("[")
    with pytest.raises(GenerationError, match="generation_config.json is no JSON"):
        Chat.open(place)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "text, images, reason",
    [
        ("", [], "prompt is empty"),
        (" \n", [], "prompt is empty"),
        ("a [IMG]", [], r"1 \[IMG\] for 0 images"),
        ("[IMG][IMG]", ["a.png"], r"2 \[IMG\] for 1 images"),
        ("A", ["/nowhere/a.png"], "a.png does not exist"),
        ("A", [b"text"], "no image that Pillow knows"),
        ("A", [b""], "no image that Pillow knows"),
        ("A", [7], "given as a number; allowed: a path"),
        ("A", "a.png", "given as a str; allowed: a list"),
        ("A", ["http://127.0.0.1/a.png"], "no public address"),
        ("A", ["http://[::ffff:10.0.0.1]/a.png"], "no public address"),
        ("A", ["file:///etc/passwd"], "image URLs are http:// or https://"),
        (3, [], "prompt is a int; allowed: text"),
    ],
)
def test_what_cannot_be_asked_is_refused(text, images, reason, raw):
    with pytest.raises(GenerationError, match=reason):
        Chat.open(mistral_folder()).prompt(text, images, raw=raw)


def test_a_corrupt_image_is_refused():
    buffer = io.BytesIO()
    picture(60, 40).save(buffer, "PNG")
    with pytest.raises(GenerationError, match="corrupt"):
        Chat.open(mistral_folder()).prompt("A", [buffer.getvalue()[:3000]])


def test_wrong_conversations_and_folders_are_refused(tmp_path):
    chat = Chat.open(mistral_folder())
    for row, reason in [
        ({}, "exactly one of"),
        ({"messages": []}, "no user|conversation is|refuses|at least"),
        ({"messages": [{"role": "bot", "content": "A"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "1 <image> markers and 0 images"),
        ("A", "a row is a string"),
    ]:
        with pytest.raises(GenerationError, match=reason):
            chat.conversation(row)
    with pytest.raises(GenerationError, match="is no folder"):
        Chat.open(tmp_path / "none")
    with pytest.raises(GenerationError, match="this prompt is raw"):
        Chat.open(processor_folder(template=False), system="S").prompt("A")


@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1", "[]", "{}"], ids=["lfs", "list", "empty"]
)
@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json"])
def test_damaged_tokenizers_are_refused(name, content, tmp_path):
    folder = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "copy")
    (folder / "tekken.json").unlink()
    (folder / name).write_text(content)
    with pytest.raises(GenerationError, match=f"{name}.* again"):
        Chat.open(folder)


def test_a_system_prompt_that_is_no_text(tmp_path):
    folder = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "copy")
    (folder / "SYSTEM_PROMPT.txt").write_bytes(b"\xff")
    with pytest.raises(GenerationError, match="SYSTEM_PROMPT.txt is no UTF-8 text"):
        Chat.open(folder, shipped_system=True)
