"""Answers as text: a chat and a generator, one prompt or many, whole or while they come."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from m3kernels.models.generation.chat import Chat
from m3kernels.models.generation.engine import EVERY, Generator, Reason
from m3kernels.models.generation.loading import default_device, find, load
from m3kernels.models.generation.prompt import Prompt, Sampling
from m3kernels.models.generation.text import Piece, Reader

# tokens between two looks where text is shown as it comes: a GPU's few milliseconds
STREAMED = 4


@dataclass(frozen=True)
class Answer:
    """What came after one prompt.

    Attributes:
        text: the answer, before the stop string.
        reasoning: what the model thought before it; empty where it did not.
        reason: "stop" (an end token or a stop string), "length" or "interrupted".
        prompt_tokens, new_tokens: how many; new ones up to the stop string, without the end token.
    """

    text: str
    reasoning: str
    reason: Reason
    prompt_tokens: int
    new_tokens: int


class Answering:
    """Answers to a batch while they come: iterating gives (row, piece); what there is at any time is in ``answers``.

    Attributes:
        first_s: seconds from the start to the first token; None before it.
        decode_s: seconds from there to the last token so far.
    """

    def __init__(
        self, generator: Generator, chat: Chat, prompts: Sequence[Prompt], sampling: Sampling, stop, every: int
    ) -> None:
        # bad stop strings are found before the prompts are read
        self._readers = [Reader(chat, stop=stop) for _ in prompts]
        self._pieces: list[list[Piece]] = [[] for _ in prompts]
        self._counts = [0] * len(prompts)
        self._lengths = [len(prompt.tokens) for prompt in prompts]
        self._started, self.first_s, self.decode_s = time.perf_counter(), None, 0.0
        self._run = generator.start(prompts, sampling, every=every)
        self._iterator = self._read()

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        return self

    def __next__(self) -> tuple[int, Piece]:
        return next(self._iterator)

    @property
    def answers(self) -> list[Answer]:
        """One a prompt; before the end, or after an interrupt, with what there is."""
        made = []
        for row, generation in enumerate(self._run.results):
            texts = ["".join(p.text for p in self._pieces[row] if p.thinking == kind) for kind in (False, True)]
            made.append(Answer(*texts, generation.reason, self._lengths[row], self._counts[row]))
        return made

    @property
    def new_tokens(self) -> int:
        return sum(self._counts)

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together, after the first token of each."""
        later = self.new_tokens - len(self._counts)
        return later / self.decode_s if later > 0 and self.decode_s else 0.0

    def finish(self) -> list[Answer]:
        """All answers, once everything has come."""
        for _ in self:
            pass
        return self.answers

    def interrupt(self) -> list[tuple[int, Piece]]:
        """Ends all rows as they are; what was held back of their texts."""
        self._iterator.close()
        return list(self._left())

    def _read(self) -> Iterator[tuple[int, Piece]]:
        for burst in self._run:
            now = time.perf_counter() - self._started
            self.first_s = now if self.first_s is None else self.first_s
            self.decode_s = now - self.first_s
            for row, tokens in enumerate(burst):
                for piece in self._taken(row, tokens):
                    self._pieces[row].append(piece)
                    yield row, piece
        yield from self._left()

    def _left(self) -> Iterator[tuple[int, Piece]]:
        """What the readers held back."""
        for row, reader in enumerate(self._readers):
            for piece in reader.finish():
                self._pieces[row].append(piece)
                yield row, piece

    def _taken(self, row: int, tokens: Sequence[int]) -> list[Piece]:
        """One token after the other, so that the count does not go by the burst's length."""
        reader, pieces = self._readers[row], []
        for token in tokens:
            pieces += reader.feed([token])
            self._counts[row] += 1
            if reader.stopped:
                self._run.stop(row)
                break
        return pieces


class Session:
    """A model, its tokenizer and a cache whose prefixes the next question reuses.

    Attributes:
        chat: makes prompts.
        generator: makes tokens.
        notices: what the person who generates should know.
    """

    def __init__(self, chat: Chat, generator: Generator, notices: Sequence[str] = ()) -> None:
        self.chat, self.generator, self.notices = chat, generator, tuple(notices)

    @classmethod
    def open(
        cls,
        hf_model_path: str | os.PathLike,
        *,
        checkpoint_path: str | os.PathLike | None = None,
        adapter: str | os.PathLike | None = None,
        revision: str | None = None,
        system: str | None = None,
        shipped_system: bool = False,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
        device: str = "auto",
        mesh: DeviceMesh | None = None,
        kv_dtype: str | None = None,
        progress: bool = False,
    ) -> "Session":
        """Opens a checkpoint: see :meth:`Chat.open`, :func:`loading.find`, :func:`loading.load` and ``Generator``."""
        place = default_device(device)
        chat = Chat.open(hf_model_path, system=system, shipped_system=shipped_system, revision=revision)
        tp = 1 if mesh is None else mesh["tp"].size()
        found = find(hf_model_path, checkpoint_path=checkpoint_path, adapter=adapter, revision=revision, tp=tp)
        model = load(found, dtype=dtype, fp8=fp8, device=place, mesh=mesh, progress=progress)
        return cls(chat, Generator(model, kv_dtype=kv_dtype), found.notices)

    def start(
        self,
        prompts: Sequence[Prompt | str],
        sampling: Sampling = Sampling(),
        *,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> Answering:
        """Reads the prompts and begins to answer; iterate over the result, or call its ``finish``.

        Args:
            prompts: of ``chat.prompt`` or ``chat.conversation``, or texts.
            sampling: with the chat's own end tokens where it names none.
            stop: texts that end an answer and are left out of it.
            stream: look for new tokens often, to show them.

        Raises:
            GenerationError: a prompt that the model does not take, or bad stop strings.
        """
        prompts = [self.chat.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        if not sampling.stop_tokens:
            # a generation_config.json may name ids that the model does not have: they never come
            known = range(self.generator.model.config.text.vocab_size)
            stops = tuple(token for token in self.chat.stop_tokens if token in known)
            sampling = replace(sampling, stop_tokens=stops)
        on_gpu = self.generator.model.device.type == "cuda"
        every = (STREAMED if on_gpu else 1) if stream else EVERY
        return Answering(self.generator, self.chat, prompts, sampling, stop, every)

    def stream(
        self, prompt: Prompt | str, sampling: Sampling = Sampling(), *, stop: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """The pieces of one answer as they come."""
        return (piece for _, piece in self.start([prompt], sampling, stop=stop, stream=True))

    def answer(
        self, prompts: Sequence[Prompt | str], sampling: Sampling = Sampling(), *, stop: Sequence[str] = ()
    ) -> list[Answer]:
        """The whole answers, one a prompt."""
        return self.start(prompts, sampling, stop=stop).finish()
