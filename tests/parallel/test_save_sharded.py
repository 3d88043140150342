"""Sharded models as Hugging Face checkpoints: by save_pretrained, and by torch.distributed.checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import save_jobs as jobs
import torch
from hf_folders import assert_identical, save, tensors
from hf_folders import load as hf_load
from model_jobs import TEXT
from pool import run

from m3kernels.models.ministral3 import Ministral3
from m3kernels.models.ministral3.convert import import_checkpoint

LAYOUTS = [(2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2)]


@pytest.fixture(scope="module", params=["3b", "8b"])
def folder(request, tmp_path_factory):
    """Tied and not, not to be changed."""
    return str(save(tmp_path_factory.mktemp(request.param) / "hf", request.param, dtype=torch.float32, **TEXT))


def assert_holds(model: Ministral3, state: dict) -> None:
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], state[name]) for name in held)


@pytest.mark.parametrize("tp, dp, replicate", LAYOUTS)
def test_saved_and_read_again(folder, tmp_path, tp, dp, replicate):
    out = tmp_path / "out"
    answers = run(tp * dp * replicate, jobs.save, folder, str(out), tp, dp, replicate)
    assert len({count for _, count, _ in answers}) == 1 and all(there for _, _, there in answers)
    model = Ministral3.from_pretrained(out)
    assert_holds(model, answers[0][0])
    assert model.config.tied == ("3b" in folder)
    if model.config.tied:
        assert not any("lm_head" in name for name in tensors(out))
    untrained = Ministral3.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, untrained.lm_head.weight)
    ids = torch.arange(11, 30)[None]
    with torch.no_grad():
        assert torch.allclose(hf_load(out, torch.float32)(input_ids=ids).logits, model(ids).logits, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and (out / "tokenizer.json").exists()


def test_the_layout_of_a_reference(folder, tmp_path):
    out = tmp_path / "out"
    (state, *_), *_ = run(4, jobs.save_with_reference, folder, str(out), 2, 2)
    assert_holds(Ministral3.from_pretrained(out), state)
    # the same files but for the weights, which were trained
    for path in out.glob("*.safetensors"):
        shutil.copy(f"{folder}/{path.name}", path)
    assert_identical(out, Path(folder))


@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
@pytest.mark.parametrize(
    "how, error, message",
    [
        ("taken", "CheckpointError", "not empty: choose another folder"),
        ("full", "OSError", "No space left on device"),
        ("range", "CheckpointError", "beyond float16"),
    ],
)
def test_a_failure_of_the_first_rank_is_one_of_all(folder, tmp_path, tp, dp, how, error, message):
    out = tmp_path / "out"
    if how == "taken":
        out.mkdir()
        (out / "notes.md").write_text("keep")
    first, *others = run(tp * dp, jobs.fails, folder, str(out), tp, dp, how, timeout_s=20)
    assert first[0] == error and message in first[1]
    for kind, said in others:
        assert kind == "CheckpointError" and message in said and (how != "full" or "rank 0 failed" in said)
    assert [p.name for p in tmp_path.rglob("*")] == (["out", "notes.md"] if how == "taken" else [])


def test_one_tensor_at_a_time(folder, tmp_path):
    assert run(2, jobs.most_gathered, folder, str(tmp_path / "out"), 2, 1) == [1, 1]


@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
def test_torchs_writer_of_hugging_face_files(folder, tmp_path, tp, dp):
    out = tmp_path / "out"
    state, *_ = run(tp * dp, jobs.save_hf_dcp, folder, str(out), tp, dp)
    shutil.copy(f"{folder}/config.json", out)
    assert_holds(Ministral3.from_pretrained(out), state)
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys() == tensors(out).keys()


@pytest.mark.parametrize("tp, dp", [(1, 2), (4, 1), (2, 2)])
def test_a_native_folder_goes_into_any_shards(folder, tmp_path, tp, dp):
    import_checkpoint(folder, tmp_path / "native")
    whole = Ministral3.from_pretrained(tmp_path / "native")
    for state in run(tp * dp, jobs.load_native, folder, str(tmp_path / "native"), tp, dp):
        assert_holds(whole, state)


@pytest.mark.parametrize("saved, loaded", [((2, 1), (1, 2)), ((2, 2), (4, 1))])
def test_a_run_goes_on_in_another_layout(folder, tmp_path, saved, loaded):
    """Weights and the optimizer's moments, of tied models too."""
    checkpoint = str(tmp_path / "run")
    want, *_ = run(saved[0] * saved[1], jobs.save_run, folder, checkpoint, *saved)
    for state in run(loaded[0] * loaded[1], jobs.load_run, folder, checkpoint, *loaded):
        assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
