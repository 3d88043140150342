"""Files of prompts: each line as the prompt that it stands for, and every bad line by its number."""

import json

import numpy as np
import pytest
import tiny_checkpoints
from PIL import Image

from m3kernels.models.generation.prompt import GenerationError
from m3kernels.models.generation.requests import TOLD, read_requests


def write(folder, *rows, name="prompts.jsonl"):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text)
    return folder / name


def test_lines_are_prompts_and_conversations(tmp_path):
    Image.effect_noise((60, 30), 80).convert("RGB").save(tmp_path / "a.png")
    file = write(
        tmp_path,
        {"prompt": "Hello", "id": "x"},
        "",
        {"prompt": "A [IMG] B", "images": ["a.png"], "system": "S"},
        {"messages": [{"role": "user", "content": "<image>C"}], "images": ["a.png"], "system": "S"},
        {"messages": [{"role": "user", "content": "D"}, {"role": "assistant", "content": "left out"}], "id": 4},
        {"prompt": "E", "image": str(tmp_path / "a.png")},
    )
    seen, steps = [], []
    requests = read_requests(
        file,
        tiny_checkpoints.chat(),
        check=lambda p, where: seen.append((where, p)),
        advance=lambda *at: steps.append(at),
    )
    assert [(r.where, r.id) for r in requests] == [
        ("prompts.jsonl:1", "x"), ("prompts.jsonl:3", None), ("prompts.jsonl:4", None), ("prompts.jsonl:5", 4),
        ("prompts.jsonl:6", None),
    ]  # fmt: skip
    picture = tmp_path / "a.png"
    expected = [
        tiny_checkpoints.chat().prompt("Hello"),
        tiny_checkpoints.chat().prompt("A [IMG] B", [picture], system="S"),
        tiny_checkpoints.chat().prompt("C", [picture], system="S"),
        tiny_checkpoints.chat().prompt("D"),
        tiny_checkpoints.chat().prompt("E", [picture]),
    ]
    made = [tiny_checkpoints.chat().with_pixels(request.encoded) for request in requests]
    for ours, theirs, (_, checked) in zip(made, expected, seen):
        assert ours.tokens == theirs.tokens == checked.tokens
        assert all(np.array_equal(a, b) for a, b in zip(ours.images, theirs.images))
    assert steps == [(n, 5) for n in range(1, 6)] and [where for where, _ in seen] == [r.where for r in requests]


def test_raw_prompts(tmp_path):
    (request,) = read_requests(write(tmp_path, {"prompt": "A"}), tiny_checkpoints.chat(), raw=True)
    assert tuple(request.encoded.tokens) == tiny_checkpoints.chat().prompt("A", raw=True).tokens


def test_every_bad_line_is_told_with_its_number(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.effect_noise((90, 60), 80).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    rows = [
        ('{"prompt": "A"', "the line is no JSON"),
        ({"prompt": "good"}, None),
        ([1], "a line is a list; it must be an object"),
        ({"promt": "A"}, "unknown field 'promt'; allowed: conversation"),
        ({"prompt": "A", "imgs": []}, "unknown field 'imgs'; allowed: prompt, images"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt is a number; it must be text"),
        ({"prompt": "A", "images": "a.png"}, "images is a string; it must be a list"),
        ({"prompt": "A", "images": ["none.png"]}, "none.png does not exist"),
        ({"prompt": "A", "images": ["cut.png"]}, "no image that Pillow knows"),
        ({"prompt": "A", "images": ["half.png"]}, "half.png is corrupt"),
        ({"prompt": "[IMG]", "images": []}, "1 [IMG] for 0 images"),
        ({"prompt": "A", "images": ["http://10.0.0.1/a.png"]}, "no public address"),
        ({"prompt": "A", "system": 3}, "system is a number; it must be text"),
        ({"messages": [{"role": "bot", "content": "A"}]}, "unknown role"),
        ({"id": 3}, "exactly one of conversation, messages, conversations"),
        ({"prompt": "too long"}, "longer than allowed"),
    ]

    def check(prompt, where):
        if len(prompt.tokens) == len(tiny_checkpoints.chat().prompt("too long").tokens):
            raise GenerationError(f"{where} is longer than allowed")

    with pytest.raises(GenerationError) as caught:
        read_requests(write(tmp_path, *(row for row, _ in rows)), tiny_checkpoints.chat(), check=check)
    first, *told = str(caught.value).splitlines()
    assert first == f"{len(rows) - 1} of {len(rows)} prompts are bad:"
    bad = [(n, reason) for n, (_, reason) in enumerate(rows, 1) if reason]
    for line, (n, reason) in zip(told, bad, strict=True):
        assert line.startswith(f"prompts.jsonl:{n}") and reason in line, line


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(GenerationError) as caught:
        read_requests(write(tmp_path, *[{"prompt": ""}] * (TOLD + 5)), tiny_checkpoints.chat())
    assert len(str(caught.value).splitlines()) == TOLD + 2 and str(caught.value).endswith("and 5 more")


def test_files_without_prompts(tmp_path):
    for file, reason in [
        (tmp_path / "none.jsonl", "does not exist"),
        (write(tmp_path, name="empty.jsonl"), "has no prompts"),
        (write(tmp_path, {"prompt": "A"}, name="a.csv"), "unknown kind; allowed: .jsonl"),
        (write(tmp_path, '[{"prompt": "A"}]'), "name it .json"),
    ]:
        with pytest.raises(GenerationError, match=reason):
            read_requests(file, tiny_checkpoints.chat())
    (request,) = read_requests(write(tmp_path, '[{"prompt": "A"}]', name="list.json"), tiny_checkpoints.chat())
    assert request.where == "list.json row 0"


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "a.jsonl:1: the line's lists and objects lie too deep"),
        ("a.json", b"[" * 100_000, "its lists and objects lie too deep"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet is no parquet file, or a damaged one"),
    ],
    ids=["jsonl", "json", "parquet"],
)
def test_damaged_files_are_refused(name, content, reason, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GenerationError, match=reason):
        read_requests(tmp_path / name, tiny_checkpoints.chat())


def test_what_is_no_file_is_not_said_to_be_missing():
    with pytest.raises(GenerationError, match="/dev/null is a folder, pipe or device"):
        read_requests("/dev/null", tiny_checkpoints.chat())
    with pytest.raises(GenerationError, match="/dev/null is a pipe or a device"):
        tiny_checkpoints.chat().prompt("A", ["/dev/null"])
