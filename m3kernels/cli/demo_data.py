"""Real handwritten digits on pages, asked about in chat form and encoded with Mistral's own tokenizer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mistral_common
import numpy as np
import torch
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from sklearn.datasets import load_digits

PATCH_SIZE = 14
MERGE_SIZE = 2
TOKEN_PIXELS = PATCH_SIZE * MERGE_SIZE
MAX_IMAGE_SIZE = 1540
IMAGE_TOKEN = 10
PAD_TOKEN = 11
EOS_TOKEN = 2
IGNORE = -100

ONE_DIGIT = "What digit is on the page?"
TWO_DIGITS = "Which digits are on the page, from left to right?"
TWO_PAGES = "Which digits are on the pages, in order?"
QUESTIONS = (ONE_DIGIT, TWO_DIGITS, TWO_PAGES)

VALIDATION_DIGITS = 97
TEST_DIGITS = 300
# the split is part of the task: --seed varies the weights and the pages, never which digits are held out
SPLIT_SEED = 1797


@dataclass(frozen=True)
class Digits:
    """Scans (count, 8, 8) with ink from 0 to 1, and the digit that each one shows (count,)."""

    scans: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class DigitSplits:
    """Disjoint scans: pages for training, for the accuracy shown meanwhile, and for the final accuracy."""

    train: Digits
    validation: Digits
    test: Digits


@dataclass(frozen=True)
class Sample:
    """One question about one or more pages, with the right answer."""

    pages: tuple[Image.Image, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of prompt and answer, where the answer starts, and one normalised (3, H, W) array per page."""

    tokens: list[int]
    prompt_length: int
    images: list[np.ndarray]


def load_splits() -> DigitSplits:
    """scikit-learn's 1,797 handwritten digits (UCI), split once and for all."""
    data = load_digits()
    scans, labels = data.images.astype(np.float32) / 16, data.target
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    parts = np.split(order, [TEST_DIGITS, TEST_DIGITS + VALIDATION_DIGITS])
    test, validation, train = (Digits(scans[part], labels[part]) for part in parts)
    return DigitSplits(train, validation, test)


@dataclass(frozen=True)
class PageStyle:
    """How digits are drawn. Cells start on whole image tokens; a digit moves, turns and changes size inside its cell."""

    cell: int = 2 * TOKEN_PIXELS
    smallest_digit: int = 48
    largest_digit: int = 56
    shift: int = 2
    degrees: float = 5.0
    trim: int = 1
    paper: tuple[float, float] = (0.85, 1.0)
    ink: tuple[float, float] = (0.0, 0.15)


STYLE = PageStyle()


