"""Text, images and conversations to prompts, in a checkpoint's own format."""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.encode import Backend, Encoded, Encoder, tokenizer_folder
from m3kernels.models.finetune.data.pixels import image_tokens
from m3kernels.models.finetune.data.plain import PlainText
from m3kernels.models.finetune.data.processor import has_chat_template
from m3kernels.models.finetune.data.records import Turn, image_part, read_turns, text_part, thinking_part
from m3kernels.models.finetune.data.rows import read_row
from m3kernels.models.generation.prompt import GenerationError, Prompt
from m3kernels.models.generation.text import END_THINK, THINK

PLACEHOLDER = "[IMG]"
SYSTEM_FILE = "SYSTEM_PROMPT.txt"
# beside the tokenizer's files: what a Hub id's folder is asked for before its weights
ALSO = (SYSTEM_FILE, "generation_config.json", "config.json")
# of Hugging Face's tokenizer; where one of them is there, a chat template would be, too
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_THOUGHT = re.compile(re.escape(THINK) + "(.*?)" + re.escape(END_THINK), re.DOTALL)
# an answer that is left out again: formats end prompts where it begins
_ANSWER = {"role": "assistant", "content": "."}


class Chat:
    """A checkpoint's tokenizer, chat format and image processing.

    Attributes:
        raw: whether prompts are left as they are unless told otherwise: the checkpoint has no chat format.
        system: put before conversations without a system prompt; None puts nothing there.
        stop_tokens: ids that end an answer, by the tokenizer and ``generation_config.json``.
        image_token: its id; -1 where the tokenizer has none.
        thinks: whether the tokenizer has control tokens around what a model thinks.
    """

    def __init__(self, encoder: Encoder, *, system: str | None = None) -> None:
        self.encoder, self.system = encoder, system
        self.raw = not _has_format(encoder)
        self.image_token = encoder.image_token
        self.stop_tokens = _stop_tokens(encoder)
        self.thinks = all(map(encoder.chat.has_control, (THINK, END_THINK)))

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        system: str | None = None,
        shipped_system: bool = False,
        max_image_size: int | None = None,
        backend: Backend = "auto",
        revision: str | None = None,
    ) -> "Chat":
        """Opens the tokenizer's files of a checkpoint; no weight is read.

        Args:
            checkpoint: a folder or a Hub id.
            system: a system prompt for conversations without one. What stands between ``[THINK]`` and ``[/THINK]`` becomes
                a thinking part where the tokenizer has these as control tokens.
            shipped_system: take that of the checkpoint's SYSTEM_PROMPT.txt, its ``{name}``, ``{today}`` and ``{yesterday}``
                filled in.
            max_image_size: longest side of an image in pixels, below the checkpoint's own.
            backend: as of ``Encoder.open``: mistral-common's tekken.json, the Hugging Face processor's files, or neither's
                chat format.
            revision: branch, tag or commit of a Hub id.

        Raises:
            GenerationError: files that are missing or not Ministral 3's; both system prompts.
        """
        with refusals():
            folder = tokenizer_folder(checkpoint, also=ALSO, revision=revision)
            encoder = Encoder.open(folder, max_image_size=max_image_size, backend=backend)
        if shipped_system:
            if system is not None:
                raise GenerationError("a system prompt and the checkpoint's own exclude each other: take one")
            system = _shipped_system(folder, Path(checkpoint).name)
        return cls(encoder, system=system)

    @property
    def folder(self) -> Path:
        return self.encoder.folder

    def prompt(self, text: str, images: Sequence = (), *, system: str | None = None, raw: bool | None = None) -> Prompt:
        """:meth:`encode` with the pixels."""
        return self.with_pixels(self.encode(text, images, system=system, raw=raw))

    def conversation(self, record: dict, *, system: str | None = None, folder: Path | None = None) -> Prompt:
        """:meth:`encode_conversation` with the pixels."""
        return self.with_pixels(self.encode_conversation(record, system=system, folder=folder))

    def with_pixels(self, encoded: Encoded) -> Prompt:
        """Decodes the images of a prompt; raises GenerationError for one that is corrupt."""
        with refusals():
            return Prompt(tuple(int(token) for token in encoded.tokens), tuple(self.encoder.pixels(encoded)))

    def encode(
        self, text: str, images: Sequence = (), *, system: str | None = None, raw: bool | None = None
    ) -> Encoded:
        """What a model is given for a text with images, of which only the headers are read.

        The images stand where the text has ``[IMG]``, or, where it has none, before it.

        Args:
            images: paths, http(s) URLs, PIL images or bytes of files.
            system: instead of the chat's own.
            raw: True leaves the text alone: the begin token, then it; images before it are followed by a line break
                each. None does so where the checkpoint has no chat format. No text becomes a control token.

        Raises:
            GenerationError: neither text nor image, another number of ``[IMG]`` than of images, an image that is missing,
                corrupt or at an address that is not public, or a system prompt for a raw text.
        """
        if not isinstance(text, str):
            raise GenerationError(f"the prompt is a {type(text).__name__}; allowed: text")
        if isinstance(images, (str, Path, bytes)) or not isinstance(images, Sequence):
            raise GenerationError(f"images are given as a {type(images).__name__}; allowed: a list of images")
        raw = self.raw if raw is None else raw
        if not text.strip() and not images:
            raise GenerationError("the prompt is empty: give a text, an image or both")
        pieces = text.split(PLACEHOLDER)
        if len(pieces) > 1 and len(pieces) - 1 != len(images):
            raise GenerationError(
                f"the prompt has {len(pieces) - 1} {PLACEHOLDER} for {len(images)} images; there must be as many, or none"
            )
        references = [_reference(image) for image in images]
        if raw:
            if system is not None or self.system is not None:
                raise GenerationError("a system prompt needs the chat format, and this prompt is raw: leave one out")
            return self._raw(pieces, references)
        if len(pieces) == 1:
            parts = [*map(image_part, references), text_part(text)]
        else:
            parts = [text_part(pieces[0])]
            for reference, piece in zip(references, pieces[1:]):
                parts += [image_part(reference), text_part(piece)]
        parts = [part for part in parts if part["type"] != "text" or part["text"]]
        return self._templated([{"role": "user", "content": parts}, _ANSWER], None, system)

    def encode_conversation(self, record: dict, *, system: str | None = None, folder: Path | None = None) -> Encoded:
        """What stands before the next answer of a conversation, or before its last one where it ends with an answer.

        Args:
            record: with ``messages``, ``conversations`` or ``conversation`` (and ``images``, ``tools``), as training data
                has them.
            system: put first where the conversation has no system prompt, instead of the chat's own.
            folder: what relative image paths are relative to.

        Raises:
            GenerationError: what training data would be refused for.
        """
        with refusals():
            read = read_row(record, folder=folder)
        turns = read["conversation"]
        if not turns or turns[-1].get("role") != "assistant":
            turns = [*turns, _ANSWER]
        return self._templated(turns, read.get("tools"), system)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        return self.encoder.chat.decode([int(token) for token in tokens])

    def control(self, token: int) -> str | None:
        """The name of a control token, such as ``[THINK]``; None of one that is text."""
        return self.encoder.control(token)

    def _templated(self, conversation: list[dict], tools, system: str | None) -> Encoded:
        system = self.system if system is None else system
        with refusals():
            turns, tools = read_turns({"conversation": conversation, "tools": tools})
            if system is not None and not any(turn.role == "system" for turn in turns):
                turns = (Turn("system", self._system_parts(system)), *turns)
            return self.encoder.prompt_of(turns, tools)

    def _system_parts(self, text: str) -> tuple[dict, ...]:
        if not self.thinks:
            return (text_part(text),)
        # every second piece is what stood between the marks
        pieces = enumerate(_THOUGHT.split(text))
        return tuple(thinking_part(piece) if n % 2 else text_part(piece) for n, piece in pieces if piece)

    def _raw(self, pieces: list[str], references: list) -> Encoded:
        chat = self.encoder.chat
        vocabulary = chat.vocabulary if isinstance(chat, PlainText) else chat
        if len(pieces) == 1:
            pieces = ["", *["\n"] * (len(references) - 1), "\n" + pieces[0]] if references else pieces
        with refusals():
            images, sizes = self.encoder.sized(references)
            if images and vocabulary.layout is None:
                raise GenerationError("the tokenizer has no [IMG], [IMG_BREAK] and [IMG_END]: it takes no images")
            tokens = [chat.bos, *_text(vocabulary, pieces[0])]
            for size, piece in zip(sizes, pieces[1:]):
                tokens += [*image_tokens(size, **vocabulary.layout), *_text(vocabulary, piece)]
            return Encoded(np.asarray(tokens, dtype=np.int64), np.zeros(len(tokens), dtype=bool), images, sizes)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What reading data refuses, as a GenerationError."""
    try:
        yield
    except FinetuneError as error:
        raise GenerationError(str(error)) from error


def _text(vocabulary, text: str) -> list[int]:
    return vocabulary.text(text) if text else []


def _reference(image):
    return {"bytes": bytes(image), "path": None} if isinstance(image, (bytes, bytearray)) else image


def _has_format(encoder: Encoder) -> bool:
    """Whether there is a chat format: a tekken.json alone is one, but Base checkpoints have it beside no template."""
    if encoder.backend == "mistral":
        without = any((encoder.folder / name).is_file() for name in TOKENIZER_FILES)
        return has_chat_template(encoder.folder) or not without
    return encoder.backend == "processor"


def _stop_tokens(encoder: Encoder) -> tuple[int, ...]:
    file = encoder.folder / "generation_config.json"
    try:
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise GenerationError(f"{file} is no JSON object ({error}); get it again") from error
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(dict.fromkeys([encoder.eos_token, *(token for token in ends if isinstance(token, int))]))


def _shipped_system(folder: Path, name: str) -> str:
    file = folder / SYSTEM_FILE
    if not file.is_file():
        raise GenerationError(f"{folder} has no {SYSTEM_FILE}: give a system prompt of your own, or none")
    try:
        text, today = file.read_text(encoding="utf-8"), datetime.date.today()
    except UnicodeDecodeError as error:
        raise GenerationError(f"{file} is no UTF-8 text ({error}); get it again") from error
    yesterday = today - datetime.timedelta(days=1)
    for key, value in (("name", name), ("today", today.isoformat()), ("yesterday", yesterday.isoformat())):
        text = text.replace("{" + key + "}", value)
    return text
