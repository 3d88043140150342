"""Rows to records: users' files, splits, mixtures, fingerprints."""

import json
import pickle
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_files import RECEIPT, A, B, embedded, parquet, picture, shown, write_lines

from m3kernels.models.finetune.config import DatasetConfig, FinetuneError
from m3kernels.models.finetune.data.makers.local import make_local_dataset
from m3kernels.models.finetune.data.makers.raven import make_raven_dataset
from m3kernels.models.finetune.data.makers.rdr import make_rdr_dataset
from m3kernels.models.finetune.data.mixture import Mixture
from m3kernels.models.finetune.data.opening import NoSplit, RowStream
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.rows import read_row
from m3kernels.models.finetune.data.sources import Source, Stream, open_source
from m3kernels.models.finetune.data.tables import ArrowRows, JsonLines

IN_ANSWER = "^<image> stands in an assistant turn; images go into user turns$"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": [A, B]}, [("user", "A"), ("assistant", "B")]),
        ({"messages": [A, B], "image": "a.png"}, [("user", "/f/a.png", "A"), ("assistant", "B")]),
        ({"messages": [A, B], "images": ["a.png", "/b.png"]}, [("user", "/f/a.png", "/b.png", "A"), ("assistant", "B")]),
        (
            {"messages": [{"role": "user", "content": "See <image>\n\nand <image> here"}, B], "images": ["a", "http://h/b"]},
            [("user", "See ", "/f/a", "and ", "http://h/b", " here"), ("assistant", "B")],
        ),
        (
            # over the whole conversation: a count that restarted in each turn would show a twice
            {"messages": [A | {"content": "<image>A"}, B, A | {"content": "C<image>"}, B], "images": ["a", "b"]},
            [("user", "/f/a", "A"), ("assistant", "B"), ("user", "C", "/f/b"), ("assistant", "B")],
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>\nA"}, {"from": "gpt", "value": "B"}], "image": "a"},
            [("user", "/f/a", "A"), ("assistant", "B")],
        ),
        (
            {"conversation": [A | {"content": [{"type": "image", "path": "a"}, {"type": "text", "text": "<image>"}]}, B]},
            [("user", "/f/a", "<image>"), ("assistant", "B")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}]}, B], "images": ["a"]},
            [("user", "A", "/f/a"), ("assistant", "B")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/a"}}]}, B]},
            [("user", "http://h/a"), ("assistant", "B")],
        ),
        (
            # without images it is text of its own, such as a tag of RSS
            {"messages": [A, B | {"content": "B <image>"}], "images": []},
            [("user", "A"), ("assistant", "B <image>")],
        ),
        ({"messages": [A, B], "images": None, "conversation": None}, [("user", "A"), ("assistant", "B")]),
    ],
)  # fmt: skip
def test_rows_of_users_files(row, expected, tmp_path):
    assert shown(read_row(row, folder=Path("/f"))) == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "A"}, "exactly one of conversation, messages, conversations"),
        ({"messages": [A, B], "conversations": [A, B]}, "exactly one of"),
        ({"messages": "A"}, "must be a list of turns"),
        ({"messages": [{"role": "user", "content": "<image>"}, B]}, "1 <image> markers and 0 images"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, B], "images": ["a", "b"]},
            "1 <image> markers and 2 images",
        ),
        ({"messages": [B], "images": ["a"]}, "no user turn"),
        ({"messages": [A, B | {"content": "B <image>"}], "images": ["a"]}, IN_ANSWER),
        ({"messages": [A | {"content": "<image>A"}, B | {"content": ["B<image>"]}], "images": ["a", "b"]}, IN_ANSWER),
        (
            {
                "conversations": [{"from": "human", "value": "<image>A"}, {"from": "gpt", "value": "<image>"}],
                "image": "a",
            },
            IN_ANSWER,
        ),
        ({"conversations": [{"from": "robot", "value": "A"}]}, "from 'robot'"),
        ({"conversations": [{"from": ["human"], "value": "A"}]}, "^turn 0 is from a list; allowed: human"),
        ({"messages": [3]}, "^turn 0 is a number; it must be an object$"),
        ({"messages": "A"}, "^messages is a string; it must be a list of turns$"),
        ({"messages": [{"role": "user", "content": True}, B]}, "^content is true; it must be text or a list of parts$"),
        ({"messages": [{"role": "user", "content": {}}, B]}, "^content is an object; it must"),
        ({"messages": [{"role": "user", "content": [None]}, B]}, "^a part is null; it must be text"),
        ([], "^a row is a list; it must be an object$"),
        (None, "^a row is null; it must be an object$"),
        (b"", "^a row is a value of type bytes; it must be an object$"),
    ],
)
def test_rows_that_are_none_say_why(row, reason):
    with pytest.raises(BadRecord, match=reason):
        read_row(row, folder=None)