def draw_page(scans: Sequence[np.ndarray], columns: int, rows: int, rng: np.random.Generator) -> Image.Image:
    """Draw scans on one line of a page of about ``columns`` by ``rows`` image tokens.

    Pages are trimmed by a few pixels, so that the tokenizer's own resizing to whole image tokens is part of the task.
    """
    width, height = columns * TOKEN_PIXELS, rows * TOKEN_PIXELS
    paper, ink = rng.uniform(*STYLE.paper), rng.uniform(*STYLE.ink)
    page = np.full((height, width), paper, dtype=np.float32)
    span = STYLE.cell // TOKEN_PIXELS
    free = columns - span * len(scans)
    line = TOKEN_PIXELS * rng.integers(rows - span + 1)
    for index, (scan, gap) in enumerate(zip(scans, np.sort(rng.integers(free + 1, size=len(scans))))):
        size = rng.integers(STYLE.smallest_digit, STYLE.largest_digit + 1, size=2)
        # the digits touch the edges of their 8 x 8 scans: a margin keeps them whole when turned
        digit = Image.fromarray(np.pad(scan, 1)).resize(tuple(size.tolist()), Image.Resampling.BICUBIC)
        digit = digit.rotate(rng.uniform(-STYLE.degrees, STYLE.degrees), Image.Resampling.BILINEAR)
        slack = STYLE.cell - size
        shift = np.minimum(STYLE.shift, slack // 2)
        left, top = slack // 2 + rng.integers(-shift, shift + 1)
        left, top = left + TOKEN_PIXELS * (span * index + gap), top + line
        page[top : top + digit.height, left : left + digit.width] += (ink - paper) * np.asarray(digit).clip(0, 1)
    trim = rng.integers(STYLE.trim + 1, size=2)
    return Image.fromarray((page[: height - trim[0], : width - trim[1]] * 255).round().astype(np.uint8))


def draw_sample(digits: Digits, rng: np.random.Generator) -> Sample:
    """One of the three questions, with pages of random sizes and random digits."""
    question = QUESTIONS[rng.integers(len(QUESTIONS))]
    chosen = rng.integers(len(digits.labels), size=1 if question == ONE_DIGIT else 2)
    scans = digits.scans[chosen]
    if question == TWO_DIGITS:
        pages = [draw_page(scans, int(rng.integers(4, 6)), int(rng.integers(2, 4)), rng)]
    else:
        pages = [draw_page([scan], *(int(n) for n in rng.integers(2, 4, size=2)), rng) for scan in scans]
    return Sample(tuple(pages), question, " ".join(str(label) for label in digits.labels[chosen]))


def write_tokenizer(path: Path) -> None:
    """Write mistral-common's tekken file of 131,072 tokens, its image part set as Ministral 3 has it."""
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tekken = json.loads(source.read_text(encoding="utf-8"))
    tekken["image"] = {
        "image_patch_size": PATCH_SIZE,
        "max_image_size": MAX_IMAGE_SIZE,
        "spatial_merge_size": MERGE_SIZE,
    }
    path.write_text(json.dumps(tekken, ensure_ascii=False), encoding="utf-8")


class ChatEncoder:
    """Chat requests with pages to tokens and pixels, as mistral-common does it for Ministral 3.

    Args:
        path: a tekken file written by :func:`write_tokenizer`.
    """

    def __init__(self, path: Path) -> None:
        self.tokenizer = MistralTokenizer.from_file(str(path), mode=ValidationMode.finetuning)
        self.tekken = self.tokenizer.instruct_tokenizer.tokenizer
        self.end_of_prompt = self.tekken.get_special_token("[/INST]")
        self._check_special_tokens()

    @property
    def vocab_size(self) -> int:
        return self.tekken.n_words

    def _check_special_tokens(self) -> None:
        found = (self.tekken.get_special_token("[IMG]"), self.tekken.pad_id, self.tekken.eos_id)
        if found != (IMAGE_TOKEN, PAD_TOKEN, EOS_TOKEN):
            raise ValueError(
                f"the tokenizer has [IMG], <pad>, </s> at {found}, Ministral 3 has them at "
                f"{(IMAGE_TOKEN, PAD_TOKEN, EOS_TOKEN)}; is this another tokenizer file?"
            )

    def encode(self, sample: Sample) -> EncodedSample:
        content = [*(ImageChunk(image=page) for page in sample.pages), TextChunk(text=sample.question)]
        messages = [UserMessage(content=content), AssistantMessage(content=sample.answer)]
        encoded = self.tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages))
        expected = sum((i.shape[1] // TOKEN_PIXELS) * (i.shape[2] // TOKEN_PIXELS) for i in encoded.images)
        image_tokens = encoded.tokens.count(IMAGE_TOKEN)
        if image_tokens != expected:
            raise ValueError(
                f"the tokenizer made {image_tokens} image tokens for pages of {[i.shape[1:] for i in encoded.images]}, "
                f"the model makes {expected} features of them (one per {TOKEN_PIXELS} x {TOKEN_PIXELS} pixels)"
            )
        prompt_length = encoded.tokens.index(self.end_of_prompt) + 1
        return EncodedSample(encoded.tokens, prompt_length, encoded.images)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, up to the end of the answer."""
        tokens = list(tokens)
        return self.tekken.decode(tokens[: tokens.index(EOS_TOKEN)] if EOS_TOKEN in tokens else tokens)


def collate(
    samples: Sequence[EncodedSample],
    *,
    prompts_only: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Keyword arguments for the model.

    Returns:
        input_ids, attention_mask: (batch, seq). Padded right, or left when ``prompts_only`` (for generate).
        labels: (batch, seq), not shifted; -100 except on answers. Absent when ``prompts_only``.
        pixel_values: (pages, 3, H, W), zeros beyond each page. image_sizes: (pages, 2), height and width.
    """
    rows = [s.tokens[: s.prompt_length] if prompts_only else s.tokens for s in samples]
    seq = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), seq), PAD_TOKEN)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE)
    for i, (sample, row) in enumerate(zip(samples, rows)):
        start = seq - len(row) if prompts_only else 0
        input_ids[i, start : start + len(row)] = torch.tensor(row)
        attention_mask[i, start : start + len(row)] = 1
        labels[i, sample.prompt_length : len(row)] = torch.tensor(row[sample.prompt_length :], dtype=torch.long)
    images = [image for sample in samples for image in sample.images]
    sizes = torch.tensor([image.shape[1:] for image in images])
    pixels = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
    batch = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    if not prompts_only:
        batch["labels"] = labels.to(device)
    # image_sizes stay on the host: transformers slices with them
    return batch | {"pixel_values": pixels.to(device, dtype), "image_sizes": sizes}
