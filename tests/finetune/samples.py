"""Small JSONL files of conversations: good ones with and without an image, and bad ones of every kind."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = "tea bun pie soup rice cake milk fish".split()
# letter of write(): the place of a broken image's file, or None
KINDS = ("image", "text", "corrupt image", "missing file", "empty answer")


def write(path: Path, kinds: list[str]) -> Path:
    """A line for each of ``kinds``, those of KINDS; different in length and picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(kinds))
    rows = [_row(path, i, kind, rng) for i, kind in enumerate(kinds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _row(path: Path, i: int, kind: str, rng: np.random.Generator) -> dict:
    name = f"{path.stem}-{i}.png"
    answer = "" if kind == "empty answer" else " ".join(WORDS[(i + j) % len(WORDS)] for j in range(2 + i % 3))
    if kind in ("image", "corrupt image"):
        height, width = 56 + 28 * (i % 2), 84
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path.parent / name)
    if kind == "corrupt image":
        # its header, which every rank reads, is good
        whole = (path.parent / name).read_bytes()
        (path.parent / name).write_bytes(whole[: len(whole) // 2])
    shows = kind in ("image", "corrupt image", "missing file")
    question = f"{'<image>' if shows else ''}What is it, number {i}?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"image": name} if shows else {})}


def conversations(path: Path) -> Iterator[dict]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