def test_jsonl_reads_lines_on_demand_and_names_bad_ones(tmp_path):
    good = {"messages": [A, B]}
    path = write_lines(tmp_path / "train.jsonl", [good, "", "{broken", good])
    source = make_local_dataset(path=str(path))
    assert len(source) == 3
    assert shown(source[2]) == [("user", "A"), ("assistant", "B")] and source.where(2) == "train.jsonl:4"
    with pytest.raises(BadRecord, match="^train.jsonl:3: the line is no JSON"):
        source[1]
    assert not any(isinstance(value, list) for value in vars(source.table).values())
    assert len(pickle.loads(pickle.dumps(source))) == 3
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            source[wrong]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", ["", "\n  ", "\ufeff"])
def test_a_json_list_named_jsonl_is_told_once(tmp_path, indent, before):
    path = tmp_path / "a.jsonl"
    path.write_text(before + json.dumps([{"messages": [A, B]}] * 3, indent=indent), encoding="utf-8")
    with pytest.raises(FinetuneError, match=r"a\.jsonl is one JSON list, not a line for each record: name it \.json$"):
        JsonLines(path)


def test_lines_of_lists_are_not_called_one_list(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", [A, B], [A, B]])
    with pytest.raises(FinetuneError, match=r"^a\.jsonl:2 is a list; each line must be an object"):
        JsonLines(path)


def test_json_and_parquet_and_saved_datasets(tmp_path):
    rows = [{"messages": [A, B]}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=data, validation=data.select([0])).save_to_disk(str(tmp_path / "dict"))
    for name in ("a.json", "a.parquet", "saved", "dict"):
        source = make_local_dataset(path=str(tmp_path / name))
        assert len(source) == 3 and shown(source[1]) == [("user", "A"), ("assistant", "B")]
    assert len(make_local_dataset(path=str(tmp_path / "dict"), split="validation")) == 1
    with pytest.raises(NoSplit, match="without splits"):
        make_local_dataset(path=str(tmp_path / "saved"), split="validation")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(FinetuneError, match="b.json holds an object; it must be a list of objects"):
        make_local_dataset(path=str(tmp_path / "b.json"))
    (tmp_path / "c.txt").write_text("")
    for name, reason in [("c.txt", "unknown kind"), ("none/there/at.all", "does not exist")]:
        with pytest.raises(FinetuneError, match=reason):
            make_local_dataset(path=str(tmp_path / name))
    write_lines(tmp_path / "wrong.jsonl", [{"text": "A"}])
    with pytest.raises(FinetuneError, match="has the columns text; one of conversation"):
        make_local_dataset(path=str(tmp_path / "wrong.jsonl"))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_drawn_on_a_terminal_alone(tmp_path, capfd, monkeypatch, terminal):
    features = {"images": datasets.List(datasets.Image()), "texts": [{"user": datasets.Value("string")}]}
    pictures = {"images": [[embedded(picture(tmp_path))]], "texts": [[{"user": "A"}]]}
    parquet(tmp_path / "set" / "train.parquet", pictures, features)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    capfd.readouterr()
    assert len(make_raven_dataset(path=str(tmp_path / "set"))) == 1
    err = capfd.readouterr().err
    for bar in ("Generating train split", "Casting the dataset"):
        assert (bar in err) == terminal, err
    assert not datasets.utils.are_progress_bars_disabled(), "the caller's own bars are gone"
    datasets.disable_progress_bars()
    try:
        make_raven_dataset(path=str(tmp_path / "set"))
        assert datasets.utils.are_progress_bars_disabled(), "the caller had them disabled"
    finally:
        datasets.enable_progress_bars()


def test_fingerprints_change_with_the_data(tmp_path):
    rows = [{"messages": [A, B]}] * 3
    path = write_lines(tmp_path / "a.jsonl", rows)
    first = JsonLines(path).fingerprint
    assert JsonLines(write_lines(tmp_path / "copy.jsonl", rows)).fingerprint == first
    changed = path.read_text()[:-5] + "X" + path.read_text()[-4:]
    path.write_text(changed)
    assert JsonLines(path).fingerprint != first
    prints = []
    for text in ("A", "B"):
        parquet(tmp_path / "a.parquet", {"image": [b"x"], "text": [text]})
        prints.append(make_rdr_dataset(path=str(tmp_path / "a.parquet")).fingerprint)
    assert prints[0] != prints[1]


class Numbers:
    def __init__(self, name, count):
        self.name, self.fingerprint, self.count = name, name, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"conversation": [A, B], "from": (self.name, i)}

    def where(self, i):
        return f"{self.name}:{i}"


