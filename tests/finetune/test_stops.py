"""Runs that are killed, stopped or stuck, and what becomes of them."""

import signal

import faults
import pytest
import runs
import torch
from pool import RankFailed, run

from m3kernels.models.finetune.checkpoint import complete
from m3kernels.models.finetune.metrics import JsonLines, read_metrics

STEPS = 4
SAVING = "checkpoint.save_interval=1 checkpoint.most_recent_k=0"


@pytest.fixture(scope="module")
def straight(checkpoint, tmp_path_factory):
    """What two ranks make of the whole run, undisturbed."""
    made = runs.config(checkpoint, tmp_path_factory.mktemp("straight"))
    run(2, runs.run, made)
    return runs.state(runs.folder_of(made))


def saved(made) -> list[int]:
    return list(complete(runs.checkpoints(made)))


def goes_on_to(made, state: dict) -> None:
    """The run ends with these bits, however it was started before."""
    assert run(2, runs.run, made)[0][1] == STEPS
    found = runs.state(runs.folder_of(made))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], x) for name, x in state.items())


@pytest.mark.parametrize(
    "fault, async_save",
    [
        ("dies_in_step:1:3", True),
        ("dies_in_write:1:3", False),
        ("dies_in_write:1:3", True),
        ("dies_before_rename:0:3", True),
        ("dies_with_half_a_file:0:3", False),
    ],
)
def test_a_kill_at_any_moment_changes_nothing(checkpoint, tmp_path, straight, fault, async_save):
    made = runs.config(checkpoint, tmp_path, SAVING, f"checkpoint.async_save={async_save}")
    with pytest.raises(RankFailed, match="exit code -9"):
        run(2, faults.run_with, made, fault)
    # an asynchronous one need not have been committed yet
    assert saved(made) in ([[1, 2], [1]] if async_save else [[1, 2]])
    if "step" not in fault.split(":")[0]:
        assert (runs.checkpoints(made) / "step-000003.tmp").exists()
    goes_on_to(made, straight)
    assert saved(made)[-1] == STEPS and not list(runs.checkpoints(made).glob("*.tmp"))


@pytest.mark.parametrize(
    "fault, steps, async_save",
    [
        ("stopped_in_step:1:2", 2, False),
        ("stopped_in_data:0:3", 2, True),
        ("stopped_in_evaluation:1:1", 2, False),
        ("late:1:3", 3, True),  # for train.exit_duration_in_mins
    ],
)
def test_a_stopped_run_saves_and_goes_on(checkpoint, tmp_path, straight, fault, steps, async_save):
    made = runs.config(
        checkpoint,
        tmp_path,
        f"train.exit_duration_in_mins=60 checkpoint.async_save={async_save}",
        "validation.eval_interval=2 validation.generate_samples=1 validation.max_new_tokens=2",
    )
    assert [ended.step for ended in run(2, faults.run_with, made, fault)] == [steps, steps]
    assert saved(made)[-1] == steps and not list(runs.checkpoints(made).glob("*.tmp"))
    evaluated = [row["step"] for row in runs.rows(runs.folder_of(made)) if "valid_loss" in row]
    assert evaluated == ([2] if steps == 3 or "data" in fault else [])  # one in parts says nothing
    goes_on_to(made, straight)


def test_a_stop_before_the_first_step_leaves_nothing(checkpoint, tmp_path):
    made = runs.config(checkpoint, tmp_path, SAVING)
    assert [ended.step for ended in run(2, faults.run_with, made, "stopped_in_data:0:1")] == [0, 0]
    assert saved(made) == []


def test_a_signal_while_the_model_loads_ends_at_once(checkpoint, tmp_path):
    made = runs.config(checkpoint, tmp_path, SAVING)
    with pytest.raises(RankFailed, match=f"exit code -{signal.SIGTERM.value}"):
        run(1, faults.run_with, made, "stopped_in_load:0:1")


def test_an_interrupted_command_says_so(checkpoint, tmp_path):
    arguments = runs.arguments(checkpoint, SAVING)
    ((code, out, _),) = run(1, faults.run_command, [*arguments, f"dir={tmp_path}"], "interrupted_in_step:0:2")
    assert code == 0 and "stopped by SIGINT after step 2; start again to go on" in out
    assert list(complete(tmp_path / "default/checkpoints")) == [1, 2]


def test_a_hang_ends_all_with_stacks(checkpoint, tmp_path):
    made = runs.config(checkpoint, tmp_path, "train.timeout_minutes=0.07")
    with pytest.raises(RankFailed, match="exit code 1"):
        run(2, faults.run_with, made, "sleeps_in_step:1:2", timeout_s=60)
    stacks = [(tmp_path / f"default/stack-rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "rank 0, in what the other ranks say before step 3" in stacks[0] and "all_reduce" in stacks[0]
    assert "rank 1, in step 2, mock:" in stacks[1] and "faults.py" in stacks[1]


def test_what_one_rank_cannot_read_ends_all(checkpoint, tmp_path):
    made = runs.config(checkpoint, tmp_path, SAVING)
    for ended in run(2, faults.run_with, made, "no_data:1:3"):
        assert ended.kind == "FinetuneError" and "rank 1: the data of step 2" in ended.error
        assert "the data's disk is gone" in ended.error
    assert saved(made) == [1, 2]


@pytest.mark.parametrize(
    "how, async_save", [("disk_full", False), ("disk_full_in_write", False), ("disk_full_in_write", True)]
)
def test_a_full_disk_now_and_then_is_survived(checkpoint, tmp_path, straight, how, async_save):
    made = runs.config(checkpoint, tmp_path, SAVING, f"checkpoint.async_save={async_save}")
    assert [ended.step for ended in run(2, faults.run_with, made, f"{how}:1:2")] == [STEPS, STEPS]
    assert saved(made) == [1, 3, 4]
    (failed,) = [row for row in runs.events(runs.folder_of(made)) if "checkpoint_failed" in row]
    assert "step-000002" in failed["checkpoint_failed"] or "step 2" in failed["checkpoint_failed"]
    assert "rank 1: OSError: [Errno 28]" in failed["checkpoint_failed"]
    goes_on_to(made, straight)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_at_the_end_is_an_error(checkpoint, tmp_path, async_save):
    arguments = [*runs.arguments(checkpoint, SAVING, f"checkpoint.async_save={async_save}"), f"dir={tmp_path}"]
    for code, _, err in run(2, faults.run_command, arguments, f"disk_full_in_write:0:{STEPS}"):
        assert code == 2 and "the one before it is whole" in err and "No space left on device" in err
    assert list(complete(tmp_path / "default/checkpoints")) == [1, 2, 3]
    made = runs.config(checkpoint, tmp_path, SAVING)
    assert run(2, runs.run, made)[0][1] == STEPS


def test_metrics_survive_a_full_disk_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    lines = JsonLines(path)
    lines.write(1, {"resumed_from": 1})
    lines.write(2, {"loss": 1.5})
    lines.close()
    assert [row["loss"] for row in read_metrics(path)] == [2.0, 1.5]
    full = JsonLines(path)
    full.file.close()
    full.file = open("/dev/full", "wb", buffering=0)
    full.write(3, {"loss": 1.0})
    full.close()
