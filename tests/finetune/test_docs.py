"""docs/finetune.md says what the code does."""

import json
import re
from pathlib import Path

import learn_receipts
import pytest

from m3kernels.bench import finetune
from m3kernels.bench.report import insert
from m3kernels.models.finetune.command import parse
from m3kernels.models.finetune.data.makers import all_makers
from m3kernels.models.finetune.resolve import value

PAGE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")
TABLE = re.search("<!-- defaults -->\n(.*?)<!-- /defaults -->", PAGE, re.S)[1]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()[2:]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_defaults(row):
    assert str(value(parse(["3b"]).config, row[0])) == row[2]


def test_fields_that_the_page_names_are_there():
    config = parse(["3b"]).config
    sections = "train|model|peft|optimizer|scheduler|dataset|validation|checkpoint|logger|rng"
    named = set(re.findall(rf"(?<![-.\w])((?:{sections})\.[a-z_0-9]+)\b(?![.(-])", PAGE))
    assert len(named) > 30
    for name in named:
        value(config, name)


def test_makers_that_the_page_names_are_all():
    named = set(re.findall(r"`(make_\w+_dataset)`", PAGE))
    assert named == all_makers().keys() - {"make_mock_dataset", "make_local_dataset"}


RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_tables_are_those_of_the_kept_files():
    steps = sorted(RESULTS.glob("*/*-finetune.ndjson"))[-1]
    rows = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    assert insert(finetune.DOCS, finetune.table(rows, steps.name), finetune.BEGIN, finetune.END) == PAGE
    summary = sorted(RESULTS.glob("*/*-receipts/summary.json"))[-1]
    receipts = json.loads(summary.read_text(encoding="utf-8"))
    table = learn_receipts.table(receipts, summary.parent.name)
    assert insert(learn_receipts.DOCS, table, learn_receipts.BEGIN, learn_receipts.END) == PAGE
    assert all(receipts[kind]["exact"] >= least for kind, least in receipts["required"].items())
    for kind in ("lora", "dora", "projector"):
        # ours computes in bf16, what reloads it in fp32
        assert abs(receipts[kind]["exact"] - receipts[kind]["reloaded"]) <= 0.01


def test_the_readme_has_the_same_steps():
    steps = sorted(RESULTS.glob("*/*-finetune.ndjson"))[-1]
    rows = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    ms = {(row["mode"], row["peer"]): f"{row['ms']:.0f}" for row in rows}
    full, lora = ([ms[mode, peer] for peer in (finetune.MIXED, finetune.LIGER)] for mode in ("full", "lora"))
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    said = f"takes {full[0]} ms (Hugging Face's Trainer with Liger parts {full[1]}), with LoRA {lora[0]} ({lora[1]})"
    assert said in readme
