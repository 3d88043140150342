"""Prompts from a file, all of them checked before any is answered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3kernels.models.finetune.data.encode import Encoded
from m3kernels.models.finetune.data.records import kind_of
from m3kernels.models.finetune.data.rows import CONVERSATIONS
from m3kernels.models.finetune.data.tables import open_file
from m3kernels.models.finetune.data.urls import is_url
from m3kernels.models.generation.chat import Chat, refusals
from m3kernels.models.generation.prompt import GenerationError, Prompt

# fields of a line: with a text, and with a conversation
PROMPT_FIELDS = ("prompt", "images", "image", "system", "id")
CONVERSATION_FIELDS = (*CONVERSATIONS, "images", "image", "tools", "system", "id")
# reasons that are told, of all bad lines
TOLD = 20


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt of a file; its pixels are decoded when it is answered.

    Attributes:
        where: file and line.
        id: what the line calls itself; None where it does not.
    """

    where: str
    id: object
    encoded: Encoded


def read_requests(
    file: str | Path,
    chat: Chat,
    *,
    raw: bool | None = None,
    check: Callable[[Prompt, str], object] = lambda prompt, where: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Request]:
    """The prompts of a JSONL, JSON or parquet file.

    A line has ``prompt`` (with ``images``, a list of paths or URLs; relative ones are relative to the file), or a conversation
    as training data has it: ``messages``, ``conversations`` or ``conversation``. Either may have ``system`` and ``id``.

    Args:
        raw: leave texts of ``prompt`` alone; see ``Chat.encode``.
        check: is given each whole prompt and its place, and raises GenerationError for one that the model does not take.
        advance: is told how many lines are read, of how many.

    Raises:
        GenerationError: no such file, an empty one, or every bad line with its number and reason; 20 are told.
    """
    with refusals():
        table = open_file(Path(file))
    if not len(table):
        raise GenerationError(f"{file} has no prompts")
    requests, bad = [], []
    for i in range(len(table)):
        where = table.where(i)
        try:
            with refusals():
                row = table.row(i)
            request = _request(row, where, chat, raw, Path(file).parent)
            check(chat.with_pixels(request.encoded), where)
            requests.append(request)
        except GenerationError as error:
            bad.append(_placed(str(error), where))
        advance(i + 1, len(table))
    if bad:
        more = f"\nand {len(bad) - TOLD} more" if len(bad) > TOLD else ""
        raise GenerationError(f"{len(bad)} of {len(table)} prompts are bad:\n" + "\n".join(bad[:TOLD]) + more)
    return requests


def _placed(reason: str, where: str) -> str:
    return reason if reason.startswith(where) else f"{where}: {reason}"


def _request(row, where: str, chat: Chat, raw: bool | None, folder: Path) -> Request:
    if not isinstance(row, dict):
        raise GenerationError(f"a line is {kind_of(row)}; it must be an object with prompt or messages")
    # tables fill the fields that a row lacks with None
    row = {name: value for name, value in row.items() if value is not None}
    allowed = PROMPT_FIELDS if "prompt" in row else CONVERSATION_FIELDS
    if unknown := row.keys() - set(allowed):
        raise GenerationError(f"unknown field {', '.join(map(repr, sorted(unknown)))}; allowed: {', '.join(allowed)}")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise GenerationError(f"system is {kind_of(system)}; it must be text")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise GenerationError(f"prompt is {kind_of(row['prompt'])}; it must be text")
        encoded = chat.encode(row["prompt"], _images(row, folder), system=system, raw=raw)
    else:
        record = {name: value for name, value in row.items() if name not in ("system", "id")}
        encoded = chat.encode_conversation(record, system=system, folder=folder)
    return Request(where, row.get("id"), encoded)


def _images(row: dict, folder: Path) -> Sequence:
    if "images" in row and "image" in row:
        raise GenerationError("both image and images are given; take images")
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(images, (list, tuple)):
        raise GenerationError(f"images is {kind_of(images)}; it must be a list")
    return [
        str(folder / image) if isinstance(image, str) and image and not is_url(image) else image for image in images
    ]
