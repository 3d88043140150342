"""Makers: schemas, splits, and where their rows come from."""

import json
import pickle
import sys

import datasets
import pytest
from data_files import RECEIPT, RECEIPT_TEXT, embedded, parquet, picture, shown, write_lines

from m3kernels.models.finetune.config import DatasetConfig, FinetuneError
from m3kernels.models.finetune.data.makers import all_makers, find_maker
from m3kernels.models.finetune.data.makers.cord_v2 import json_to_tokens, make_cord_v2_dataset
from m3kernels.models.finetune.data.makers.fields import text_field
from m3kernels.models.finetune.data.makers.medpix import make_medpix_dataset
from m3kernels.models.finetune.data.makers.mock import make_mock_dataset
from m3kernels.models.finetune.data.makers.raven import make_raven_dataset
from m3kernels.models.finetune.data.makers.rdr import make_rdr_dataset
from m3kernels.models.finetune.data.makers.text import make_gsm8k_dataset, make_squad_dataset, make_tulu3_dataset
from m3kernels.models.finetune.data.opening import NoSplit
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.sources import Source, Stream, open_source


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


def test_sets_of_the_hub_by_index_and_as_streams(tmp_path, monkeypatch):
    asked = []
    data = datasets.Dataset.from_dict({"question": ["Q", "R"], "answer": ["A", "B"]})

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        if split != "train":
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
        if path == "nobody/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/none' doesn't exist on the Hub")
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DatasetConfig(type="hf", maker_name=("gsm8k",))
    source = open_source(config, "train", seed=0)
    assert asked == [("openai/gsm8k", "main", "train", False)]
    assert source.where(1) == "openai/gsm8k[train]:1" and shown(source[1]) == [("user", "R"), ("assistant", "B")]
    assert open_source(config, "valid", seed=0) is None
    stream = open_source(DatasetConfig(type="hf", maker_name=("gsm8k",), streaming=True), "train", seed=0)
    assert isinstance(stream, Stream) and not isinstance(stream, Source)
    assert shown(next(iter(stream.skip(1)))) == [("user", "R"), ("assistant", "B")]
    with pytest.raises(FinetuneError, match="streamed sets are not mixed"):
        open_source(DatasetConfig(type="hf", maker_name=("gsm8k", "gsm8k"), streaming=True), "train", seed=0)
    with pytest.raises(FinetuneError, match="nobody/none cannot be opened .*HF_TOKEN"):
        find_maker("gsm8k")(path="nobody/none")
    with pytest.raises(FinetuneError, match="needed: image, ground_truth"):
        find_maker("cord_v2")()


@pytest.mark.parametrize("value, given", [(None, "null"), (3, "a number"), (" ", "' '"), (["A"], "a list")])
def test_text_fields_say_what_they_have(value, given):
    with pytest.raises(BadRecord, match=f"^answer is {given}; it must be text that is not empty$"):
        text_field({"answer": value}, "answer")
