"""Trainers on patched models: HF Trainer, TRL's SFTTrainer and accelerate train as they do without the patch."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import m3kernels
from m3kernels import is_patched, patch, unpatch
from models import FP32, IMAGES, assert_parity, assert_same, batch_for, build, text_batch, vlm_batch

EXAMPLES = Path(__file__).parents[1] / "examples"
# SGD makes rounding grow slowly over a few steps; Adam would divide tiny gradients by themselves
STEPS = {
    "max_steps": 4,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
}
LOSSES = 10 * FP32


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its mixed precision for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(model, count: int = 12) -> list[dict]:
    batch = text_batch(model, batch=count)
    return [{k: v[i].tolist() for k, v in batch.items()} for i in range(count)]


def arguments(tmp_path, cls=TrainingArguments, **changes):
    return cls(
        output_dir=str(tmp_path), **{**STEPS, "report_to": [], "use_cpu": not torch.cuda.is_available(), **changes}
    )


def history(trainer, *keys: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]


def train(model, tmp_path, callbacks=(), compute_metrics=None, **changes):
    data = rows(model)
    options = {"train_dataset": data, "eval_dataset": data[:5], "callbacks": list(callbacks)}
    trainer = Trainer(model=model, args=arguments(tmp_path, **changes), compute_metrics=compute_metrics, **options)
    trainer.train()
    return trainer


def count_fused(monkeypatch) -> list:
    calls, real = [], m3kernels.ops.linear_cross_entropy
    monkeypatch.setattr(
        "m3kernels.patching.loss.linear_cross_entropy", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    return calls


def accuracy(prediction) -> dict:
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape, "eval did not return logits"
    guess, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    return {"accuracy": float((guess == labels)[labels != -100].mean()), "logits": float(prediction.predictions.std())}


TRAINER = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "compute_metrics": accuracy},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "clipping": {"max_grad_norm": 0.5},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1},
}


@pytest.mark.parametrize("name", TRAINER)
def test_trainer(name, tmp_path, monkeypatch):
    plain = build()
    ours = copy.deepcopy(plain)
    patch(ours)
    options = TRAINER[name]
    reference = train(plain, tmp_path, **options)
    calls = count_fused(monkeypatch)
    trainer = train(ours, tmp_path, **options)
    keys = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_logits")
    assert len(history(trainer, "loss")) == options.get("max_steps", STEPS["max_steps"])
    assert history(trainer, *keys) == pytest.approx(history(reference, *keys), rel=LOSSES)
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), LOSSES)
    assert name == "compiled" or history(trainer, "loss")[-1] < history(trainer, "loss")[0]
    if name == "evaluation":
        assert len(history(trainer, "eval_accuracy")) == 2
    # smoothing takes logits and computes the loss outside the model
    forwards = options.get("max_steps", 4) * options.get("gradient_accumulation_steps", 1)
    assert name == "compiled" or len(calls) == (0 if name == "label smoothing" else forwards)


@pytest.mark.parametrize("order", ["before", "in a callback"])
def test_trainer_in_bf16(order, tmp_path, monkeypatch):
    """accelerate wraps ``model.forward`` for autocast, and leaves it wrapped: patching and unpatching must survive that."""

    class Patch(TrainerCallback):
        def on_train_begin(self, *_, model=None, **__):
            self.report = patch(model)

    plain = build()
    ours, callback = copy.deepcopy(plain), Patch()
    if order == "before":
        patch(ours)
    reference = train(plain, tmp_path, bf16=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    calls = count_fused(monkeypatch)
    trainer = train(ours, tmp_path, bf16=True, callbacks=[callback] if order != "before" else [])
    # bf16 rounds logits at 2^-9; a loss of about 5 is a mean over 60 of them, so chance takes most of that back
    assert history(trainer, "loss") == pytest.approx(history(reference, "loss"), rel=2**-9)
    assert len(calls) == (4 if order == "before" else 0)
    if order != "before":
        assert callback.report.patched["linear_cross_entropy"] == 0, "counted, but the wrapped forward is the old one"
    unpatch(ours)
    assert not is_patched(ours)
    assert torch.isfinite(ours(**text_batch(ours)).loss)


def test_trainer_saves_and_resumes(tmp_path):
    plain = build()
    ours = copy.deepcopy(plain)
    patch(ours)
    trainer = train(ours, tmp_path, save_strategy="steps", save_steps=2)
    again = copy.deepcopy(plain)
    patch(again)
    options = {"args": arguments(tmp_path, save_strategy="steps", save_steps=2), "train_dataset": rows(plain)}
    resumed = Trainer(model=again, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, "loss") == pytest.approx(history(trainer, "loss"), rel=LOSSES)
    loaded = type(plain).from_pretrained(tmp_path / "checkpoint-4").to(ours.device)
    assert_parity(loaded, ours, text_batch(loaded))


def test_trainer_on_images(tmp_path):
    """A collator of one's own, several images a sample, and the vision tower in training."""
    plain = build("vlm")
    ours = copy.deepcopy(plain)
    patch(ours)

    def collate(samples):
        return {k: v.cpu() for k, v in vlm_batch(plain, [s["images"] for s in samples], seed=len(samples)).items()}

    losses = []
    for model in (plain, ours):
        args = arguments(tmp_path, remove_unused_columns=False, per_device_train_batch_size=2, learning_rate=0.01)
        trainer = Trainer(
            model=model, args=args, train_dataset=[{"images": images} for images in IMAGES * 4], data_collator=collate
        )
        trainer.train()
        losses.append(history(trainer, "loss", "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=LOSSES)
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), LOSSES)


