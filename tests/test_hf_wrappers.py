"""Offloading, DDP, FSDP2, meta tensors, autocast, retained graphs: a patched model does what its unpatched twin does."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Ministral3ForCausalLM

from m3kernels import is_patched, patch, patched, unpatch
from models import (
    FP32,
    assert_both,
    assert_error_at_most_eagers,
    assert_parity,
    assert_same,
    batch_for,
    build,
    gradients,
    inputs,
    observe,
    tensors,
    text_batch,
    twins,
)


def cpu_mesh():
    """Without one, fully_shard takes the GPU where there is one; these models are on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_offload(order, kind):
    from accelerate import cpu_offload

    plain = build(kind)
    ours = copy.deepcopy(plain)
    if order == "before":
        patch(ours)
    cpu_offload(ours, execution_device="cpu")
    if order == "after":
        patch(ours)
    batch = batch_for(plain)
    ours.train(), plain.train()
    with torch.no_grad():
        assert_same({"loss": ours(**batch).loss}, {"loss": plain(**batch).loss}, FP32)
        ours.eval(), plain.eval()
        assert_both(ours, plain, lambda model: model(**batch))


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_hooks_and_their_removal(order, text_pair):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    plain, ours = text_pair
    unpatch(ours)
    if order == "before":
        patch(ours)
    for module in [*ours.modules()]:
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    report = patch(ours)
    batch = text_batch(plain)
    assert_parity(ours, plain, batch)
    if order == "after":
        assert not any(n for op, n in report.patched.items() if op != "attention"), (
            f"hooked forwards are the old ones, the report says otherwise\n{report}"
        )
    remove_hook_from_submodules(ours)
    assert_parity(ours, plain, batch)
    unpatch(ours)
    assert_parity(ours, plain, batch, 0.0)


def test_unpatch_under_wrapped_forwards(text_pair):
    """Trainer and accelerate keep a bound forward (autocast, TRL's head): it must survive ``unpatch``."""
    plain, ours = text_pair
    for name in (
        "model.norm",
        "lm_head",
        "model.layers.0",
        "model.layers.0.self_attn",
        "model.layers.1.mlp",
        "model.rotary_emb",
    ):
        module = ours.get_submodule(name)
        module.forward = lambda *a, bound=module.forward, **k: bound(*a, **k)
    ours.forward = lambda *a, bound=ours.forward, **k: bound(*a, **k)
    unpatch(ours)
    assert_parity(ours, plain, text_batch(plain), 0.0)


@pytest.mark.interpreter
def test_ddp(process_group):
    plain, ours = twins()
    batch = text_batch(plain)
    reference = observe(plain, batch)
    wrapped = nn.parallel.DistributedDataParallel(ours)
    wrapped.train()
    wrapped(**batch).loss.backward()
    assert_same(gradients(ours), {k: v for k, v in reference.items() if k.startswith("grad")}, FP32)
    other = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    assert patch(other).architecture == "Ministral3ForCausalLM" and is_patched(other)
    other.train()
    other(**batch).loss.backward()
    assert_same(gradients(other.module), {k: v for k, v in reference.items() if k.startswith("grad")}, FP32)


