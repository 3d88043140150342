"""Receipts with handwritten numbers, drawn from scikit-learn's digits, in cord_v2's schema.

python receipts.py receipts --count 20000
m3kernels finetune --pretrained-checkpoint tiny --dataset-type hf dataset.path=receipts
"""

import argparse
import json
import os
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m3kernels.cli.demo_data import Digits, load_splits

ITEMS = ("tea", "bun", "pie", "soup", "rice", "cake", "milk", "fish")
LINE, WIDTH, DIGIT = 56, 196, 44
SPLITS = ("train", "validation", "test")


@cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=32)


def receipt(digits: Digits, rng: np.random.Generator, *, dark: bool) -> tuple[Image.Image, dict]:
    """A receipt and what is on it.

    Two or three items, each with its number in handwriting, and their sum in two more digits below.
    """
    chosen = rng.choice(len(ITEMS), size=int(rng.integers(2, 4)), replace=False)
    scans = [int(rng.integers(len(digits.labels))) for _ in chosen]
    counts = [int(digits.labels[scan]) for scan in scans]
    total = f"{sum(counts):02}"
    page = Image.new("L", (WIDTH, LINE * (len(chosen) + 1)), 255)
    draw = ImageDraw.Draw(page)
    for line, (item, scan) in enumerate(zip(chosen, scans)):
        _put(page, digits.scans[scan], 6, line, rng)
        draw.text((66 + int(rng.integers(0, 8)), line * LINE + 6 + int(rng.integers(0, 6))), ITEMS[item], 0, font())
    last = len(chosen)
    draw.text((6 + int(rng.integers(0, 4)), last * LINE + 8), "=", 0, font())
    for place, figure in enumerate(total):
        scan = rng.choice(np.flatnonzero(digits.labels == int(figure)))
        _put(page, digits.scans[scan], 62 + place * LINE, last, rng)
    menu = [{"nm": ITEMS[item], "cnt": str(count)} for item, count in zip(chosen, counts)]
    if dark:
        page = Image.eval(page, lambda value: 255 - value)
    return page, {"gt_parse": {"menu": menu, "total": {"total_price": total}}}


def _put(page: Image.Image, scan: np.ndarray, left: int, line: int, rng: np.random.Generator) -> None:
    ink = Image.fromarray((255 * (1 - np.pad(scan, 1))).astype(np.uint8))
    ink = ink.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
    left, top = left + int(rng.integers(0, 5)), line * LINE + 4 + int(rng.integers(0, 5))
    page.paste(Image.fromarray(np.minimum(np.asarray(ink), 255)), (left, top))


def _draw(folder: Path, name: str, digits: Digits, seed: int, dark: bool, i: int) -> str:
    """Draws one receipt of a split; returns its row."""
    rng = np.random.default_rng([seed, dark, SPLITS.index(name), i])
    page, truth = receipt(digits, rng, dark=dark)
    file = f"{name}/{i:05}.png"
    page.save(folder / file, compress_level=1)
    return json.dumps({"image": file, "ground_truth": json.dumps(truth)}) + "\n"


def write(folder: str | Path, *, count: int, seed: int = 0, dark: bool = False) -> Path:
    """``count`` receipts to train on and 200 each to validate and test with, of digits that no other split has."""
    folder, splits = Path(folder), load_splits()
    with get_context("fork").Pool(os.cpu_count()) as pool:
        for name in SPLITS:
            (folder / name).mkdir(parents=True, exist_ok=True)
            draw = partial(_draw, folder, name, getattr(splits, name), seed, dark)
            rows = pool.imap(draw, range(count if name == "train" else 200), chunksize=64)
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as lines:
                lines.writelines(rows)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dark", action="store_true", help="white on black")
    args = parser.parse_args()
    print(write(args.folder, count=args.count, seed=args.seed, dark=args.dark))
