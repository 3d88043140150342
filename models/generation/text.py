"""Token ids to text while they come: whole characters, stop strings, and what is thought apart from the answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from m3kernels.models.generation.prompt import GenerationError

THINK, END_THINK = "[THINK]", "[/THINK]"
# around thoughts as plain text, at the beginning of an answer of tokenizers without control tokens for them
TEXT_MARKS = (("<think>", "</think>"), (THINK, END_THINK))
# what stands for bytes that are no character, or not yet
_BROKEN = "\ufffd"


class Vocabulary(Protocol):
    """A :class:`~m3kernels.models.generation.chat.Chat`, or what else turns ids into text."""

    thinks: bool

    def decode(self, tokens: Sequence[int]) -> str: ...

    def control(self, token: int) -> str | None: ...


@dataclass(frozen=True)
class Piece:
    """Text that has come, and whether it is what the model thinks before its answer."""

    text: str
    thinking: bool = False


class Detokenizer:
    """The text of ids as they come: joined, it is the decode of all of them, whatever came at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        # ids whose text is not all given, after those before them, since decoders look at neighbours
        self._window: list[int] = []
        self._new = self._given = 0

    def feed(self, tokens: Sequence[int]) -> str:
        """What is certain of the text so far and was not given yet."""
        self._window += tokens
        text = self.vocabulary.decode(self._window)
        certain = len(text) - text.endswith(_BROKEN)
        found = text[self._given : certain]
        self._given = max(self._given, certain)
        if tokens and certain == len(text):
            self._window = self._window[self._new :]
            self._new = len(self._window)
            self._given = len(self.vocabulary.decode(self._window))
        return found

    def flush(self) -> str:
        """What is left, incomplete characters as U+FFFD; the next ids begin a text of their own."""
        left = self.vocabulary.decode(self._window)[self._given :]
        self._window, self._new, self._given = [], 0, 0
        return left


class Reader:
    """One sequence's ids to text.

    Thoughts stand between the control tokens ``[THINK]`` and ``[/THINK]``; of tokenizers without them, between ``<think>``
    and ``</think>`` where the answer begins with the first. Stop strings end the text wherever they are complete first, in
    thoughts as well; that and what follows is left out.

    Args:
        vocabulary: a Chat.
        stop: strings, of one character at least.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, vocabulary: Vocabulary, *, stop: Iterable[str] = ()) -> None:
        self.stop = tuple([stop] if isinstance(stop, str) else stop)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise GenerationError(f"stop strings {list(self.stop)!r}; allowed: texts of one character and more")
        self.stopped = False
        self._detokenizer = Detokenizer(vocabulary)
        self._control = vocabulary.control if vocabulary.thinks else lambda token: None
        self._thinking = False
        # what is not given yet: it could begin a stop string or a mark
        self._held = ""
        # whether a mark in the text could still come, and which one ends the thoughts
        self._may_think, self._end = not vocabulary.thinks, ""

    def feed(self, tokens: Iterable[int]) -> list[Piece]:
        """The text that these ids complete; empty once stopped."""
        pieces: list[Piece] = []
        run: list[int] = []
        for token in map(int, tokens):
            name = self._control(token)
            if name not in (THINK, END_THINK):
                run.append(token)
                continue
            pieces += self._text(run) + self._rest()
            run, self._thinking = [], name == THINK
        return _joined(pieces + self._text(run))

    def finish(self) -> list[Piece]:
        """What was held back, once no id follows."""
        return _joined(self._rest())

    def _text(self, run: list[int]) -> list[Piece]:
        return self._scan(self._detokenizer.feed(run)) if run and not self.stopped else []

    def _rest(self) -> list[Piece]:
        """Everything that is left of the part that ends here."""
        if self.stopped:
            return []
        pieces = self._scan(self._detokenizer.flush())
        held, self._held = self._held, ""
        return pieces if self.stopped else [*pieces, Piece(held, self._thinking)]

    def _scan(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._mark(pieces):
            pass
        end, start = _first(self._held, self.stop)
        if end is not None:
            self.stopped = True
            pieces.append(Piece(self._held[:start], self._thinking))
            self._held = ""
            return pieces
        if self._may_think:
            return pieces
        kept = _begun(self._held, (*self.stop, *([self._end] if self._end else ())))
        cut = len(self._held) - kept
        pieces.append(Piece(self._held[:cut], self._thinking))
        self._held = self._held[cut:]
        return pieces

    def _mark(self, pieces: list[Piece]) -> bool:
        """Takes a mark out of the held text, unless a stop string is complete before it; whether there was one."""
        if self._may_think:
            body = self._held.lstrip()
            found = next((pair for pair in TEXT_MARKS if body.startswith(pair[0])), None)
            undecided = not body or any(mark.startswith(body) for mark, _ in TEXT_MARKS)
            self._may_think = undecided and found is None
            if found is None:
                return False
            mark, self._end = found
            at = len(self._held) - len(body)
        elif self._end and self._end in self._held:
            mark, at = self._end, self._held.index(self._end)
            self._end = ""
        else:
            return False
        stopped = _first(self._held, self.stop)[0]
        if stopped is not None and stopped <= at + len(mark):
            return False
        pieces.append(Piece(self._held[:at], self._thinking))
        self._thinking = not self._thinking
        self._held = self._held[at + len(mark) :]
        return True


def _first(text: str, stop: Sequence[str]) -> tuple[int | None, int | None]:
    """(end, start) of the stop string that is complete first; of several that end there, the longest."""
    found = [(at + len(mark), at) for mark in stop if (at := text.find(mark)) >= 0]
    return min(found, default=(None, None))


def _begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text could begin one of the marks."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(mark.startswith(text[-size:]) for mark in marks)), 0)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Without empty ones, neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].thinking == piece.thinking:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.thinking)
        elif piece.text:
            joined.append(piece)
    return joined
