"""Ranks with unequal work: images on one of them alone, none at all, fewer samples than ranks."""

import dataclasses

import pytest
import runs
import samples
from pool import run

from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.data.sources import open_source
from models import FP64, assert_same

# (samples of the set, whose order is kept; samples a step): one image among texts, and places that stay empty
SETS = {
    "one image": (["image", "text", "text", "text", "text", "image", "text", "text"], 4),
    "fewer samples than ranks": (["image", "text", "image"], 3),
}


@pytest.mark.parametrize(
    "scheme, flags", [("none", ""), ("none", "--freeze-vision-model"), ("lora", "peft.adapt_vision=True")]
)
@pytest.mark.parametrize("kinds", SETS)
def test_uneven_ranks_train_as_one_process_does(checkpoint, tmp_path, monkeypatch, kinds, scheme, flags):
    rows, batch = SETS[kinds]
    path = samples.write(tmp_path / "train.jsonl", rows)
    data = f"dataset.type=local dataset.train_data_path={path} dataset.valid_data_path={path} dataset.shuffle=False"
    evaluation = (
        "validation.eval_interval=2 validation.generate_samples=1 validation.max_new_tokens=3 train.train_iters=2"
    )
    made = runs.config(checkpoint, tmp_path, data, evaluation, f"train.global_batch_size={batch}", flags, scheme=scheme)
    found = {}
    for ranks in (1, 2, 4):
        named = dataclasses.replace(made, name=f"{ranks}")
        (losses, _), *_ = run(ranks, runs.run, named, timeout_s=60)
        valid = [row for row in runs.rows(runs.folder_of(named)) if "valid_loss" in row]
        found[ranks] = losses, runs.state(runs.folder_of(named)), valid
    losses, state, (valid,) = found[1]
    assert valid["valid_samples"] == len(rows)
    for ranks in (2, 4):
        assert found[ranks][0] == pytest.approx(losses, rel=1e-12)
        assert_same(found[ranks][1], state, FP64)
        assert found[ranks][2][0] == pytest.approx(valid, rel=1e-12)


def test_the_sets_are_as_uneven_as_they_say(checkpoint, tmp_path):
    """Of two and four ranks one has the only image, and of four one has nothing where there are three samples."""
    for rows, batch in SETS.values():
        path = samples.write(tmp_path / "train.jsonl", rows)
        made = runs.config(checkpoint, tmp_path, f"dataset.type=local dataset.train_data_path={path}")
        source, encoder = open_source(made.dataset, "train", seed=0), Encoder.open(checkpoint)
        plan = Plan(source, encoder, seed=0, global_batch_size=batch, seq_length=512, shuffle=False)
        by_rank = {n: [plan.batch(0, rank, n).micro_batches for rank in range(n)] for n in (2, 4)}
        images = {n: [any(m.pixel_values is not None for m in ms) for ms in found] for n, found in by_rank.items()}
        empty = [not any(m.samples for m in ms) for ms in by_rank[4]]
        assert sum(empty) == 4 - batch
        assert sum(images[4]) == rows[:batch].count("image")
        if batch == 4:
            assert sorted(images[2]) == [False, True]
