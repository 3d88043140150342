"""Every precision learns and goes on bit for bit; accuracy and exact answers are those that transformers' model gives."""

import dataclasses

import masters_jobs
import pytest
import runs
import samples
import torch
from pool import run
from transformers import Mistral3ForConditionalGeneration

from m3kernels.models.finetune.checkpoint import complete
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.sources import open_source

STEPS = 10
ROWS = ["image", "text", "image", "text"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = samples.write(tmp_path_factory.mktemp("data") / "train.jsonl", ROWS)
    return f"dataset.type=local dataset.train_data_path={path} dataset.valid_data_path={path}"


def config(checkpoint, folder, data, precision, steps=STEPS, name="straight", scheme="none", extra=""):
    options = (
        f"train.precision={precision} train.train_iters={steps} scheduler.lr_decay_iters={STEPS}",
        "scheduler.lr_decay_style=constant optimizer.adam_eps=1e-8 checkpoint.most_recent_k=0",
    )
    return dataclasses.replace(runs.config(checkpoint, folder, data, *options, extra, scheme=scheme), name=name)


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16_stochastic"])
@pytest.mark.parametrize("tp, ranks", [(1, 1), (2, 2), (1, 2)])
def test_fresh_adapters_change_nothing_in_bf16(checkpoint, tmp_path, data, precision, tp, ranks):
    """A magnitude and its norm of other dtypes would be apart by a rounding, in every row and every layer."""
    first = []
    for scheme in ("lora", "dora"):
        extra = f"model.tensor_model_parallel_size={tp} optimizer.lr=0"
        made = config(checkpoint, tmp_path, data, precision, 1, f"{scheme}", scheme, extra)
        first.append(run(ranks, runs.run, made)[0][0][0])
    assert first[0] == first[1]


@pytest.mark.parametrize(
    "precision, ranks, scheme",
    [
        ("fp32", 1, "none"),
        ("bf16_mixed", 1, "none"),
        ("bf16_mixed", 2, "none"),
        ("bf16_mixed", 1, "dora"),
        ("bf16_mixed", 2, "lora"),
        ("bf16_mixed", 2, "dora"),
        ("bf16_stochastic", 1, "none"),
        ("bf16_stochastic", 2, "none"),
    ],
)
def test_every_precision_learns_and_resumes_bit_for_bit(checkpoint, tmp_path, data, precision, ranks, scheme):
    def trained(steps: int, name: str) -> tuple[list[float], dict]:
        made = config(checkpoint, tmp_path, data, precision, steps, name, scheme)
        return run(ranks, runs.run, made)[0][0], runs.state(runs.folder_of(made))

    losses, state = trained(STEPS, "straight")
    assert losses[-1] < 0.7 * losses[0]
    stored = torch.bfloat16 if precision == "bf16_stochastic" else torch.float32
    assert {x.dtype for name, x in state.items() if name.startswith("weights.")} == {stored}
    assert {x.dtype for name, x in state.items() if name.startswith("exp_avg")} == {torch.float32}
    trained(STEPS // 2, "halves")
    again, again_state = trained(STEPS, "halves")
    assert again == losses and again_state.keys() == state.keys()
    assert all(torch.equal(again_state[name], x) for name, x in state.items())


def test_mixed_precision_is_as_near_to_fp32_on_any_number_of_ranks(checkpoint, tmp_path, data):
    """Ranks sum in another order: a part of bf16's rounding of 2**-9, which the losses' distance to fp32 shows to be there."""
    losses = {}
    for precision, ranks in (("fp32", 1), ("bf16_mixed", 1), ("bf16_mixed", 2)):
        made = config(checkpoint, tmp_path, data, precision, 1, f"{precision}-{ranks}")
        ((losses[precision, ranks],), _), *_ = run(ranks, runs.run, made)
    exact, one, two = losses.values()
    assert 0 < abs(one - exact) < 2**-7 * exact
    assert abs(one - two) < 2**-8 * exact


def test_accuracy_and_exact_answers_are_those_of_transformers(checkpoint, tmp_path, data):
    extra = "validation.eval_interval=4 validation.generate_samples=2 validation.max_new_tokens=8 optimizer.lr=3e-2"
    made = config(checkpoint, tmp_path, data, "fp32", 16, extra=extra)
    run(1, runs.run, made)
    rows = runs.rows(runs.folder_of(made))
    valid = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in valid] == [4, 8, 12, 16]
    found = by_hand(runs.folder_of(made) / "model", checkpoint, made)
    last = valid[-1]
    assert (last["valid_tokens"], last["valid_samples"]) == (found["tokens"], len(ROWS))
    assert last["valid_accuracy"] == pytest.approx(found["right"] / found["tokens"], abs=1e-9)
    assert last["valid_exact"] == pytest.approx(found["exact"] / len(ROWS), abs=1e-9)
    assert last["valid_loss"] == pytest.approx(found["loss"] / found["tokens"], rel=1e-4)
    # something to count
    assert 0.2 < last["valid_accuracy"]
    given = {row["sample"]: row for row in rows if "sample" in row and row["step"] == 16}
    assert len(given) == 2


@torch.no_grad()
def by_hand(folder, checkpoint, made) -> dict:
    """Counts over transformers' logits, a sample at a time."""
    model = Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    source, encoder = open_source(made.dataset, "valid", seed=0), Encoder.open(checkpoint)
    counts = {"tokens": 0, "right": 0, "exact": 0, "loss": 0.0}
    for i in range(len(source)):
        encoded = encoder.encode(source[i])
        ids = torch.from_numpy(encoded.tokens)[None]
        images = [torch.from_numpy(p)[None] for p in encoder.pixels(encoded)]
        extra = {"pixel_values": images[0], "image_sizes": torch.tensor(encoded.sizes)} if images else {}
        logits = model(input_ids=ids, **extra).logits[0, :-1]
        at = torch.from_numpy(encoded.supervised)[1:]
        right = (logits.argmax(-1) == ids[0, 1:])[at]
        counts["tokens"] += int(at.sum())
        counts["right"] += int(right.sum())
        counts["exact"] += bool(right.all())
        counts["loss"] += float(torch.nn.functional.cross_entropy(logits[at], ids[0, 1:][at], reduction="sum"))
    return counts


def test_the_best_checkpoint_is_kept(checkpoint, tmp_path, data):
    """With a learning rate that ruins the model after the first steps the best one is an early one."""
    extra = (
        "validation.eval_interval=1 validation.generate_samples=0 checkpoint.most_recent_k=1 optimizer.lr=0.5 "
        "scheduler.lr_warmup_iters=40"
    )
    made = config(checkpoint, tmp_path, data, "fp32", 16, extra=extra)
    run(1, runs.run, made)
    valid = {row["step"]: row["valid_loss"] for row in runs.rows(runs.folder_of(made)) if "valid_loss" in row}
    best = min(valid, key=valid.get)
    assert best < 16, valid
    assert list(complete(runs.checkpoints(made))) == [best, 16]
    assert runs.record(made)["best"] == {"step": best, "loss": valid[best]}


@pytest.mark.parametrize("tp, ranks", [(1, 1), (2, 2)])
@pytest.mark.parametrize("scheme", ["none", "lora"])
def test_weights_beside_masters_are_bf16_on_every_rank(checkpoint, tmp_path, data, tp, ranks, scheme):
    """A shard that stayed fp32 would train as well, in four times the time and twice the memory."""
    extra = f"model.tensor_model_parallel_size={tp}"
    made = config(checkpoint, tmp_path, data, "bf16_mixed", 2, scheme=scheme, extra=extra)
    for found in run(ranks, masters_jobs.dtypes, made):
        assert found["parameters"] == found["gradients"] == {torch.bfloat16}
        # for what is exported no more is rounded than must be
        assert found["masters"] == {torch.float32} and found["written back"] == {True}
        assert found["exported"] == {torch.float32}
