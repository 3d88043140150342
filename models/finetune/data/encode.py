"""Conversations to token ids, the mask of those that the loss counts, and normalised images."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from huggingface_hub import snapshot_download

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.images import decode, localise, upright_size
from m3kernels.models.finetune.data.pixels import TOKEN_PIXELS, NoImages
from m3kernels.models.finetune.data.plain import PlainText
from m3kernels.models.finetune.data.processor import FastTokenizer, ProcessorChat, folder_images, has_chat_template
from m3kernels.models.finetune.data.records import BadRecord, Turn, read_turns

Backend = Literal["auto", "mistral", "processor", "plain"]
BACKENDS = ("auto", "mistral", "processor", "plain")
# everything that decides on tokens or pixels
_FILES = (
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example.

    Attributes:
        tokens: (T,) int64 ids.
        supervised: (T,) bool: whether a token is a target of the loss: those of assistant turns and the end of each.
            The first never is.
        images: in the order of their tokens, not decoded; those from the web are fetched already.
        sizes: (height, width) of each in pixels after the resize, multiples of 28: (h / 28) * (w / 28) image tokens.
        cut_turns: messages cut off at the end to fit.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    images: tuple
    sizes: tuple[tuple[int, int], ...]
    cut_turns: int = 0


class Encoder:
    """A checkpoint's own tokenizer, chat format and image processing.

    Attributes:
        backend: "mistral" (tekken.json by mistral-common), "processor" (chat template and tokenizer.json) or "plain"
            (prompt and completion, without a chat format).
        eos_token, pad_token, image_token: ids; image_token is -1 where the checkpoint takes no images.
        fingerprint: changes when the same record would be encoded otherwise.
    """

    def __init__(
        self, folder: Path, *, backend: Backend, max_image_size: int | None = None, system_prompt: str | None = None
    ) -> None:
        self.folder, self.backend, self.system_prompt = folder, backend, system_prompt
        self._arguments = {"backend": backend, "max_image_size": max_image_size, "system_prompt": system_prompt}
        self.chat = _open_backend(folder, backend, max_image_size)
        self.images = self.chat.images or NoImages()
        self.eos_token, self.pad_token = self.chat.eos, self.chat.pad
        self.image_token = -1 if self.chat.image is None else self.chat.image
        self.fingerprint = _fingerprint(folder, self._arguments)

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        max_image_size: int | None = None,
        backend: Backend = "auto",
        system_prompt: str | None = None,
    ) -> "Encoder":
        """Opens the tokenizer files of a checkpoint.

        Args:
            checkpoint: a folder, or a Hub id, of which only these small files are fetched.
            max_image_size: longest side of an image in pixels, below the checkpoint's own.
            backend: auto takes tekken.json where there is one, else a chat template, else the plain format; the
                attribute ``backend`` says which.
            system_prompt: put before conversations without one.

        Raises:
            FinetuneError: files that are missing or not Ministral 3's.
        """
        folder = tokenizer_folder(checkpoint)
        if backend not in BACKENDS:
            raise FinetuneError(f"backend={backend!r}; allowed: {', '.join(BACKENDS)}")
        if backend == "auto":
            backend = "processor" if has_chat_template(folder) else "plain"
            backend = "mistral" if (folder / "tekken.json").is_file() else backend
        return cls(folder, backend=backend, max_image_size=max_image_size, system_prompt=system_prompt)

    def __reduce__(self):
        return partial(type(self), self.folder, **self._arguments), ()

    def encode(self, record: dict, *, seq_length: int | None = None) -> Encoded:
        """Reads only the headers of images.

        Args:
            record: a canonical one.
            seq_length: the most tokens; later turns are cut off where there would be more.

        Raises:
            BadRecord: what :func:`read_turns` and :func:`open_image` refuse, or a first answer that does not fit.
        """
        turns, tools = read_turns(record, system_prompt=self.system_prompt)
        images, sizes = self.sized(image for turn in turns for image in turn.images)
        encoded = self._encode(turns, tools, images, sizes)
        if seq_length is None or len(encoded.tokens) <= seq_length:
            return encoded
        return self._cut(turns, tools, images, sizes, seq_length)

    def pixels(self, encoded: Encoded) -> list[np.ndarray]:
        """(3, height, width) float32, normalised, of each image.

        Raises:
            BadRecord: an image that is corrupt, or no longer the one that was encoded.
        """
        arrays = []
        for reference, size in zip(encoded.images, encoded.sizes):
            array = self.images.array(decode(reference), size)
            if array.shape != (3, *size):
                raise BadRecord("", f"an image is of {array.shape[1:]} pixels now and was of {size}; it was changed")
            arrays.append(array)
        return arrays

    def prompt(self, record: dict) -> Encoded:
        """What stands before the last answer; none of it is supervised."""
        return self.prompt_of(*read_turns(record, system_prompt=self.system_prompt))

    def prompt_of(self, turns: tuple[Turn, ...], tools: tuple[dict, ...]) -> Encoded:
        """What stands before the last answer of checked turns, which end with one."""
        images, sizes = self.sized(image for turn in turns for image in turn.images)
        tokens, spans = self.chat.encode(turns, tools, sizes)
        # no format writes earlier turns otherwise because of an answer after them
        tokens = np.asarray(tokens[: spans[-1][0]], dtype=np.int64)
        return Encoded(tokens, np.zeros(len(tokens), dtype=bool), images, sizes)

    def sized(self, references: Iterable) -> tuple[tuple, tuple[tuple[int, int], ...]]:
        """Images, those from the web fetched, and (height, width) of each in pixels after the resize."""
        images = tuple(localise(reference) for reference in references)
        return images, tuple(self.images.size(*upright_size(image)) for image in images)

    def answer(self, record: dict) -> str:
        """The text of the last assistant turn."""
        return read_turns(record)[0][-1].text

    def decode(self, tokens) -> str:
        """The text of ids, up to the first end token, without control tokens."""
        ids = [int(token) for token in tokens]
        return self.chat.decode(ids[: ids.index(self.eos_token)] if self.eos_token in ids else ids)

    def control(self, token: int) -> str | None:
        """The name of a control token, such as ``[INST]``; None of one that is text."""
        return self.chat.control(int(token))

    def _encode(self, turns: tuple[Turn, ...], tools, images, sizes, *, cut_turns: int = 0) -> Encoded:
        tokens, spans = self.chat.encode(turns, tools, sizes)
        ids, supervised = np.asarray(tokens, dtype=np.int64), np.zeros(len(tokens), dtype=bool)
        for start, stop in spans:
            supervised[start:stop] = True
        supervised[0] = False
        expected = sum((height // TOKEN_PIXELS) * (width // TOKEN_PIXELS) for height, width in sizes)
        found = int((ids == self.image_token).sum())
        if found != expected:
            raise FinetuneError(f"the chat format gives {found} image tokens for images that take {expected}")
        return Encoded(ids, supervised, images, sizes, cut_turns)

    def _cut(self, turns: tuple[Turn, ...], tools, images, sizes, seq_length: int) -> Encoded:
        """The most turns that fit, ending with an answer: found by bisection, since more turns are more tokens."""
        stops = [n for n in range(1, len(turns)) if turns[n - 1].role == "assistant" != turns[n].role]
        best, low, high = None, 0, len(stops)
        shortest = None
        while low < high:
            middle = (low + high) // 2
            kept = turns[: stops[middle]]
            count = sum(len(turn.images) for turn in kept)
            tried = self._encode(kept, tools, images[:count], sizes[:count], cut_turns=len(turns) - len(kept))
            if len(tried.tokens) <= seq_length:
                best, low = tried, middle + 1
            else:
                shortest, high = len(tried.tokens), middle
        if best is None:
            shortest = shortest or len(self._encode(turns, tools, images, sizes).tokens)
            raise BadRecord("", f"{shortest} tokens up to the first answer's end, seq_length is {seq_length}")
        return best


def tokenizer_folder(checkpoint: str | Path, *, also: tuple[str, ...] = (), revision: str | None = None) -> Path:
    """A folder with a checkpoint's tokenizer files: the checkpoint itself, or of a Hub id these files alone.

    Args:
        also: names of other files to fetch.
        revision: branch, tag or commit of a Hub id.

    Raises:
        FinetuneError: no such folder, or a Hub id that cannot be fetched.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or len(folder.parts) != 2:
        raise FinetuneError(f"the checkpoint {checkpoint} is no folder; allowed: a folder, or a Hub id owner/name")
    try:
        return Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=[*_FILES, *also]))
    except (OSError, ValueError) as error:
        raise FinetuneError(
            f"the tokenizer of {checkpoint} cannot be fetched ({error}); is the id right, and HF_TOKEN set?"
        ) from error


def _open_backend(folder: Path, backend: str, max_image_size: int | None):
    tekken = folder / "tekken.json"
    if backend == "processor":
        if not has_chat_template(folder):
            raise FinetuneError(f"{folder} has no chat template; use backend='plain', or add chat_template.jinja")
        return ProcessorChat(folder, max_image_size=max_image_size)
    if backend == "mistral" and not tekken.is_file():
        raise FinetuneError(f"{folder} has no tekken.json; copy it from the checkpoint, or use another backend")
    if tekken.is_file():
        # mistral-common is optional, and only a tekken file needs it
        from m3kernels.models.finetune.data.mistral import MistralChat

        chat = MistralChat(tekken, max_image_size=max_image_size)
        return chat if backend == "mistral" else PlainText(chat, chat.images)
    return PlainText(FastTokenizer(folder), folder_images(folder, max_image_size=max_image_size))


def _fingerprint(folder: Path, arguments: dict) -> str:
    digest = hashlib.blake2b(repr(sorted(arguments.items())).encode(), digest_size=16)
    for name in _FILES:
        file = folder / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
