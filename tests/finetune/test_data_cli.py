"""m3kernels data: every kind of bad record is found with its line, and samples are shown as they are trained on."""

import io
import json
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from data_folders import mistral_folder
from PIL import Image
from rich.console import Console

from m3kernels.cli import main
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.inspect import Group, show_packed, show_samples, spans_of
from m3kernels.models.finetune.data.inspect_views import html_page, print_groups
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.data.records import question
from m3kernels.models.finetune.data.validate import Checked, Report, check_record


def turns(prompt: str, answer: str, **columns) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **columns}


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + png(8, 8)[33:]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.png").write_bytes(png(60, 30))
    (tmp_path / "cut.png").write_bytes(png(60, 30)[:-2000])
    (tmp_path / "huge.png").write_bytes(header_of(30000, 30000))
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


# (row, what is said about it); lines from 1, and the second line is empty
ROWS = [
    (turns("Hi", "<b>Hello</b> & \x1b[31mbye"), None),
    (turns("What is it? <image>", "A picture.", image="good.png"), None),
    (turns("What is it? <image>", "Cut.", image="cut.png"), "cut.png is corrupt"),
    (turns("What is it? <image>", "Gone.", image="gone.png"), "gone.png does not exist"),
    (turns("What is it? <image>", "Text.", image="text.png"), "is no image that Pillow knows"),
    (turns("What is it? <image>", "Huge.", image="huge.png"), "too many pixels|30000"),
    (turns("<image><image> both?", "One.", images=["good.png"]), "2 <image> markers and 1 images"),
    (turns("Hi", "  "), "empty answer"),
    ({"prompt": "Hi", "answer": "Hello"}, "exactly one of conversation, messages, conversations is needed"),
    (turns("Hi", "long " * 200), "tokens up to the first answer's end, seq_length is 100"),
    ({"messages": turns("Hi", "Hello")["messages"] * 30}, None),
]


@pytest.fixture
def file(folder):
    lines = [json.dumps(row) for row, _ in ROWS]
    path = folder / "train.jsonl"
    path.write_text("\n".join([lines[0], "", *lines[1:], "{broken"]) + "\n")
    return path


def options(file, *more) -> list[str]:
    return ["--train-data-path", str(file), "--checkpoint", str(mistral_folder()), "--seq-length", "100", *more]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_validate_lists_every_bad_record_with_its_line(file, capsys, workers):
    assert main(["data", "validate", *options(file, "--num-workers", workers, "--json")]) == 1
    report = json.loads(capsys.readouterr().out)
    expected = [(n + 1 + (n > 0), reason) for n, (_, reason) in enumerate(ROWS) if reason is not None]
    expected.append((len(ROWS) + 2, "the line is no JSON"))
    assert [bad["where"] for bad in report["bad"]] == [f"train.jsonl:{line}" for line, _ in expected]
    for bad, (_, reason) in zip(report["bad"], expected):
        assert any(part in bad["reason"] for part in reason.split("|")), bad
    assert (report["records"], report["samples"], report["images"]) == (12, 3, 1)
    # 60 x 30 pixels are 3 x 2 image tokens
    assert report["image_tokens"] == 6
    assert [cut["where"] for cut in report["cut"]] == ["train.jsonl:12"]
    assert report["length"]["max"] <= 100 and 0 < report["supervised"] < report["tokens"]


def test_validate_prints_what_there_is(file, capsys):
    assert main(["data", "validate", *options(file, "--num-workers", "0", "--global-batch-size", "2")]) == 1
    out = capsys.readouterr().out
    assert "train.jsonl:9: turn 1: empty answer\n" in out
    assert "12, 9 bad (75.00%)" in out and "2 steps of 2 samples" in out
    assert "1 longer than 100 tokens: train.jsonl:12" in out


