"""Rows to records: makers, users' files, splits, mixtures, fingerprints."""

import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from m3kernels.models.finetune.config import DatasetConfig, FinetuneError
from m3kernels.models.finetune.data.makers import all_makers, find_maker
from m3kernels.models.finetune.data.makers.cord_v2 import json_to_tokens, make_cord_v2_dataset
from m3kernels.models.finetune.data.makers.local import make_local_dataset
from m3kernels.models.finetune.data.makers.medpix import make_medpix_dataset
from m3kernels.models.finetune.data.makers.mock import make_mock_dataset
from m3kernels.models.finetune.data.makers.raven import make_raven_dataset
from m3kernels.models.finetune.data.makers.rdr import make_rdr_dataset
from m3kernels.models.finetune.data.makers.text import make_gsm8k_dataset, make_squad_dataset, make_tulu3_dataset
from m3kernels.models.finetune.data.mixture import Mixture
from m3kernels.models.finetune.data.opening import NoSplit, RowStream
from m3kernels.models.finetune.data.records import BadRecord, read_turns
from m3kernels.models.finetune.data.rows import read_row
from m3kernels.models.finetune.data.sources import Source, Stream, open_source
from m3kernels.models.finetune.data.tables import ArrowRows, JsonLines

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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_receipts_are_spelled_as_donut_does():
    assert json_to_tokens(RECEIPT["gt_parse"]) == RECEIPT_TEXT
    assert json_to_tokens({"text_sequence": "raw <s_x>"}) == "raw <s_x>"
    ascending = "".join(f"<s_{k}>" for k in sorted(RECEIPT["gt_parse"]))
    assert not json_to_tokens(RECEIPT["gt_parse"]).startswith(ascending[:8])


def test_cord_v2_from_a_folder_of_jsonl_without_datasets(tmp_path, monkeypatch):
    path = picture(tmp_path / "images")
    rows = [{"image": "images/a.png", "ground_truth": json.dumps(RECEIPT)}] * 2
    several = {"gt_parses": [{"a": 1}, {"b": 2}]}
    rows.append({"image": "images/a.png", "ground_truth": json.dumps(several)})
    bad = [
        ({"image": "images/a.png", "ground_truth": "{"}, "no JSON"),
        ({"image": "images/a.png", "ground_truth": "{}"}, "needs an object gt_parse"),
        ({"image": None, "ground_truth": json.dumps(RECEIPT)}, "image has no image"),
        ({"image": "images/a.png"}, "ground_truth is"),
    ]
    write_lines(tmp_path / "train.jsonl", rows + [row for row, _ in bad])
    write_lines(tmp_path / "validation.jsonl", rows[:1])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = make_cord_v2_dataset(path=str(tmp_path))
    assert isinstance(source, Source) and len(source) == 7
    assert shown(source[0]) == [("user", path, "Describe this image."), ("assistant", RECEIPT_TEXT)]
    assert shown(source[2])[1] == ("assistant", "<s_a>1</s_a>")
    for i, (_, reason) in enumerate(bad, 3):
        with pytest.raises(BadRecord, match=f"^train.jsonl:{i + 1}: .*{reason}"):
            source[i]
    assert len(make_cord_v2_dataset(path=str(tmp_path), split="validation")) == 1
    with pytest.raises(NoSplit, match="no split 'test'; it has: train, validation"):
        make_cord_v2_dataset(path=str(tmp_path), split="test")
    parquet_folder = tmp_path / "other"
    parquet_folder.mkdir()
    (parquet_folder / "train.parquet").write_bytes(b"")
    with pytest.raises(FinetuneError, match="need the datasets library"):
        make_cord_v2_dataset(path=str(parquet_folder))


def test_image_makers_from_parquet_keep_images_undecoded(tmp_path):
    path, image = picture(tmp_path / "images"), datasets.Image()
    text = datasets.Value("string")
    parquet(
        tmp_path / "cord" / "data" / "train-00000-of-00001.parquet",
        {"image": [embedded(path)], "ground_truth": [json.dumps(RECEIPT)]},
        {"image": image, "ground_truth": text},
    )
    parquet(
        tmp_path / "medpix" / "train.parquet",
        {"image_id": [path, path], "question": ["Q", "Q"], "answer": ["A", ""]},
        {"image_id": image, "question": text, "answer": text},
    )
    parquet(tmp_path / "rdr.parquet", {"image": [path], "text": ["T"]}, {"image": image, "text": text})
    cord = make_cord_v2_dataset(path=str(tmp_path / "cord"))
    (user, found), (_, answer) = [(t[0], t[1]) for t in shown(cord[0])]
    assert found["bytes"][:4] == b"\x89PNG" and answer == RECEIPT_TEXT
    medpix = make_medpix_dataset(path=str(tmp_path / "medpix"))
    assert shown(medpix[0])[0][2] == "Q" and shown(medpix[0])[1] == ("assistant", "A")
    with pytest.raises(BadRecord, match=r"^train.parquet row 1: answer is ''"):
        medpix[1]
    rdr = make_rdr_dataset(path=str(tmp_path / "rdr.parquet"))
    assert shown(rdr[0])[0][2] == "Describe this image." and shown(rdr[0])[1] == ("assistant", "T")
    assert shown(pickle.loads(pickle.dumps(rdr))[0])[1] == ("assistant", "T")
    with pytest.raises(FinetuneError, match="columns image, text; needed: image_id, question, answer"):
        make_medpix_dataset(path=str(tmp_path / "rdr.parquet"))


