"""What a finished run writes, read back by transformers and PEFT; what it prints before it begins."""

import pytest
import runs
import torch
from data_files import write_lines
from peft import PeftModel
from pool import run
from safetensors.torch import load_file, save_file
from transformers import Mistral3ForConditionalGeneration

from m3kernels.models.finetune import results
from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.trainer import finetune
from m3kernels.models.ministral3.files import CheckpointError
from models import distance


def logits(model) -> torch.Tensor:
    ids = torch.arange(1010, 1040)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def read(folder):
    return Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("scheme", ["lora", "dora"])
@pytest.mark.parametrize("tp", [1, 2])
def test_adapter_and_merged_model_in_other_libraries(checkpoint, tmp_path, scheme, tp):
    options = f"train.precision=fp32 checkpoint.merge_adapter=True model.tensor_model_parallel_size={tp}"
    made = runs.config(checkpoint, tmp_path, options, scheme=scheme)
    run(tp, runs.run, made, timeout_s=300)
    folder = tmp_path / made.name
    base = logits(read(checkpoint))
    adapted = logits(PeftModel.from_pretrained(read(checkpoint), folder / "adapter").eval())
    assert distance(adapted, base) > 1e-2
    assert distance(logits(read(folder / "merged")), adapted) < 1e-5
    # an adapter that stands on the merged model counts twice
    twice = logits(PeftModel.from_pretrained(read(folder / "merged"), folder / "adapter").eval())
    assert distance(twice, adapted) > 1e-3


def test_merged_weights_are_verified(checkpoint, tmp_path, monkeypatch):
    original = results.Ministral3.save_pretrained

    def spoilt(self, folder, **options):
        original(self, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        name = next(n for n in tensors if "layers.1" in n and n.endswith("down_proj.weight") and "language" in n)
        tensors[name] = tensors[name].roll(1, 0)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(results.Ministral3, "save_pretrained", spoilt)
    made = runs.config(checkpoint, tmp_path, "train.train_iters=1 checkpoint.merge_adapter=True", scheme="lora")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj \(relative error"):
        finetune(made)


def test_a_dry_run_says_all_and_writes_nothing(checkpoint, tmp_path, capsys):
    made = runs.config(checkpoint, tmp_path, "model.tensor_model_parallel_size=4", scheme="dora")
    assert finetune(made, dry_run=True) is None
    said = capsys.readouterr().out
    assert '"train_iters": 4' in said and "4 ranks = data parallel 1 x tensor parallel 4" in said
    assert "250 steps an epoch, 4 steps = 0.02 epochs" in said and "memory a rank, estimated" in said
    (line,) = [line.split() for line in said.splitlines() if line.startswith("language_model")]
    assert int(line[2].replace(",", "")) == int(line[3].replace(",", "")) > 0
    assert [p.name for p in tmp_path.iterdir()] == []
    with pytest.raises(ValueError, match="tp=3 does not divide the 4 key-value heads"):
        finetune(runs.config(checkpoint, tmp_path, "model.tensor_model_parallel_size=3"), dry_run=True)


def test_a_run_says_which_maker_has_no_validation_split(checkpoint, tmp_path, capsys):
    row = {"image": "a.png", "ground_truth": "{}"}
    for name in ("both/train", "both/validation", "one/train"):
        write_lines(tmp_path / f"{name}.jsonl", [row])
    sets = f"dataset.type=hf dataset.maker_name=cord_v2,cord_v2 dataset.path={tmp_path}/both,{tmp_path}/one"
    for interval, times in ((2, 1), (0, 0)):
        made = runs.config(checkpoint, tmp_path, sets, f"validation.eval_interval={interval}")
        finetune(made, dry_run=True)
        said = capsys.readouterr().out
        assert said.count(f"note: cord_v2 is not in the validation set: {tmp_path}/one has no split") == times
        assert "no validation set" not in said


def test_weights_and_biases(checkpoint, tmp_path, monkeypatch):
    """With a stand-in for the library, which is not installed."""
    import sys
    import types

    logged, asked = [], {}
    made_run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    stand_in = types.SimpleNamespace(init=lambda **options: asked.update(options) or made_run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    runs.run(runs.config(checkpoint, tmp_path, "logger.wandb_project=p logger.wandb_exp_name=e train.train_iters=2"))
    assert (asked["project"], asked["name"]) == ("p", "e")
    assert [step for step, values in logged if "loss" in values] == [1, 2]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FinetuneError, match="needs wandb: pip install it"):
        finetune(runs.config(checkpoint, tmp_path, "logger.wandb_project=p"), dry_run=True)


def test_a_run_that_is_over_says_so(checkpoint, tmp_path, capsys):
    made = runs.config(checkpoint, tmp_path, "train.train_iters=1")
    runs.run(made)
    before = runs.state(tmp_path / made.name)
    capsys.readouterr()
    finetune(made)
    assert "1 steps are over already" in capsys.readouterr().out
    assert all(torch.equal(before[name], x) for name, x in runs.state(tmp_path / made.name).items())
