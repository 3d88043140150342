"""Documented defaults, and the command line that sets every field."""

import dataclasses
import inspect

import pytest

from m3kernels.models import recipes
from m3kernels.models.finetune.command import parse
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError, PeftConfig
from m3kernels.models.finetune.resolve import changes, check, folders
from m3kernels.models.finetune.schedule import learning_rate

# size -> (tensor parallel of a full run, of a PEFT run)
TP = {"3b": (1, 1), "8b": (2, 1), "14b": (4, 2)}


@pytest.mark.parametrize("size", TP)
@pytest.mark.parametrize("peft", ["lora", "dora", None])
def test_documented_defaults(size, peft):
    config = recipes.RECIPES[size](pretrained_checkpoint="x", peft=peft)
    assert config.optimizer.lr == (5e-6 if peft is None else 1e-4) and config.optimizer.min_lr == 0
    assert config.model.tensor_model_parallel_size == TP[size][peft is not None]
    assert config.peft.scheme == (peft or "none")
    if peft:
        assert (config.peft.dim, config.peft.alpha) == (32, 64 if peft == "dora" else 32)
    train, scheduler, optimizer = config.train, config.scheduler, config.optimizer
    assert (train.train_iters, train.global_batch_size, train.micro_batch_size) == (1000, 32, 1)
    assert (scheduler.lr_warmup_iters, scheduler.lr_decay_style) == (50, "cosine")
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.clip_grad, optimizer.adam_eps) == (
        0.9,
        0.95,
        1.0,
        1e-8,
    )
    assert (config.dataset.seq_length, config.dataset.type, config.rng.seed) == (4096, "mock", 1234)
    assert (config.validation.eval_interval, config.validation.eval_iters, config.checkpoint.save_interval) == (
        30,
        32,
        50,
    )
    check(config, config.model.tensor_model_parallel_size)


def test_documented_arguments(capsys):
    config = recipes.ministral3_8b_finetune_config(
        name="run", dir="/runs", hf_path="tok", pretrained_checkpoint="native/8b", dataset_type="hf", peft="dora",
        train_iters=7, global_batch_size=4, micro_batch_size=2, freeze_language_model=True, freeze_vision_model=False,
        freeze_vision_projection=False, seq_length=128, tensor_model_parallel_size=4, pipeline_model_parallel_size=1,
        pipeline_dtype="bf16", context_parallel_size=1, sequence_parallel=True, finetune_lr=3e-4, min_lr=1e-5,
        lr_warmup_iters=2, lr_decay_iters=6, eval_interval=3, save_interval=4, wandb_project="p",
    )  # fmt: skip
    assert config.dataset.maker_name == ("make_cord_v2_dataset",)
    assert (config.checkpoint.pretrained_checkpoint, config.dataset.tokenizer) == ("native/8b", "tok")
    assert (config.optimizer.lr, config.model.tensor_model_parallel_size, config.logger.wandb_project) == (3e-4, 4, "p")
    assert folders(config).checkpoints.as_posix() == "/runs/run/checkpoints"
    said = capsys.readouterr().err
    assert "pipeline_dtype has no effect" in said and "sequence_parallel" in said
    with pytest.raises(TypeError, match="train_iter"):
        recipes.ministral3_3b_finetune_config(train_iter=3)
    with pytest.raises(FinetuneError, match="allowed: 'lora', 'dora', None"):
        recipes.ministral3_3b_finetune_config(peft="qlora")
    assert recipes.ministral3_3b_finetune_config(peft=PeftConfig(dim=4)).peft.dim == 4


def test_save_dir_of_the_environment(monkeypatch):
    monkeypatch.setenv("SAVE_DIR", "/from/env")
    assert folders(FinetuneConfig(name="a")).run.as_posix() == "/from/env/a"
    assert folders(FinetuneConfig(name="a", dir="/d")).run.as_posix() == "/d/a"


COMMAND = (
    "--pretrained-checkpoint X --dataset-type hf --peft-scheme lora --no-freeze-vision-projection --freeze-vision-model "
    "dataset.maker_name=make_cord_v2_dataset,make_rdr_dataset dataset.weights=[2,1] train.global_batch_size=8 "
    "+train.train_iters=3 --optimizer.lr 2e-4 checkpoint.async_save=true scheduler.lr_decay_iters=null --dry-run"
)


def test_command_line():
    command = parse(["8b", *COMMAND.split()])
    config = command.config
    assert command.dry_run and config.size == "8b" and config.checkpoint.pretrained_checkpoint == "X"
    assert config.dataset.maker_name == ("make_cord_v2_dataset", "make_rdr_dataset")
    assert config.dataset.weights == (2.0, 1.0) and config.dataset.type == "hf"
    model = config.model
    assert (model.freeze_vision_model, model.freeze_vision_projection, model.freeze_language_model) == (
        True,
        False,
        None,
    )
    assert (config.train.global_batch_size, config.train.train_iters, config.optimizer.lr) == (8, 3, 2e-4)
    assert config.checkpoint.async_save is True and config.scheduler.lr_decay_iters is None


