"""docs/finetune.md says what the code does."""

import re
from pathlib import Path

import pytest

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