@pytest.mark.parametrize("head_alone", [False, True], ids=["head with the root", "head alone"])
def test_fsdp2(process_group, head_alone, kind):
    from torch.distributed.fsdp import fully_shard

    plain, ours = twins(kind)
    batch = batch_for(plain)
    for module in ours.modules():
        if type(module).__name__ in ("Ministral3DecoderLayer", "PixtralAttentionLayer"):
            fully_shard(module, mesh=cpu_mesh())
    if head_alone:
        fully_shard(ours.lm_head, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    ours.train()
    loss = ours(**batch)
    assert loss.logits is None
    loss.loss.backward()
    reference = observe(plain, batch)
    got = {"loss": loss.loss.detach()} | {k: v.full_tensor() for k, v in gradients(ours).items()}
    assert_same(got, {k: v for k, v in reference.items() if k == "loss" or k.startswith("grad")}, FP32)
    ours.eval()
    with torch.no_grad():
        assert_same({"logits": ours(**inputs(batch)).logits}, {"logits": reference["logits"]}, FP32)
    with pytest.raises(RuntimeError, match="fully_shard"):
        unpatch(ours)
    assert is_patched(ours)


def test_fsdp2_head_with_a_hook(process_group):
    """A user's hook on a sharded head expects logits."""
    from torch.distributed.fsdp import fully_shard

    plain, ours = twins()
    fully_shard(ours.lm_head, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    shapes = []
    ours.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    ours.train()
    ours(**text_batch(plain)).loss.backward()
    assert shapes == [(2, 21, 151)]


def test_patch_after_fsdp2_is_reported(process_group):
    from torch.distributed.fsdp import fully_shard

    plain = build()
    ours = copy.deepcopy(plain)
    for layer in ours.model.layers:
        fully_shard(layer, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    report = patch(ours)
    assert any("patch before" in skip.reason for skip in report.skipped)
    batch = text_batch(plain)
    ours.train(), plain.train()
    assert_same({"loss": ours(**batch).loss}, {"loss": plain(**batch).loss}, FP32)


def _two_ranks(rank: int, folder: str) -> None:
    """FSDP2 over two ranks with a row of the batch each, then transformers' tensor parallelism; run in its own process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain, ours = twins(vocab_size=152)
    batch = text_batch(plain)
    mine = {k: v[rank : rank + 1] for k, v in batch.items()}
    for layer in ours.model.layers:
        fully_shard(layer, mesh=cpu_mesh())
    fully_shard(ours, mesh=cpu_mesh())
    ours.train()
    ours(**mine).loss.backward()
    for row in range(2):
        (plain(**{k: v[row : row + 1] for k, v in batch.items()}).loss / 2).backward()
    assert_same({k: v.full_tensor() for k, v in gradients(ours).items()}, gradients(plain), FP32)

    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2)
    sharded = Ministral3ForCausalLM.from_pretrained(f"{folder}/model", distributed_config=config).train()
    patch(sharded)
    loss = sharded(**batch).loss
    loss.backward()
    plain.zero_grad()
    reference = plain(**batch)
    reference.loss.backward()
    local = {"loss": loss, "norm": sharded.model.norm.weight.grad}
    if hasattr(local["norm"], "full_tensor"):
        local["norm"] = local["norm"].full_tensor()
    assert_same(tensors(local), tensors({"loss": reference.loss, "norm": plain.model.norm.weight.grad}), FP32)
    dist.destroy_process_group()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="transformers' tensor parallelism takes the GPU where there is one"
)
@pytest.mark.slow
def test_two_ranks(tmp_path):
    build(vocab_size=152).save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path),), nprocs=2)


def test_meta_device(kind):
    from transformers import AutoModelForImageTextToText

    from models import text_config, vlm_config

    with torch.device("meta"):
        auto, config = (
            (AutoModelForCausalLM, text_config()) if kind == "text" else (AutoModelForImageTextToText, vlm_config())
        )
        ours = auto.from_config(config)
    report = patch(ours)
    assert report.patched["rms_norm"] and report.backend["rms_norm"] == "decided when weights are loaded"
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    assert ours(ids).logits.shape == (2, 7, 151)
    # filled with weights after patching, as large models are loaded
    filled = build(kind)
    ours.load_state_dict(filled.state_dict(), assign=True)
    rotary = {n: b for n, b in filled.named_buffers()}
    for name, _ in list(ours.named_buffers()):
        module, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(module), leaf, rotary[name])
    assert_parity(ours.eval(), filled, batch_for(filled))


def test_meta_device_with_labels():
    """Memory and FLOP estimators run a training step on meta tensors."""
    from models import text_config

    with torch.device("meta"):
        ours = Ministral3ForCausalLM(text_config())
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    ours.train()
    assert ours(ids, labels=ids).loss.shape == ()
    patch(ours)
    loss = ours(ids, labels=ids).loss
    loss.backward()
    assert loss.shape == () and ours.lm_head.weight.grad.shape == (151, 48)


def test_autocast(kind, device):
    """bf16 autocast over fp32 weights, held to the rule for bf16 models."""
    plain, ours = twins(kind, device=device)
    assert_error_at_most_eagers(ours, plain, lambda: torch.autocast(device, torch.bfloat16))


def test_fp32_norms_on_a_bf16_model(device):
    """``prepare_model_for_kbit_training`` leaves norms in fp32; autocast then brings their output back to bf16."""
    plain, ours = twins(device=device, dtype=torch.bfloat16)
    for model in (plain, ours):
        for p in model.parameters():
            if p.dim() == 1:
                p.data = p.data.float()
    assert_error_at_most_eagers(ours, plain, lambda: torch.autocast(device, torch.bfloat16))
    batch = inputs(text_batch(plain))
    with torch.autocast(device, torch.bfloat16):
        assert ours(**batch).logits.dtype == plain(**batch).logits.dtype
        assert (
            ours.model(**batch).last_hidden_state.dtype == plain.model(**batch).last_hidden_state.dtype == torch.float32
        )


@pytest.mark.interpreter
def test_grad_scaler_and_accumulation(text_pair):
    """Loss scaled and summed over micro-batches: the gradient of the fused loss takes any incoming gradient."""
    plain, ours = text_pair

    def run(model):
        model.train()
        model.zero_grad()
        for seed in range(3):
            (model(**text_batch(model, seed=seed), num_items_in_batch=50).loss * 1024).backward()
        return gradients(model)

    assert_both(ours, plain, run)


@pytest.mark.interpreter
def test_retained_graph(text_pair):
    plain, ours = text_pair

    def run(model):
        model.train()
        model.zero_grad()
        loss = model(**text_batch(model)).loss
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        return gradients(model)

    assert_both(ours, plain, run)


@pytest.mark.interpreter
def test_two_losses_of_one_forward(text_pair):
    """An auxiliary term on hidden states beside the fused loss."""
    plain, ours = text_pair

    def run(model):
        model.train()
        model.zero_grad()
        out = model(**text_batch(model), output_hidden_states=True)
        (out.loss + out.hidden_states[1].square().mean()).backward()
        return gradients(model)

    assert_both(ours, plain, run)


def test_functional_call(text_pair):
    plain, ours = text_pair
    batch = inputs(text_batch(plain))

    def run(model):
        weights = {n: p.detach() * 1.1 for n, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, kwargs=batch).logits

    assert_both(ours, plain, run)


def test_no_warnings_when_all_is_fused(kind, caplog):
    plain, ours = twins(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(ours, batch_for(plain))
    assert not [r for r in caplog.records if r.name == "m3kernels"]


def test_patched_block_restores_after_an_exception(text_pair):
    plain, _ = text_pair
    batch = text_batch(plain)
    before = observe(plain, batch)
    with pytest.raises(KeyError), patched(plain):
        assert is_patched(plain)
        raise KeyError
    assert not is_patched(plain)
    assert_same(observe(plain, batch), before, 0.0)
