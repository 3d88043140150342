"""The native model in code written for transformers: Trainer, PEFT, what is read from configs, names of arguments."""

import copy
import dataclasses
import pickle

import pytest
import torch
from native import kept, like, seen, trained, twins

import m3kernels
from models import FP32, FP64, VOCAB, assert_same, batch_for, distance, float64_islands, inputs, text_batch

PATCHED = pytest.mark.parametrize("patched", [False, True], ids=["eager", "patched"])


def pair(kind: str = "text", patched: bool = False, **options):
    """(Hugging Face's, native), in training mode."""
    hf, ours = twins(kind, **options)
    if patched:
        m3kernels.patch(ours)
    return hf.train(), ours.train()


@PATCHED
def test_trainer(patched, tmp_path):
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(11, VOCAB, (8, 9), generator=generator)
    # rows of few labels and of many: a mean of means would be another loss
    data = [{"input_ids": row, "labels": row.where(torch.arange(9) >= 8 - i, -100)} for i, row in enumerate(rows)]
    found = []
    for model in pair("text", patched):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
        quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(tmp_path, **options, **quiet, gradient_checkpointing=True, learning_rate=1e-3)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        loss = trainer.train().training_loss
        assert model.is_gradient_checkpointing
        evaluated = trainer.evaluate()
        found.append({"loss": torch.tensor(loss), "eval_loss": torch.tensor(evaluated["eval_loss"])})
    assert_same(found[1], found[0], 1e-4)


READ = {
    "model_type": "mistral3",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "image_token_id": 10,
    "image_token_index": 10,
    "spatial_merge_size": 2,
    "use_cache": False,
    "text_config.vocab_size": VOCAB,
    "vision_config.patch_size": 4,
    "get_text_config().num_key_value_heads": 2,
}


def test_what_is_read_from_a_config():
    hf, ours = pair("vlm")
    for config in (ours.config, copy.deepcopy(ours.config), pickle.loads(pickle.dumps(ours.config))):
        for name, value in READ.items():
            assert eval(f"config.{name}", {"config": config}) == value, name
    assert ours.config.to_dict()["model_type"] == "mistral3" and "vocab_size" in ours.config.to_json_string()
    assert config == ours.config
    config.use_cache = config.text_config.use_cache = False
    config.get_text_config().pad_token_id = 5
    with pytest.raises(dataclasses.FrozenInstanceError, match="dataclasses.replace"):
        config.tied = True
    alone = pair("text")[1].config
    assert alone.model_type == "ministral3"
    assert not any(hasattr(alone, name) for name in ("text_config", "vision_config", "image_token_id", "layer_types"))


@PATCHED
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "k_proj", "up_proj"]},
        {"target_modules": ["v_proj", "o_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["gate_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [10, 12]},
    ],
    ids=["lora", "dora", "head", "embedding", "saved", "tokens"],
)
def test_adapters_train_alike_and_load_in_hugging_face(options, patched, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    with float64_islands():
        hf, ours = pair("vlm", dtype=torch.float64)
        wrapped = get_peft_model(ours, LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **options))
        if patched:
            m3kernels.patch(wrapped)
        wrapped.double().save_pretrained(tmp_path)
        theirs = PeftModel.from_pretrained(hf, tmp_path, is_trainable=True).double()
        batch = batch_for(hf)
        want = trained(theirs.train(), batch)
        assert_same(trained(wrapped, batch), want, FP64)
        assert any("model.language_model" in name for name in want)
        with torch.no_grad():
            merged, whole = (model.eval().merge_and_unload() for model in (wrapped, theirs))
        assert_same(seen(merged, batch), seen(whole, batch), FP64)


def test_embeddings_instead_of_ids():
    hf, ours = pair("text", dtype=torch.float64)
    batch = text_batch(hf, batch=3, padding="left")
    mask = batch["attention_mask"]
    found = []
    for model in (ours.eval(), hf.eval()):
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()]
        (grad,) = torch.autograd.grad(logits.square().sum(), embeds)
        found.append({"logits": logits.detach(), "grad": grad[mask.bool()]})
    assert_same(*found, FP64)
    with torch.no_grad():
        packed = ours(inputs_embeds=embeds[0], cu_seqlens=[0, 8, 21]).logits
        assert distance(packed, ours(batch["input_ids"][0], cu_seqlens=[0, 8, 21]).logits) <= FP64


