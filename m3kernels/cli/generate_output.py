"""What ``m3kernels generate`` prints and writes."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TextIO

from m3kernels.models.generation.chat import Chat
from m3kernels.models.generation.prompt import Sampling
from m3kernels.models.generation.requests import Request
from m3kernels.models.generation.session import Answer, Answering, Session
from m3kernels.models.generation.text import Piece

# by whether the model thinks
HEADINGS = {True: "Reasoning:", False: "Completion:"}
ENDS = {"stop": "ended by itself", "length": "cut at --max-new-tokens", "interrupted": "interrupted"}


@contextlib.contextmanager
def reading_bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over the prompts of a file; yields what is told how many are read, of how many."""
    with _bar(f"reading {name}", shown) as (bar, task):
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _bar(label: str, shown: bool) -> Iterator[tuple]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # answers go to standard output
    with Progress(*columns, console=Console(file=sys.stderr), disable=not (shown and is_terminal(sys.stderr))) as bar:
        yield bar, bar.add_task(label, total=None)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees it; a stream that was closed before the start is None."""
    return stream is not None and stream.isatty()


class Output:
    """Answers as text or as JSON lines, by the command's flags; nothing on ranks after the first.

    Attributes:
        shows_progress: whether a bar of the weights that are read is shown.
    """

    def __init__(self, args: argparse.Namespace, chat: Chat, requests: Sequence[Request], first: bool) -> None:
        self.args, self.chat, self.requests, self.first = args, chat, requests, first
        self.shows_progress = first and is_terminal(sys.stdout) and is_terminal(sys.stderr)
        self._file, self._is_new, self._begun = None, False, False

    def __enter__(self) -> "Output":
        if self.args.output is not None and self.first:
            self._is_new = not self.args.output.exists()
            # what an --overwrite replaces stays until the model is there; an escape in JSON is what UTF-8 cannot hold
            self._file = open(self.args.output, "a", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, *exc) -> None:
        if self._file is None:
            return
        self._file.close()
        if self._is_new and not self._begun:
            self.args.output.unlink()

    def note(self, text: str) -> None:
        if self.first:
            print(f"note: {text}", file=sys.stderr)

    def answer_all(self, session: Session, sampling: Sampling) -> int:
        """Exit code: 0, or 130 after Ctrl-C."""
        self._begun = True
        if self._file is not None and self.args.output.is_file():
            self._file.truncate(0)
        if self.args.batch_file is None:
            return self._one(session, sampling)
        return self._many(session, sampling)

    def _one(self, session: Session, sampling: Sampling) -> int:
        request = self.requests[0]
        self._print(f"Prompt: {self.args.prompt}")
        for image in self.args.image_path:
            self._print(f"Image: {image}")
        prompt = self.chat.with_pixels(request.encoded)
        run = session.start([prompt], sampling, stop=self.args.stop, stream=self.args.stream)
        show = Streamed(self._print) if self.args.stream else None
        interrupted = _drain(run, lambda row, piece: show and show.piece(piece))
        (answer,) = run.answers
        if show is not None:
            show.end()
        else:
            text = answer.text
            if answer.reasoning:
                self._print(f"{HEADINGS[True]} {answer.reasoning.strip()}")
                text = text.lstrip("\n")
            self._print(f"{HEADINGS[False]} {text}")
        self._write(request, answer)
        self._speed(run, f"{answer.prompt_tokens} tokens in, {ENDS[answer.reason]}")
        return 130 if interrupted else 0

    def _many(self, session: Session, sampling: Sampling) -> int:
        size, total = self.args.batch_size, len(self.requests)
        answered, new, seconds, first_s = 0, 0, 0.0, None
        with _bar("answering", self.first) as (bar, task):
            bar.update(task, total=total)
            for begin in range(0, total, size):
                requests = self.requests[begin : begin + size]
                prompts = [self.chat.with_pixels(request.encoded) for request in requests]
                # a draw goes by its row: the same rows of other batches are drawn otherwise
                options = replace(sampling, seed=(sampling.seed + begin) % 2**63)
                run = session.start(prompts, options, stop=self.args.stop)
                interrupted = _drain(run, lambda row, piece: None)
                for request, answer in zip(requests, run.answers):
                    self._write(request, answer)
                new, seconds = new + run.new_tokens, seconds + (run.first_s or 0.0) + run.decode_s
                first_s = run.first_s if first_s is None else first_s
                answered += len(requests)
                bar.update(task, completed=answered)
                if interrupted:
                    break
        if self.first:
            rate = f"{new / seconds:,.1f} tokens/s" if seconds else "nothing generated"
            wait = "" if first_s is None else f", first token after {first_s:.3f} s"
            print(f"{answered} prompts, {new:,} new tokens in {seconds:.2f} s: {rate}{wait}", file=sys.stderr)
        return 130 if interrupted else 0

    def _print(self, text: str, end: str = "\n") -> None:
        if self.first:
            print(text, end=end, flush=True)

    def _write(self, request: Request, answer: Answer) -> None:
        """A line of JSON to --output, or to standard output for a file of prompts without one."""
        if not self.first or (self._file is None and self.args.batch_file is None):
            return
        line = {} if request.id is None else {"id": request.id}
        line |= {
            "text": answer.text,
            "reasoning": answer.reasoning or None,
            "reason": answer.reason,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens,
        }
        out = self._file or sys.stdout
        encoding = getattr(out, "encoding", None) or "utf-8"
        # Python's escapes in other encodings would be none of JSON's
        print(json.dumps(line, ensure_ascii=not encoding.lower().startswith("utf")), file=out, flush=True)

    def _speed(self, run: Answering, about: str) -> None:
        if not self.first:
            return
        wait = "no token" if run.first_s is None else f"first token after {run.first_s:.3f} s"
        rate = f", then {run.tokens_per_s:,.1f} tokens/s" if run.tokens_per_s else ""
        print(f"{run.new_tokens} new tokens ({about}); {wait}{rate}", file=sys.stderr)


class Streamed:
    """Pieces under their headings as they come.

    Args:
        write: prints a text and what ends it.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._thinking: bool | None = None
        # whether the line breaks that set an answer apart from thoughts may still come: the heading does that here
        self._apart = False

    def piece(self, piece: Piece) -> None:
        if piece.thinking != self._thinking:
            self._apart = self._thinking is True
            self._write(("" if self._thinking is None else "\n") + HEADINGS[piece.thinking], end=" ")
            self._thinking = piece.thinking
        text = piece.text.lstrip("\n") if self._apart else piece.text
        self._apart = self._apart and not text
        self._write(text, end="")

    def end(self) -> None:
        self._write(HEADINGS[False] if self._thinking is None else "")


def _drain(run: Answering, show: Callable[[int, Piece], object]) -> bool:
    """Shows the pieces of all rows; whether Ctrl-C ended them."""
    try:
        for row, piece in run:
            show(row, piece)
    except KeyboardInterrupt:
        for row, piece in run.interrupt():
            show(row, piece)
        return True
    return False
