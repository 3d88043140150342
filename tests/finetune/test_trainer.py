"""Whole runs: one loss whatever the layout, exact resume, what is trained, what is written."""

import dataclasses

import pytest
import runs
import torch
from pool import run
from safetensors.torch import load_file

from m3kernels.models.finetune import run as running
from m3kernels.models.finetune import step
from models import FP64, assert_same

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1)]


def trained(made, ranks: int = 1) -> tuple[list[float], dict]:
    (losses, _), *_ = run(ranks, runs.run, made, timeout_s=300)
    return losses, runs.state(f"{made.dir}/{made.name}")


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """What one process makes of a scheme, once for all tests."""
    made = {}

    def of(scheme: str):
        if scheme not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[scheme] = trained(runs.config(checkpoint, folder, scheme=scheme))
        return made[scheme]

    return of


# DoRA's parameters are LoRA's and the magnitudes
@pytest.mark.parametrize(
    "scheme, tp, dp", [(scheme, *layout) for scheme in ("none", "dora") for layout in LAYOUTS] + [("lora", 2, 2)]
)
def test_every_layout_trains_the_same(checkpoint, tmp_path, alone, scheme, tp, dp):
    made = runs.config(checkpoint, tmp_path, f"model.tensor_model_parallel_size={tp}", scheme=scheme)
    losses, state = trained(made, tp * dp)
    one, one_state = alone(scheme)
    assert len(losses) == 4 and losses == pytest.approx(one, rel=1e-12)
    assert_same(state, one_state, FP64)
    assert one[0] - one[-1] > 0.05


@pytest.mark.parametrize("scheme, tp, dp", [("none", 1, 2), ("dora", 2, 2)])
def test_kept_weights_of_other_ranks_are_the_same_training(checkpoint, tmp_path, alone, scheme, tp, dp):
    """Evaluated at the end, which leaves weights gathered, and then exported."""
    layout = f"model.tensor_model_parallel_size={tp} validation.eval_interval=2 validation.max_new_tokens=1"
    made, exported = runs.config(checkpoint, tmp_path, layout, scheme=scheme), []
    for name, job in (("let go", runs.run), ("kept", runs.run_keeping)):
        named = dataclasses.replace(made, name=name)
        (losses, _), *_ = run(tp * dp, job, named, timeout_s=300)
        one, one_state = alone(scheme)
        assert losses == pytest.approx(one, rel=1e-12)
        assert_same(runs.state(runs.folder_of(named)), one_state, FP64)
        (file,) = runs.folder_of(named).glob("*/*model.safetensors")
        exported.append(load_file(file))
    assert_same(exported[1], exported[0], FP64)
    said = [
        [row["valid_loss"] for row in runs.rows(tmp_path / name) if "valid_loss" in row] for name in ("let go", "kept")
    ]
    assert len(said[0]) == 2 and said[1] == pytest.approx(said[0], rel=1e-12)


@pytest.mark.parametrize(
    "split", ["dataset.pack=False", "dataset.pack=False train.micro_batch_size=3", "dataset.seq_length=256"]
)
def test_every_split_into_forwards_trains_the_same(checkpoint, tmp_path, alone, split):
    losses, state = trained(runs.config(checkpoint, tmp_path, split))
    one, one_state = alone("none")
    assert losses == pytest.approx(one, rel=1e-12)
    assert_same(state, one_state, FP64)


def test_a_mean_of_means_would_be_seen(checkpoint, tmp_path, alone, monkeypatch):
    """Dividing by one forward's tokens times their number, which is right only where all are alike, gives another loss."""
    original = step.share

    def of_the_first(built, batch, *flags):
        first = batch.micro_batches[0].supervised * len(batch.micro_batches)
        return dataclasses.replace(original(built, batch, *flags), supervised=first)

    monkeypatch.setattr(running, "share", of_the_first)
    made = runs.config(checkpoint, tmp_path, "dataset.pack=False train.micro_batch_size=1 train.train_iters=1")
    (loss,), _ = runs.run(made)
    assert abs(loss - alone("none")[0][0]) > 1e-3


@pytest.mark.parametrize("scheme, extra", [("none", ""), ("lora", "peft.dropout=0.3"), ("dora", "")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_same_bit_for_bit(checkpoint, tmp_path, scheme, extra, ranks):
    made = runs.config(checkpoint, tmp_path, extra, "scheduler.lr_decay_iters=4", scheme=scheme)
    straight = trained(dataclasses.replace(made, name="straight"), ranks)
    half = dataclasses.replace(made, name="halves", train=dataclasses.replace(made.train, train_iters=2))
    trained(half, ranks)
    again = trained(dataclasses.replace(made, name="halves"), ranks)
    assert again[0] == straight[0]
    assert again[1].keys() == straight[1].keys()
    assert all(torch.equal(again[1][name], x) for name, x in straight[1].items())


@pytest.mark.parametrize(
    "before, after, scheme",
    [((1, 1), (2, 1), "none"), ((2, 1), (1, 2), "none"), ((1, 2), (1, 1), "none"), ((1, 2), (2, 1), "dora")],
)
def test_a_run_goes_on_at_another_layout(checkpoint, tmp_path, alone, before, after, scheme):
    tp = "model.tensor_model_parallel_size={}"
    half = (tp.format(before[0]), "train.train_iters=2 scheduler.lr_decay_iters=4")
    trained(runs.config(checkpoint, tmp_path, *half, scheme=scheme), before[0] * before[1])
    made = runs.config(checkpoint, tmp_path, tp.format(after[0]), "scheduler.lr_decay_iters=4", scheme=scheme)
    losses, state = trained(made, after[0] * after[1])
    one, one_state = alone(scheme)
    assert losses == pytest.approx(one, rel=1e-12)
    assert_same(state, one_state, FP64)
