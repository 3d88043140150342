"""Files of rows that tests of data share."""

import json

import datasets
from PIL import Image

from m3kernels.models.finetune.data.records import read_turns

A, B = {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}
RECEIPT = {"gt_parse": {"menu": [{"nm": "Tea", "cnt": 2}, {"nm": "Pie"}], "total": {"price": "5"}}}


RECEIPT_TEXT = (
    "<s_total><s_price>5</s_price></s_total><s_menu><s_nm>Tea</s_nm><s_cnt>2</s_cnt><sep/><s_nm>Pie</s_nm></s_menu>"
)


def picture(folder, name="a.png"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(folder / name)
    return str(folder / name)


def embedded(path):
    with open(path, "rb") as file:
        return {"bytes": file.read(), "path": "a.png"}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(path, columns, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None).to_parquet(
        str(path)
    )


def shown(record):
    """Roles with their parts: text, or the image reference."""
    return [(t.role, *(p.get("text", p.get("image")) for p in t.parts)) for t in read_turns(record)[0]]