def raven_rows(count, path):
    return {
        "images": [[path, path]] * count,
        "texts": [[{"user": f"Q{i}", "assistant": f"A{i}"}, {"user": "X", "assistant": "Y"}] for i in range(count)],
    }


def test_raven_takes_first_turns_and_carves_a_validation_split(tmp_path):
    path = picture(tmp_path / "images")
    write_lines(
        tmp_path / "raven" / "a.jsonl",
        [dict(zip(("images", "texts"), row)) for row in zip(*raven_rows(45, path).values())],
    )
    train = make_raven_dataset(path=str(tmp_path / "raven"))
    valid = make_raven_dataset(path=str(tmp_path / "raven"), split="validation")
    assert shown(train[0]) == [("user", path, path, "Q0"), ("assistant", "A0")]
    answers = [[shown(source[i])[1][1] for i in range(len(source))] for source in (train, valid)]
    assert answers[1] == ["A19", "A39"]
    assert answers[0] == [f"A{i}" for i in range(45) if i not in (19, 39)]
    assert valid.where(0) == "a.jsonl:20" and train.where(19) == "a.jsonl:21"
    assert train.fingerprint != valid.fingerprint
    with pytest.raises(IndexError):
        valid[2]


def test_raven_keeps_a_validation_split_of_its_own_and_refuses_malformed_rows(tmp_path):
    path = picture(tmp_path)
    feature = {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
    }
    rows = raven_rows(3, embedded(path))
    rows["images"][1], rows["texts"][2] = [], []
    parquet(tmp_path / "train.parquet", rows, feature)
    parquet(tmp_path / "validation.parquet", raven_rows(2, path), feature)
    train = make_raven_dataset(path=str(tmp_path))
    assert len(train) == 3 and len(make_raven_dataset(path=str(tmp_path), split="validation")) == 2
    assert shown(train[0])[0][1]["bytes"][:4] == b"\x89PNG"
    with pytest.raises(BadRecord, match="^train.parquet row 1: images is no list"):
        train[1]
    with pytest.raises(BadRecord, match="^train.parquet row 2: texts is no list"):
        train[2]


def test_text_sets(tmp_path):
    write_lines(tmp_path / "g" / "train.jsonl", [{"question": "1+1?", "answer": "2"}])
    write_lines(
        tmp_path / "s" / "train.jsonl",
        [{"context": "C", "question": "Q", "answers": {"text": answers}} for answers in (["A", "B"], [])],
    )  # fmt: skip
    write_lines(
        tmp_path / "t" / "train.jsonl",
        [{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}],
    )
    assert shown(make_gsm8k_dataset(path=str(tmp_path / "g"))[0]) == [("user", "1+1?"), ("assistant", "2")]
    squad = make_squad_dataset(path=str(tmp_path / "s"))
    assert shown(squad[0]) == [("user", "Context: C\n\nQuestion: Q\n\nAnswer:"), ("assistant", "A")]
    with pytest.raises(BadRecord, match="answers.text is empty"):
        squad[1]
    assert shown(make_tulu3_dataset(path=str(tmp_path / "t"))[0]) == [("user", "A"), ("assistant", "B")]


def test_makers_are_found_by_name_with_a_hint():
    assert set(all_makers()) >= {
        f"make_{n}_dataset" for n in ("cord_v2", "medpix", "raven", "rdr", "mock", "squad", "tulu3")
    }
    assert find_maker("cord-v2") is find_maker("cord_v2") is make_cord_v2_dataset
    with pytest.raises(FinetuneError, match="no maker 'make_cord_dataset'. Did you mean make_cord_v2_dataset?"):
        find_maker("make_cord_dataset")


def test_mock_is_deterministic_by_index():
    source = make_mock_dataset()
    assert len(source) == 1000
    first, again = source[7]["conversation"], make_mock_dataset()[7]["conversation"]
    image = first[0]["content"][0]["image"]
    assert image.size == (256, 256) and image.tobytes() == again[0]["content"][0]["image"].tobytes()
    assert image.tobytes() != source[8]["conversation"][0]["content"][0]["image"].tobytes()
    lengths = {len(source[i]["conversation"][1]["content"][0]["text"].split()) for i in range(100)}
    assert min(lengths) >= 10 and max(lengths) <= 30 and len(lengths) > 10


A, B = {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}


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
            {"conversations": [{"from": "human", "value": "<image>\nA"}, {"from": "gpt", "value": "B <image>"}], "image": "a"},
            [("user", "/f/a", "A"), ("assistant", "B <image>")],
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
        ({"conversations": [{"from": "robot", "value": "A"}]}, "from 'robot'"),
        ({"messages": [3]}, "turn 0 is a int"),
        ([], "a row is a list"),
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
    with pytest.raises(FinetuneError, match="must be a list of objects"):
        make_local_dataset(path=str(tmp_path / "b.json"))
    (tmp_path / "c.txt").write_text("")
    for name, reason in [("c.txt", "unknown kind"), ("none/there/at.all", "does not exist")]:
        with pytest.raises(FinetuneError, match=reason):
            make_local_dataset(path=str(tmp_path / name))
    write_lines(tmp_path / "wrong.jsonl", [{"text": "A"}])
    with pytest.raises(FinetuneError, match="has the columns text; one of conversation"):
        make_local_dataset(path=str(tmp_path / "wrong.jsonl"))


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
