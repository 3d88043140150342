"""Which tokenizer files of a checkpoint are taken, and which are refused."""

import json
import pickle
import shutil

import pytest
from data_chats import CHATS, EOS, IMG, PAD, assistant, encoder, record, user
from data_folders import mistral_folder, processor_folder

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.encode import Encoder


def test_encoders_pickle_and_fingerprints_tell_them_apart():
    made = Encoder.open(mistral_folder(), max_image_size=280)
    again = pickle.loads(pickle.dumps(made))
    assert again.fingerprint == made.fingerprint and again.backend == "mistral"
    assert again.encode(CHATS["images"]).tokens.tolist() == made.encode(CHATS["images"]).tokens.tolist()
    others = {
        made.fingerprint,
        encoder("mistral").fingerprint,
        encoder("processor").fingerprint,
        encoder("plain").fingerprint,
    }
    assert len(others) == 4
    assert (made.eos_token, made.pad_token, made.image_token) == (EOS, PAD, IMG)
    assert (encoder("processor").eos_token, encoder("processor").pad_token, encoder("processor").image_token) == (
        2,
        11,
        10,
    )


def test_wrong_folders_are_refused(tmp_path):
    for given, reason in [
        (tmp_path / "none", "is no folder"),
        (tmp_path, "neither tekken.json nor tokenizer.json"),
    ]:
        with pytest.raises(FinetuneError, match=reason):
            Encoder.open(given)
    with pytest.raises(FinetuneError, match="allowed: auto, mistral"):
        Encoder.open(mistral_folder(), backend="hf")
    with pytest.raises(FinetuneError, match="no chat template"):
        Encoder.open(processor_folder(template=False), backend="processor")


def test_the_wrong_split_of_early_conversions_is_refused(tmp_path):
    shutil.copytree(processor_folder(), tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    saved = json.loads(file.read_text())
    wrong = {
        "type": "Split",
        "pattern": {"Regex": "(?i:'s|'t|'re|'ve)|\\p{N}{1,3}"},
        "behavior": "Isolated",
        "invert": False,
    }
    saved["pre_tokenizer"]["pretokenizers"][0] = wrong
    file.write_text(json.dumps(saved))
    with pytest.raises(FinetuneError, match="fix_mistral_regex"):
        Encoder.open(tmp_path / "copy")


def test_other_patches_are_refused(tmp_path):
    for source, name, change in [
        (
            mistral_folder(),
            "tekken.json",
            {"image": {"image_patch_size": 16, "max_image_size": 1540, "spatial_merge_size": 2}},
        ),
        (processor_folder(), "processor_config.json", {"patch_size": 16}),
    ]:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        config = json.loads((folder / name).read_text(encoding="utf-8")) | change
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(FinetuneError, match="patches of 16 pixels"):
            Encoder.open(folder)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    shutil.copytree(processor_folder(), tmp_path / "copy")
    moving = "{{ bos_token }}{% for m in messages %}{{ messages|length }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "copy" / "chat_template.jinja").write_text(moving)
    with pytest.raises(FinetuneError, match="answers cannot be told apart"):
        Encoder.open(tmp_path / "copy").encode(record(user("A"), assistant("B")))