def test_mixtures_are_weighted_and_deterministic():
    sources = [Numbers("a", 10), Numbers("b", 100)]
    mixture = Mixture(sources, weights=(3, 1), seed=5)
    picked = [mixture[i]["from"] for i in range(len(mixture))]
    assert Counter(name for name, _ in picked) == {"a": 300, "b": 100}
    # any stretch has the weights, nearly
    for start in range(0, 400, 40):
        assert abs(sum(name == "a" for name, _ in picked[start : start + 40]) - 30) <= 2
    only_a = [i for name, i in picked if name == "a"]
    for start in range(0, 300, 10):
        assert sorted(only_a[start : start + 10]) == list(range(10)), "one came again before all had"
    assert only_a[:10] != only_a[10:20]
    assert sorted(i for name, i in picked if name == "b") == list(range(100))
    again = Mixture(sources, weights=(6, 2), seed=5)
    assert np.array_equal(again.index_of, mixture.index_of) and again.fingerprint == mixture.fingerprint
    other = Mixture(sources, weights=(3, 1), seed=6)
    assert not np.array_equal(other.index_of, mixture.index_of) and other.fingerprint != mixture.fingerprint
    assert mixture.where(0) == "{}:{}".format(*picked[0])


def test_mixtures_by_size_have_each_record_once_and_wrong_weights_are_refused():
    sources = [Numbers("a", 7), Numbers("b", 50)]
    mixture = Mixture(sources, seed=1)
    assert len({mixture[i]["from"] for i in range(len(mixture))}) == len(mixture) == 57
    for weights in ((1,), (1, 0), (1, -1), (1, float("nan"))):
        with pytest.raises(FinetuneError, match="one number above 0"):
            Mixture(sources, weights=weights)
    with pytest.raises(FinetuneError, match="a has no records"):
        Mixture([Numbers("a", 0)])


def test_open_source_by_configuration(tmp_path):
    good = {"messages": [A, B]}
    one, two = (str(write_lines(tmp_path / f"{n}.jsonl", [good] * k)) for n, k in (("one", 2), ("two", 6)))
    local = DatasetConfig(type="local", train_data_path=(one, two), weights=(1.0, 1.0), valid_data_path=(one,))
    assert len(open_source(local, "train", seed=0)) == 12
    assert len(open_source(local, "valid", seed=0)) == 2
    assert open_source(local, "test", seed=0) is None
    folder = tmp_path / "cord"
    picture(folder)
    write_lines(folder / "train.jsonl", [{"image": "a.png", "ground_truth": json.dumps(RECEIPT)}])
    hf = DatasetConfig(type="hf", maker_name=("make_cord_v2_dataset",), path=(str(folder),))
    assert len(open_source(hf, "train", seed=0)) == 1
    assert open_source(hf, "valid", seed=0) is None
    for wrong, split, reason in [
        (DatasetConfig(type="hf"), "train", "needs dataset.maker_name"),
        (DatasetConfig(type="hf", maker_name=("cord",), path=(str(folder),)), "train", "Did you mean"),
        (DatasetConfig(type="hf", maker_name=("cord_v2",), path=("a", "b")), "train", "2 entries for 1 makers"),
        (DatasetConfig(type="hf", maker_name=("cord_v2",), path=(str(folder),), valid_split="validaton"), "valid", "no split"),
        (DatasetConfig(type="hf", maker_name=("cord_v2",), path=(str(folder),), split="trian"), "train", "no split 'trian'"),
        (DatasetConfig(type="local"), "train", "needs dataset.train_data_path"),
        (DatasetConfig(type="energon"), "train", "allowed: mock, hf"),
    ]:  # fmt: skip
        with pytest.raises(FinetuneError, match=reason):
            open_source(wrong, split, seed=0)


