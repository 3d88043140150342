"""What a run may go on from, and what it may not."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import runs
import samples
import torch

from m3kernels.models.finetune.config import FinetuneError

HALF = "train.train_iters=2 scheduler.lr_decay_iters=4"


@pytest.fixture(scope="module")
def half(checkpoint, tmp_path_factory):
    """The folder of a LoRA run of two steps of four; tests copy it."""
    folder = tmp_path_factory.mktemp("half")
    runs.run(runs.config(checkpoint, folder, HALF, scheme="lora"))
    return folder


@pytest.fixture
def begun(half, tmp_path):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_other_data_is_refused_unless_allowed(checkpoint, begun, capsys):
    with pytest.raises(FinetuneError, match="saw other data .*rng.seed.* have changed.*allow_changed_data=True"):
        runs.run(runs.config(checkpoint, begun, "rng.seed=7", scheme="lora"))
    made = runs.config(
        checkpoint, begun, "rng.seed=7 optimizer.lr=1e-3 checkpoint.allow_changed_data=True", scheme="lora"
    )
    losses, steps = runs.run(made)
    assert steps == 4 and len(losses) == 4
    out = capsys.readouterr().out
    assert f"resumed from {begun}/default/checkpoints/step-000002, step 2" in out
    assert "changed since: rng.seed: 1234 -> 7" in out and "changed since: optimizer.lr: 0.01 -> 0.001" in out
    assert "train.global_batch_size" not in out.split("resumed from")[1].split("m3kernels")[0]


def test_other_pretrained_weights_are_refused(checkpoint, begun, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(checkpoint, other)
    (file,) = other.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FinetuneError, match="began with other pretrained weights"):
        runs.run(runs.config(other, begun, scheme="lora"))


@pytest.mark.parametrize(
    "scheme, extra", [("none", ""), ("lora", "peft.dim=8"), ("dora", ""), ("lora", "--no-freeze-vision-projection")]
)
def test_other_trained_parameters_are_refused(checkpoint, begun, scheme, extra):
    with pytest.raises(FinetuneError, match="holds other parameters than are trained now.*save somewhere else"):
        runs.run(runs.config(checkpoint, begun, extra, scheme=scheme))


def test_a_run_begins_from_another_folders_checkpoint(checkpoint, begun):
    made = runs.config(checkpoint, begun, f"checkpoint.load={begun}/default/checkpoints", scheme="lora")
    runs.run(dataclasses.replace(made, name="branch"))
    assert [row["step"] for row in runs.rows(begun / "branch")] == [3, 4]
    assert sorted(p.name for p in (begun / "branch/checkpoints").glob("step-*")) == ["step-000004"]
    nowhere = runs.config(checkpoint, begun, f"checkpoint.load={begun}/nowhere", scheme="lora")
    with pytest.raises(FinetuneError, match="nowhere holds no complete step-N checkpoint"):
        runs.run(nowhere)


def test_two_runs_do_not_write_to_one_folder(checkpoint, begun):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(begun / "default/checkpoints/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FinetuneError, match="another run is writing to"):
            runs.run(runs.config(checkpoint, begun, HALF, scheme="lora"))
        other.communicate("\n")


def test_a_finished_run_that_is_started_again_exports_again(checkpoint, begun):
    made = runs.config(checkpoint, begun, HALF, scheme="lora")
    adapter = (begun / "default/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(begun / "default/adapter")
    assert runs.run(made)[1] == 2
    assert (begun / "default/adapter/adapter_model.safetensors").read_bytes() == adapter


def test_text_alone_trains_and_resumes_a_vision_model(checkpoint, tmp_path):
    path = samples.write(tmp_path / "text.jsonl", ["text"] * 6)
    data = f"dataset.type=local dataset.train_data_path={path} optimizer.weight_decay=0"
    made = runs.config(checkpoint, tmp_path, data)
    straight = runs.run(made), runs.state(tmp_path / "default")
    halves = dataclasses.replace(runs.config(checkpoint, tmp_path, data, HALF), name="halves")
    runs.run(halves)
    again = runs.run(dataclasses.replace(made, name="halves")), runs.state(tmp_path / "halves")
    assert again[0] == straight[0]
    assert again[1].keys() == straight[1].keys()
    assert all(torch.equal(again[1][name], x) for name, x in straight[1].items())
    vision = [x for name, x in straight[1].items() if name.startswith("exp_avg.model.vision_tower")]
    assert vision and not any(x.any() for x in vision)