def test_names_of_arguments():
    hf, ours = pair("text")
    batch = text_batch(hf)
    want = seen(ours, batch)["logits"]
    nothing = dict.fromkeys(("output_attentions", "output_hidden_states", "past_key_values", "cache_position"))
    for options in (nothing, {"use_cache": None}, {"return_dict": None}, {"token_type_ids": torch.zeros(2, 21)}):
        assert distance(seen(ours, batch, **options)["logits"], want) == 0
    rows, positions = batch["input_ids"].view(1, -1), torch.arange(21).repeat(2)[None]
    bounds = torch.tensor([0, 21, 42], dtype=torch.int32)
    collated = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 21, "max_length_k": 21}
    packed = ours(rows, position_ids=positions, **collated).logits.view(want.shape)
    assert distance(packed, want) <= FP32
    ours.eval()
    out = ours(batch["input_ids"][:, :15], use_cache=True)
    rest = ours(batch["input_ids"][:, 15:], past_key_values=out.past_key_values).logits
    assert distance(rest, want.view(2, 21, -1)[:, 15:]) <= FP32


def test_options_that_are_not_there_are_refused():
    from transformers import DynamicCache

    ours = pair("text")[1].eval()
    ids = text_batch(ours)["input_ids"]
    for error, match, options in (
        (TypeError, "takes no atention_mask; options: past_key_values", {"atention_mask": None}),
        (ValueError, "output_hidden_states=True", {"output_hidden_states": True}),
        (ValueError, "is a DynamicCache; allowed", {"past_key_values": DynamicCache()}),
        (ValueError, "either input_ids or inputs_embeds", {"inputs_embeds": torch.zeros(2, 21, 48)}),
        (ValueError, "is 0 everywhere", {"attention_mask": torch.zeros_like(ids)}),
    ):
        with pytest.raises(error, match=match):
            ours(ids, **options)
    with pytest.raises(ValueError, match="set_recompute"):
        ours.activation_checkpointing_enable(offload=True)


def test_a_cached_forward_gives_no_gradient_that_would_lack_keys_and_values():
    _, ours = pair("text")
    batch = text_batch(ours)
    assert not ours.eval()(**batch, use_cache=True).loss.requires_grad


def test_positions_that_jump_beside_a_cache_are_one_sequence():
    hf, ours = pair("text")
    ids = text_batch(hf)["input_ids"]
    batch = {"input_ids": ids, "position_ids": torch.cat([torch.arange(9), torch.arange(4, 16)])[None].expand(2, -1)}
    assert_same(seen(ours.eval(), batch, use_cache=True), seen(hf.eval(), batch, use_cache=True), FP32)


def test_what_asks_for_logits_in_training_gets_them():
    _, ours = pair("text", patched=True)
    batch = text_batch(ours)
    assert ours(**batch).logits is None
    assert len(ours(**batch, return_dict=False)) == 2
    assert ours(**batch, logits_to_keep=3).logits.shape == (2, 3, VOCAB)


@PATCHED
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_head_is_called_as_often_as_it_has_to_be(patched, training):
    _, ours = pair("text", patched=patched)
    calls = []
    ours.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ours.train(training)(**text_batch(ours))
    assert len(calls) == (2 if patched and not training else 1)


def test_gradients_reach_embeddings_that_are_frozen():
    _, ours = pair("text")
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    assert ours(**text_batch(ours)).logits.requires_grad
    ours.disable_input_require_grads()
    assert not ours(**text_batch(ours)).logits.requires_grad


@PATCHED
def test_accelerate_in_bfloat16(patched):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    hf, ours = pair("vlm", patched)
    batch, losses = batch_for(hf), []
    truth = like(hf).double()(**batch).loss.item()
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        for model in (hf, ours):
            out = accelerator.prepare(model)(**inputs(batch), labels=batch["labels"], skip_logits=False)
            accelerator.backward(out.loss)
            assert out.logits.dtype == torch.float32 and kept(batch).shape == out.logits.shape[:2]
            losses.append(out.loss.item())
    finally:
        AcceleratorState._reset_state(True)
    assert abs(losses[1] - truth) <= 2 * abs(losses[0] - truth) + 1e-3