@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_accelerate(kind, monkeypatch):
    plain = build(kind)
    ours = copy.deepcopy(plain)
    patch(ours)
    calls, losses = count_fused(monkeypatch), []
    for model in (plain, ours):
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.02))
        wrapped.train()
        for seed in range(4):
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch_for(model, seed=seed)).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert accelerator.unwrap_model(wrapped) is model
    assert losses[4:] == pytest.approx(losses[:4], rel=LOSSES) and len(calls) == 4
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), LOSSES)
    unpatch(ours)
    assert_parity(ours, plain, batch_for(plain), 10 * LOSSES)


# --- TRL


@pytest.fixture(scope="module")
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


def chats() -> Dataset:
    def turns(i: int) -> list[dict]:
        return [{"role": "user", "content": "say " * (i % 3 + 1)}, {"role": "assistant", "content": f"{i} times"}]

    return Dataset.from_dict({"messages": [turns(i) for i in range(16)]})


SFT = {
    "plain": {},
    "packed": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "dft": {"loss_type": "dft"},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
    "lora with head": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", SFT)
def test_sft_trainer(name, order, tmp_path, examples):
    """SFTTrainer replaces the model's forward with a chunked loss of its own: the layers below it are ours."""
    options = copy.deepcopy(SFT[name])
    peft_config = options.pop("peft_config", None)
    tokenizer = examples("tiny").tiny_tokenizer()
    plain = build(vocab_size=len(tokenizer))
    ours = copy.deepcopy(plain)
    if order == "before":
        patch(ours)
    logs = []
    for model in (plain, ours):
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model=model,
            args=arguments(tmp_path, SFTConfig, max_length=48, per_device_train_batch_size=4, bf16=False, **options),
            train_dataset=chats(),
            eval_dataset=chats().select(range(4)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        if model is ours and order == "after":
            assert patch(trainer.model).patched["swiglu"] == 2
        trainer.train()
        logs.append(history(trainer, "loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss"))
    assert len(logs[0]) >= 12 and logs[1] == pytest.approx(logs[0], rel=LOSSES)
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), LOSSES)
    base = unpatch(trainer.model)
    assert torch.isfinite(base(**text_batch(plain)).loss)


@pytest.mark.parametrize("name, flags", [("trainer", []), ("sft_trl", []), ("sft_trl", ["--packing"])])
def test_examples(name, flags, examples, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main = examples(name).main
    ours = main(["--steps", "3", *flags])
    assert "rms_norm" in capsys.readouterr().out
    plain = main(["--steps", "3", "--no-patch", *flags])
    # Adam, three steps: a gradient near zero may turn its sign by rounding, and moves a weight by the whole step
    assert len(ours) == 3 and ours == pytest.approx(plain, rel=1e-4)
    assert ours[-1] < ours[0]