@pytest.mark.parametrize("scheme, lr, alpha", [("none", 5e-6, 32), ("lora", 1e-4, 32), ("dora", 1e-4, 64)])
@pytest.mark.parametrize(
    "spelling", ["--peft-scheme {}", "--peft-scheme={}", "peft.scheme={}", "--peft.scheme {}", "--peft.scheme={}"]
)
def test_defaults_follow_the_scheme(scheme, lr, alpha, spelling):
    config = parse(["3b", *spelling.format(scheme).split()]).config
    assert (config.peft.scheme, config.optimizer.lr, config.peft.alpha) == (scheme, lr, alpha)


def test_none_is_no_value_only_where_a_field_may_have_none():
    config = parse("3b train.recompute=none scheduler.lr_decay_iters=none name=none --dataset.type hf".split()).config
    assert (config.train.recompute, config.scheduler.lr_decay_iters, config.name) == ("none", None, "none")
    assert config.dataset.maker_name == ("make_cord_v2_dataset",)


@pytest.mark.parametrize("recipe", ["14b", "--recipe 14b", "--recipe=ministral3_14b_finetune_config"])
def test_recipes_by_name(recipe):
    assert parse(recipe.split()).config.size == "14b"


def test_misspelt_options_get_a_hint(capsys):
    with pytest.raises(SystemExit):
        parse(["3b", "train.train_iter=3"])
    assert "--train.train-iters" in capsys.readouterr().err
    with pytest.raises(FinetuneError, match="did you mean --pretrained-checkpoint"):
        parse(["3b", "--pretraned-checkpoint", "X"])
    with pytest.raises(FinetuneError, match="allowed: 3b, 8b, 14b"):
        parse(["7b"])


def test_help_names_fields_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["14b", "--peft-scheme", "none", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--train.train-iters" in said and "5e-06" in said and "Defaults of the 14b recipe" in said


@pytest.mark.parametrize(
    "change, ranks, message",
    [
        ("model.pipeline_model_parallel_size=2", 2, "pipeline_model_parallel_size is 2; allowed: 1"),
        ("model.tensor_model_parallel_size=2", 3, "3 processes do not divide"),
        ("train.recompute=some", 1, "allowed: auto, none, cheap"),
        ("peft.dropout=1.0", 1, "from 0 to below 1"),
        ("optimizer.min_lr=1", 1, "above optimizer.lr"),
        ("dataset.type=local", 1, "needs dataset.train_data_path"),
        ("dataset.maker_name=make_rdr_dataset", 1, "dataset.type is mock"),
        ("train.global_batch_size=0", 1, "allowed: from 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, ranks, message):
    with pytest.raises(FinetuneError, match=message):
        check(parse(["3b", change]).config, ranks)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision_config": "fp16"}, "train.precision is 'fp16'; allowed: bf16_mixed"),
        ({"finetune_lr": "1e-4"}, "optimizer.lr is '1e-4'; it must be of type float"),
        ({"train_iters": True}, "train.train_iters is True; it must be of type int"),
        ({"train_iters": 1.5}, "train.train_iters is 1.5"),
        ({"dataset_type": "huggingface"}, "dataset.type is 'huggingface'; allowed: mock"),
        ({"peft": PeftConfig(target_modules="q_proj")}, "peft.target_modules is 'q_proj'"),
    ],
)
def test_values_of_another_kind_are_refused(options, message):
    with pytest.raises(FinetuneError, match=message):
        check(recipes.ministral3_3b_finetune_config(**options), 1)


def test_recipes_tell_their_arguments():
    assert "train_iters" in inspect.signature(recipes.ministral3_8b_finetune_config).parameters


def test_schedule():
    config = parse(
        "3b optimizer.lr=1 optimizer.min_lr=0.2 scheduler.lr_warmup_iters=4 train.train_iters=12".split()
    ).config
    rates = [learning_rate(config, step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.6) and rates[12:] == [0.2, 0.2]
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))
    constant = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, lr_decay_style="constant"))
    assert learning_rate(constant, 11) == 1


def test_changes_since_a_checkpoint():
    old = parse(["3b"]).config
    new = parse("3b train.train_iters=5 dataset.maker_name=a".split()).config
    assert changes(old.to_dict(), old) == []
    assert [line.split(":")[0] for line in changes(old.to_dict(), new)] == ["dataset.maker_name", "train.train_iters"]
