"""The documented command under torchrun: as written, killed, and stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import receipts
import runs
import tiny_checkpoint
import torch
from peft import PeftModel
from pool import run
from transformers import Mistral3ForConditionalGeneration

from m3kernels.cli import main
from m3kernels.models.finetune.checkpoint import complete

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "examples/recipes/ministral3/finetune_ministral3_vl.py"
FAULTY = HERE / "faulty_finetune.py"
SAVING = "checkpoint.save_interval=1 checkpoint.most_recent_k=0"


@pytest.fixture(scope="module")
def straight(checkpoint, tmp_path_factory):
    """What two ranks make of the whole run, undisturbed."""
    made = runs.config(checkpoint, tmp_path_factory.mktemp("straight"), SAVING)
    run(2, runs.run, made)
    return runs.state(runs.folder_of(made))


def start(script: Path, arguments: list[str], *options: str, faults: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *options]
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    extra = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "FAULTS": faults, "PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [*command, str(script), *arguments], env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **extra}, **pipes
    )


def torchrun(script: Path, arguments: list[str], *options: str, faults: str = "") -> str:
    """What it prints; it ends well."""
    with start(script, arguments, *options, faults=faults) as started:
        try:
            out, _ = started.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            started.terminate()
            raise
    assert started.returncode == 0, out
    return out


def same(folder: Path, state: dict) -> bool:
    found = runs.state(folder)
    return found.keys() == state.keys() and all(torch.equal(found[name], x) for name, x in state.items())


def test_the_documented_command(tmp_path):
    tiny, native, folder = tmp_path / "hf", tmp_path / "native", tmp_path / "receipts"
    tiny_checkpoint.write(tiny)
    receipts.write(folder, count=8)
    assert main(["convert", "import", "--hf-model", str(tiny), "--checkpoint-path", str(native), "--no-progress"]) == 0
    arguments = (
        f"--pretrained-checkpoint {native} --dataset-type hf --peft-scheme lora dataset.maker_name=make_cord_v2_dataset "
        f"dataset.path={folder} train.global_batch_size=4 train.train_iters=4 dir={tmp_path} validation.eval_interval=4 "
        "validation.generate_samples=1 validation.max_new_tokens=4 dataset.num_workers=1 scheduler.lr_warmup_iters=1"
    )
    out = torchrun(SCRIPT, arguments.split())
    made = tmp_path / "default"
    assert len(runs.losses(made)) == 4 and "step 4/4" in out and f"adapter in {made}/adapter" in out
    assert list(complete(made / "checkpoints")) == [4]
    model = Mistral3ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, made / "adapter")
    trained = [x for name, x in adapted.named_parameters() if "lora_B" in name]
    assert trained and all(x.any() for x in trained)


@pytest.mark.slow
def test_killed_ranks_are_restarted_and_end_with_the_same_bits(checkpoint, tmp_path, straight):
    """Here while a file is written; at other moments, and saving in the background, in ``test_stops``."""
    arguments = [*runs.arguments(checkpoint, SAVING), f"dir={tmp_path}"]
    out = torchrun(FAULTY, arguments, "--max-restarts=1", faults="dies_with_half_a_file:0:2")
    assert "exitcode: -9" in out and "resumed from" in out and same(tmp_path / "default", straight)


@pytest.mark.slow
def test_sigterm_saves_and_a_later_start_goes_on(checkpoint, tmp_path, straight):
    arguments = [*runs.arguments(checkpoint), f"dir={tmp_path}"]
    told = tmp_path / "default/metrics.jsonl"
    # a step that is slow enough for the signal to arrive in
    with start(FAULTY, arguments, faults="waits_in_step:0:2,waits_in_step:1:2") as started:
        deadline = time.monotonic() + 120
        while not (told.exists() and told.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        out, _ = started.communicate(timeout=300)
    # the signal may be quicker than the next step
    (step,) = complete(tmp_path / "default/checkpoints")
    assert step in (1, 2) and f"stopped by SIGTERM after step {step}; start again to go on" in out, out
    assert "resumed from" in torchrun(FAULTY, arguments)
    assert same(tmp_path / "default", straight)
