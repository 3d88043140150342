"""Sizes and pixels of images, and those that are refused."""

import io

import numpy as np
import pytest
from data_chats import (
    BREAK,
    IMG,
    assistant,
    encoder,
    image,
    record,
    text,
    user,
)
from data_folders import mistral_folder, processor_folder
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.records import BadRecord


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


def test_ids_and_pixels_are_those_of_the_pixtral_processor():
    pytest.importorskip("torchvision")
    from transformers import AutoImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    folder = processor_folder()
    processor = PixtralProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    noise = np.random.default_rng(0).integers(256, size=(300, 1700, 3), dtype=np.uint8)
    picture = {"type": "image", "image": Image.fromarray(noise)}
    turns = [user(picture, image(31, 29), "What?"), assistant([text("a cat")])]
    expected = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="np")
    encoded = encoder("processor").encode(record(*turns))
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    for found, padded in zip(encoder("processor").pixels(encoded), expected["pixel_values"]):
        # torchvision and Pillow round a resized value otherwise: two of 256 levels at most
        np.testing.assert_allclose(found, padded[:, : found.shape[1], : found.shape[2]], atol=2.1 / 255 / 0.26)
