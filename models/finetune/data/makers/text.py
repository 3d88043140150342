"""Sets of text alone, one row each: where they are, what they need, and how a row is read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m3kernels.models.finetune.data.makers.fields import text_field
from m3kernels.models.finetune.data.opening import open_rows
from m3kernels.models.finetune.data.records import BadRecord, question
from m3kernels.models.finetune.data.rows import read_row


@dataclass(frozen=True)
class TextSet:
    path: str
    columns: tuple[str, ...]
    convert: Callable[[dict, Path | None], dict]
    subset: str | None = None


def _pair(row: dict, folder: Path | None, *, prompt: str, answer: str) -> dict:
    return question((), text_field(row, prompt), text_field(row, answer))


def _squad(row: dict, folder: Path | None) -> dict:
    answers = (row.get("answers") or {}).get("text") or []
    if not answers:
        raise BadRecord("", "answers.text is empty")
    prompt = f"Context: {text_field(row, 'context')}\n\nQuestion: {text_field(row, 'question')}\n\nAnswer:"
    return question((), prompt, str(answers[0]))


def _messages(row: dict, folder: Path | None) -> dict:
    return read_row({"messages": row.get("messages")}, folder=folder)


SETS = {
    "squad": TextSet("rajpurkar/squad", ("context", "question", "answers"), _squad),
    "gsm8k": TextSet(
        "openai/gsm8k", ("question", "answer"), partial(_pair, prompt="question", answer="answer"), subset="main"
    ),
    "tulu3": TextSet("allenai/tulu-3-sft-mixture", ("messages",), _messages),
    "openmathinstruct2": TextSet(
        "nvidia/OpenMathInstruct-2",
        ("problem", "generated_solution"),
        partial(_pair, prompt="problem", answer="generated_solution"),
    ),
}


def _make(name: str, *, path: str | None = None, split: str = "train", streaming: bool = False):
    row = SETS[name]
    return open_rows(
        path or row.path,
        split=split,
        columns=row.columns,
        convert=row.convert,
        subset=row.subset,
        streaming=streaming,
    )


make_squad_dataset = partial(_make, "squad")
make_gsm8k_dataset = partial(_make, "gsm8k")
make_tulu3_dataset = partial(_make, "tulu3")
make_openmathinstruct2_dataset = partial(_make, "openmathinstruct2")