def test_makers_without_a_validation_split_are_named(tmp_path):
    row = {"image": "a.png", "ground_truth": json.dumps(RECEIPT)}
    both, one = tmp_path / "both", tmp_path / "one"
    write_lines(both / "train.jsonl", [row])
    write_lines(both / "validation.jsonl", [row] * 2)
    write_lines(one / "train.jsonl", [row])
    said = []
    config = DatasetConfig(type="hf", maker_name=("cord_v2", "make_cord_v2_dataset"), path=(str(both), str(one)))
    assert len(open_source(config, "valid", seed=0, say=said.append)) == 2
    left_out = (
        f"note: make_cord_v2_dataset is not in the validation set: {one} has no split 'validation'; it has: train"
    )
    assert said == [left_out]
    assert len(open_source(config, "train", seed=0, say=said.append)) == 2 and said == [left_out]


def test_a_validation_path_never_becomes_training_data(tmp_path):
    good = {"messages": [A, B]}
    write_lines(tmp_path / "split" / "train.jsonl", [good] * 3)
    write_lines(tmp_path / "split" / "test.jsonl", [good])
    write_lines(tmp_path / "whole" / "part-0.jsonl", [good] * 2)
    write_lines(tmp_path / "whole" / "part-1.jsonl", [good])
    whole = DatasetConfig(type="local", train_data_path=("x",), valid_data_path=(str(tmp_path / "whole"),))
    source = open_source(whole, "valid", seed=0)
    assert len(source) == 3 and source.where(2) == "part-1.jsonl:1"
    split = DatasetConfig(type="local", train_data_path=("x",), valid_data_path=(str(tmp_path / "split"),))
    with pytest.raises(FinetuneError, match="no split 'validation'; it has: test, train"):
        open_source(split, "valid", seed=0)


def test_image_folder_moves_relative_paths(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [A, B], "image": "a.png"}])
    config = DatasetConfig(type="local", train_data_path=(str(path),), image_folder="/elsewhere")
    assert shown(open_source(config, "train", seed=0)[0])[0][1] == "/elsewhere/a.png"


def test_streams_skip_and_yield_bad_records(tmp_path):
    path = picture(tmp_path)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": [path] * 4, "text": ["A", "", "C", "D"]}, features=features)
    convert = make_rdr_dataset(path=str(_saved(data, tmp_path))).convert
    stream = RowStream(
        ArrowRows(data, name="s", place="s:", fingerprint="f").data.to_iterable_dataset(), "s", "f", convert
    )
    assert isinstance(stream, Stream) and not isinstance(stream, Source)
    records = list(stream)
    assert isinstance(records[1], BadRecord) and records[1].where == "s:1"
    assert [shown(r)[1][1] for r in (records[0], records[2], records[3])] == ["A", "C", "D"]
    later = list(stream.skip(1).skip(1))
    assert [shown(r)[1][1] for r in later] == ["C", "D"]
    assert [r.where for r in stream.skip(1) if isinstance(r, BadRecord)] == ["s:1"]


def _saved(data, folder):
    data.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def test_bad_records_survive_a_worker_process():
    error = pickle.loads(pickle.dumps(BadRecord("", "why").at("a.jsonl:3")))
    assert (error.where, error.reason, str(error)) == ("a.jsonl:3", "why", "a.jsonl:3: why")
    assert error.at("elsewhere").where == "a.jsonl:3"