def test_validate_ends_with_the_reasons_and_their_counts(folder, capsys, monkeypatch):
    rows = [turns("What? <image>", "Gone.", image=f"my pics/{n}.png") for n in range(12)]
    rows += [turns("Hi", " ")] * 3 + [turns("<image>" * n, "One.", image="good.png") for n in (2, 3)]
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, turns("Hi", "Hello"), {"messages": "A"}]))
    expected = [
        ("the image … does not exist", 12),
        # one wording alone is kept as it is
        ("turn 1: empty answer", 3),
        ("the row has … <image> markers and … images; there must be as many", 2),
        ("messages is a string; it must be a list of turns", 1),
    ]
    assert main(["data", "validate", *options(path, "--num-workers", "0")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("bad ")] == [
        f"bad              {n} x {reason}" for reason, n in expected
    ]
    assert out[-4:] == [line for line in out if line.startswith("bad ")] and out[0].startswith(
        "many.jsonl:1: the image /"
    )
    assert main(["data", "validate", *options(path, "--num-workers", "0", "--json")]) == 1
    told = json.loads(capsys.readouterr().out)["reasons"]
    assert [(row["reason"], row["records"]) for row in told] == expected
    monkeypatch.setattr("m3kernels.cli.data.REASONS", 2)
    main(["data", "validate", *options(path, "--num-workers", "0")])
    assert capsys.readouterr().out.splitlines()[-1] == "bad              3 for 2 other reasons"


def test_reasons_differ_where_their_words_do():
    report = Report("set", 10)
    said = [
        "the first answer's end, seq_length is 100", "the first answer's end, seq_length is 99", "http://a.b/c answered",
        "https://x.y/z.png?q answered", "part of type 'a b'", "part of type 'c'", "role of type 'c'",
    ]  # fmt: skip
    for n, reason in enumerate(said):
        report.add(Checked(f"set:{n}", reason))
    assert report.reasons() == [
        ("the first answer's end, seq_length is …", 2),
        ("… answered", 2),
        ("part of type …", 2),
        ("role of type 'c'", 1),
    ]


def test_validate_of_good_data_exits_0_and_stops_at_the_limit(capsys):
    common = ["data", "validate", "--mock", "--checkpoint", str(mistral_folder()), "--num-workers", "0"]
    assert main([*common, "--limit", "5"]) == 0
    assert "5, 0 bad" in capsys.readouterr().out
    assert main([*common, "--limit", "0"]) == 0
    assert "0, 0 bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train-data-path", "gone.jsonl", "--checkpoint", "CHECKPOINT"], "the data file gone.jsonl does not exist"),
        (["--mock", "--checkpoint", "/nowhere"], "/nowhere is no folder"),
        (["--mock", "--checkpoint", "CHECKPOINT", "--max-image-size", "9000"], "max_image_size=9000"),
        (["--mock", "--checkpoint", "CHECKPOINT", "--path", "x"], "--path goes with --maker"),
        (["--mock", "--checkpoint", "CHECKPOINT", "--seq-length", "0"], "--seq-length 0; it must be at least 1"),
        (["--maker", "make_cord_v3_dataset", "--checkpoint", "CHECKPOINT"], "make_cord_v2_dataset"),
    ],
)
@pytest.mark.parametrize("action", ["validate", "inspect"])
def test_what_cannot_be_read_exits_2(action, arguments, message, capsys):
    arguments = [str(mistral_folder()) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["data", action, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_defect_of_a_maker_is_named_with_its_record(monkeypatch):
    from m3kernels.models.finetune.data.makers.mock import MockSource
    from m3kernels.models.finetune.data.validate import validate

    monkeypatch.setattr(MockSource, "__getitem__", lambda self, i: {}["column"])
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match=r"(?s)mock:0 cannot be checked.*KeyError: 'column'"):
            validate(MockSource(), Encoder.open(mistral_folder()), seq_length=100, num_workers=workers)


def test_inspect_without_a_terminal_brackets_what_is_supervised(file, capsys):
    assert main(["data", "inspect", *options(file, "--index", "0", "1")]) == 0
    out = capsys.readouterr().out
    # the record's escape sequence must not reach the terminal
    assert "<s>[INST]Hi[/INST]⟦<b>Hello</b> & ␛[31mbye</s>⟧\n" in out and "\x1b" not in out
    assert "[INST][image, 3 x 2 tokens]What is it? [/INST]⟦A picture.</s>⟧\n" in out
    assert "train.jsonl:3 " in out and "image 1: 84 x 56 pixels" in out


def test_inspect_says_which_records_are_bad(file, capsys):
    assert main(["data", "inspect", *options(file, "--samples", "3")]) == 1
    out = capsys.readouterr().out
    assert "train.jsonl:4 bad record" in out and "is corrupt" in out
    assert main(["data", "inspect", *options(file, "--index", "12")]) == 2
    assert "--index 12; train.jsonl has 0 to 11" in capsys.readouterr().err


def test_supervised_tokens_are_coloured_on_a_terminal():
    encoder = Encoder.open(mistral_folder())
    record = question([Image.new("RGB", (28, 28), (255, 0, 0))], "Colour?", "Red.")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100)
    print_groups(show_samples(Records([record]), encoder, seq_length=99, indices=[0]), console)
    out = console.file.getvalue()
    assert "\x1b[1;32mRed.\x1b[0m\x1b[1;32m</s>\x1b[0m" in out and "⟦" not in out
    assert "Colour?" in out and "\x1b[1;32mColour?" not in out
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in out


class Records(list):
    name, fingerprint = "records", "records"

    def where(self, i):
        return f"records:{i}"


