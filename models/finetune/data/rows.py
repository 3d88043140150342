"""Rows of users' own files to canonical records."""

import re
from collections.abc import Iterator
from pathlib import Path

from m3kernels.models.finetune.data.records import BadRecord, image_part, kind_of, text_part
from m3kernels.models.finetune.data.urls import is_url

CONVERSATIONS = ("conversation", "messages", "conversations")
MARKER = "<image>"
# line breaks beside a marker only set it apart; the model's own layout needs none
_MARKER = re.compile(r"\n*<image>\n*")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def read_row(row: dict, *, folder: Path | None) -> dict:
    """The record of a row with one of ``messages``, LLaVA's ``conversations``, or ``conversation``.

    Images of ``image`` or ``images`` take the places of ``<image>`` markers and of image parts without an image, in
    order over the whole conversation; without any they come first in the first user turn. In a row without images
    ``<image>`` in an assistant turn is text.

    Args:
        folder: what relative image paths are relative to.

    Raises:
        BadRecord: none or several of these columns, another number of markers than of images, or a marker in an
            assistant turn.
    """
    if not isinstance(row, dict):
        raise BadRecord("", f"a row is {kind_of(row)}; it must be an object")
    given = [name for name in CONVERSATIONS if row.get(name) is not None]
    if len(given) != 1:
        raise BadRecord("", f"the row has {sorted(row)}; exactly one of {', '.join(CONVERSATIONS)} is needed")
    messages = row[given[0]]
    if not isinstance(messages, (list, tuple)):
        raise BadRecord("", f"{given[0]} is {kind_of(messages)}; it must be a list of turns")
    turns = [_turn(message, f"turn {n}", llava=given[0] == "conversations") for n, message in enumerate(messages)]
    images = _images(row)
    if given[0] == "conversation" and not images:
        turns = [turn | {"content": _parts(turn.get("content"), markers=False)} for turn in turns]
    else:
        turns = _place(turns, images)
    for part in _each_part(turns):
        if part.get("type") == "image":
            part["image"] = _located(part.get("image"), folder)
    return {"conversation": turns} | ({"tools": row["tools"]} if row.get("tools") else {})


def _turn(message, label: str, *, llava: bool) -> dict:
    if not isinstance(message, dict):
        raise BadRecord("", f"{label} is {kind_of(message)}; it must be an object")
    # tables fill the fields that a row lacks with None
    message = {key: value for key, value in message.items() if value is not None}
    if not llava or "from" not in message:
        return message
    speaker = message["from"]
    role = _LLAVA_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        given = repr(speaker) if isinstance(speaker, str) else kind_of(speaker)
        raise BadRecord("", f"{label} is from {given}; allowed: {', '.join(_LLAVA_ROLES)}")
    return {"role": role, "content": message.get("value", "")}


def _images(row: dict) -> list:
    images = row.get("images") if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _place(turns: list[dict], images: list) -> list[dict]:
    placed = [turn | {"content": _parts(turn.get("content"), markers=turn.get("role") == "user")} for turn in turns]
    # it would be learnt as text, and its image be shown elsewhere
    if images and any(
        _has_marker(part) for turn in placed if turn.get("role") == "assistant" for part in turn["content"]
    ):
        raise BadRecord("", f"{MARKER} stands in an assistant turn; images go into user turns")
    empty = [part for part in _each_part(placed) if part.get("type") == "image" and part.get("image") is None]
    if not empty and images:
        first = next((turn for turn in placed if turn.get("role") == "user"), None)
        if first is None:
            raise BadRecord("", f"the row has {len(images)} images and no user turn to show them in")
        empty = [image_part(None) for _ in images]
        first["content"] = [*empty, *first["content"]]
    if len(empty) != len(images):
        raise BadRecord(
            "", f"the row has {len(empty)} {MARKER} markers and {len(images)} images; there must be as many"
        )
    for part, image in zip(empty, images):
        part["image"] = image
    return placed


def _has_marker(part: dict) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str) and MARKER in part["text"]


def _parts(content, *, markers: bool) -> list:
    """Content as parts of our own, its markers as image parts without an image."""
    if content is None or isinstance(content, str):
        content = [text_part(content)] if content else []
    if not isinstance(content, (list, tuple)):
        raise BadRecord("", f"content is {kind_of(content)}; it must be text or a list of parts")
    parts = []
    for part in content:
        part = _part(part)
        if not markers or part.get("type") != "text" or not isinstance(part.get("text"), str):
            parts.append(part)
            continue
        pieces = _MARKER.split(part["text"])
        for n, piece in enumerate(pieces):
            parts += [image_part(None)] if n else []
            parts += [text_part(piece)] if piece.strip() or len(pieces) == 1 else []
    return parts


def _part(part) -> dict:
    if isinstance(part, str):
        return text_part(part)
    if not isinstance(part, dict):
        raise BadRecord("", f"a part is {kind_of(part)}; it must be text or an object with a type")
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "image":
        return image_part(next((part[key] for key in ("image", "path", "url") if key in part), None))
    if part.get("type") == "image_url":
        url = part.get("image_url")
        return image_part(url.get("url") if isinstance(url, dict) else url)
    return part


def _each_part(turns: list[dict]) -> Iterator[dict]:
    return (part for turn in turns for part in turn["content"])


def _located(image, folder: Path | None):
    """A relative path as one that can be opened; anything else as it is."""
    if isinstance(image, dict):
        if image.get("bytes") is None and image.get("path"):
            return _located(image["path"], folder)
        return image
    if isinstance(image, str) and folder is not None and image and not is_url(image):
        return str(folder / image)
    return image


def locate_images(record: dict, folder: Path | None) -> dict:
    """A maker's record with its images' relative paths as ones that can be opened."""
    for turn in record["conversation"]:
        for part in turn["content"] if not isinstance(turn["content"], str) else ():
            if part["type"] == "image":
                part["image"] = _located(part["image"], folder)
    return record
