"""Numbers that are not finite, bad records and memory that ends: what a step does, and says, on all ranks."""

import dataclasses

import faults
import pytest
import runs
import samples
from pool import run

SAVING = "checkpoint.save_interval=1 checkpoint.most_recent_k=0"


@pytest.mark.parametrize("tp, async_save", [(1, False), (1, True), (2, False)])
def test_nan_stops_all_ranks_before_the_step(checkpoint, tmp_path, tp, async_save):
    layout = f"model.tensor_model_parallel_size={tp} checkpoint.async_save={async_save}"
    made = runs.config(checkpoint, tmp_path, SAVING, layout)
    for ended in run(
        2, faults.run_with, made, ",".join(f"nan_pixels:{rank}:2" for rank in ((1,) if tp == 1 else (0, 1)))
    ):
        assert ended.unchanged == [False, True]
        assert "loss nan" in ended.error and "in step 2" in ended.error
        assert "From rank 1: mock:" in ended.error or tp == 2
        assert ("rank 0: mock:" in ended.error) == (tp == 2)
        assert f"The last checkpoint is {runs.checkpoints(made)}/step-000001" in ended.error
    assert not list(runs.checkpoints(made).glob("*.tmp"))


def test_infinity_in_the_gradient_alone_stops_too(checkpoint, tmp_path):
    for ended in run(2, faults.run_with, runs.config(checkpoint, tmp_path, SAVING), "inf_gradient:0:1"):
        assert ended.unchanged == [True]
        assert "gradient norm inf" in ended.error and "From the backward, of samples such as mock:" in ended.error
        assert "No checkpoint was written yet" in ended.error


def test_skipped_steps_are_counted_over_a_resumed_run(checkpoint, tmp_path):
    made = runs.config(
        checkpoint, tmp_path, SAVING, "train.on_nonfinite=skip train.max_skipped=1 scheduler.lr_decay_iters=5"
    )
    half = dataclasses.replace(made, train=dataclasses.replace(made.train, train_iters=3))
    for ended in run(2, faults.run_with, half, "nan_pixels:1:2"):
        assert ended.step == 3 and ended.unchanged == [False, True, False]
    skipped = [(row["step"], row["skipped"]) for row in runs.rows(runs.folder_of(made)) if "skipped" in row]
    assert skipped == [(2, 1)]
    whole = dataclasses.replace(made, train=dataclasses.replace(made.train, train_iters=5))
    for ended in run(2, faults.run_with, whole, "inf_gradient:0:2"):
        assert ended.unchanged == [False, True]
        assert "2 steps were skipped for NaN or Inf; train.max_skipped is 1" in ended.error
        assert "step-000004" in ended.error


def test_out_of_memory_names_the_samples_and_what_to_lower(checkpoint, tmp_path):
    (ended,) = run(1, faults.run_with, runs.config(checkpoint, tmp_path), "out_of_memory:0:1")
    assert ended.unchanged == [True]
    for words in ("out of GPU memory in step 1", "tokens of mock:", "images: ", "Lower dataset.seq_length"):
        assert words in ended.error
    assert "Tried to allocate 3.00 GiB" in ended.error and "more" not in ended.error.split("PyTorch:")[1]


BAD = ["corrupt image", "missing file", "empty answer"]
GOOD = ["image", "text", "image", "image", "text"]


def local(folder, kinds, *options) -> tuple[str, ...]:
    path = samples.write(folder / "data" / "train.jsonl", kinds)
    return ("dataset.type=local", f"dataset.train_data_path={path}", *options)


def told(made) -> dict[str, str]:
    return {row["replaced"]: row["reason"] for row in runs.events(runs.folder_of(made)) if "replaced" in row}


def test_bad_records_are_replaced_alike_on_any_number_of_ranks(checkpoint, tmp_path):
    options = local(tmp_path, [*GOOD, *BAD, *GOOD], "dataset.max_bad_share=0.9", SAVING)
    found = {}
    for ranks in (1, 2, 4):
        made = dataclasses.replace(runs.config(checkpoint, tmp_path, *options), name=f"{ranks}")
        found[ranks] = run(ranks, runs.run, made)[0][0], told(made), runs.record(made)["bad"]
    losses, reasons, bad = found[1]
    assert bad >= 3 and sorted(int(where.rsplit(":", 1)[1]) for where in reasons) == [6, 7, 8]
    assert all(where.split(":")[0].endswith("train.jsonl") for where in reasons)
    for ranks in (2, 4):
        assert found[ranks][0] == pytest.approx(losses, rel=1e-12)
        assert found[ranks][1:] == (reasons, bad)


def test_too_many_bad_records_end_all_ranks_with_their_list(checkpoint, tmp_path):
    options = local(tmp_path, [*BAD, *BAD, *BAD, *GOOD], "train.global_batch_size=8 train.train_iters=20")
    ended = run(2, faults.run_with, runs.config(checkpoint, tmp_path, *options))
    assert ended[0].error == ended[1].error and ended[0].unchanged == ended[1].unchanged
    said = ended[0].error
    assert "dataset.max_bad_share allows 1.0%" in said and "m3kernels data validate" in said
    assert "empty" in said and "train.jsonl:" in said and "train-1.png" in said