class Page(HTMLParser):
    """The text by class, the images, and whether anything could run."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.images, self.tags = [], {}, [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag not in ("meta",):
            self.open.append(dict(attributes).get("class"))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


def test_the_page_has_escaped_text_and_its_images(file, tmp_path, capsys):
    page = tmp_path / "page.html"
    hostile = turns("<script>alert(1)</script> <image>", "</pre><img src=x onerror=alert(2)>", image="good.png")
    file.write_text(json.dumps(hostile) + "\n")
    assert main(["data", "inspect", *options(file, "--html", str(page))]) == 0
    assert f"samples in {page}: 1" in capsys.readouterr().out
    found = Page(page.read_text(encoding="utf-8"))
    assert "script" not in found.tags and len(found.images) == 1
    assert "</pre><img src=x onerror=alert(2)>" in found.text["text supervised"]
    assert "<script>alert(1)</script>" in found.text["text"]
    assert found.text["control"].endswith("<s>[INST][/INST]") and "</s>" in found.text["control supervised"]
    assert found.images[0].startswith("data:image/png;base64,iVBOR")


def test_packed_forwards_are_shown_as_the_plan_has_them(file, capsys):
    common = ["data", "inspect", "--mock", "--checkpoint", str(mistral_folder()), "--seq-length", "400", "--packed"]
    assert main([*common, "--global-batch-size", "4", "--samples", "1", "--step", "2", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    from m3kernels.models.finetune.data.makers.mock import MockSource

    sizes = {"global_batch_size": 4, "seq_length": 400}
    plan = Plan(MockSource(), Encoder.open(mistral_folder()), seed=7, **sizes)
    micro = plan.batch(2, 0, 1).micro_batches[0]
    filled = f"{micro.input_ids.numel()} tokens of 400 ({micro.input_ids.numel() / 400:.0%})"
    assert f"== step 2, forward 1 of 2: {filled}" in out
    assert [line.split()[0] for line in out.split("\n") if line.startswith("mock:")] == list(micro.samples)
    (group,) = show_packed(plan, step=2, count=1)
    assert sum(shown.supervised for shown in group.samples) == micro.supervised


def test_a_bad_record_of_packed_forwards_is_shown_once():
    good = question([], "Hi", "Hello")
    records = Records([question([], "Hi", " "), good, question([], "Hi", "")])
    plan = Plan(records, Encoder.open(mistral_folder()), seed=3, global_batch_size=12, seq_length=99)
    tried = [where for sample in plan.layout(0, 1).samples for where, _ in sample.bad]
    assert len(tried) > 8, "nothing is tried twice here"
    bad, *_ = show_packed(plan, step=0, count=1)
    assert sorted(shown.where for shown in bad.samples) == ["records:0", "records:2"]
    assert {shown.reason for shown in bad.samples} == {"turn 1: empty answer"}


def test_spans_are_all_tokens_with_their_supervision():
    encoder = Encoder.open(mistral_folder())
    images = [Image.new("RGB", (56, 28)), Image.new("RGB", (28, 84))]
    encoded = encoder.encode(question(images, "Zwei Bilder: ü€🙂", "Ja, 🙂."))
    spans = spans_of(encoder, encoded)
    assert sum(span.tokens for span in spans) == len(encoded.tokens)
    assert sum(span.tokens for span in spans if span.supervised) == encoded.supervised.sum()
    assert [(span.text, span.tokens) for span in spans if span.kind == "image"] == [
        ("image, 2 x 1 tokens", 3),
        ("image, 1 x 3 tokens", 6),
    ]
    assert [span.text for span in spans if span.kind == "text"] == ["Zwei Bilder: ü€🙂", "Ja, 🙂."]


def test_numbers_of_a_report():
    report = Report("set", 10)
    for length in (8, 2, 5, 5, 1):
        report.add(check_record({"length": length}, "x", Counted(), seq_length=10))
    assert report.percentiles() == {"min": 1, "p50": 5, "p90": 8, "p99": 8, "max": 8}
    # steps of (8, 2), (5, 5) and (1): a forward each
    assert report.packed(2) == {"steps_per_epoch": 3, "forwards_per_step": 1.0, "filled": 21 / 30}
    # (8, 2), (5, 5), (1)
    assert report.packed(5)["forwards_per_step"] == 3.0
    assert html_page([Group("a < b", ())], title="x & y").count("a &lt; b") == 1


class Counted:
    image_token = -1

    def encode(self, record, *, seq_length):
        from m3kernels.models.finetune.data.encode import Encoded

        return Encoded(np.ones(record["length"], np.int64), np.ones(record["length"], bool), (), ())

    def pixels(self, encoded):
        return []
