"""FP8 checkpoints: a patched model with FP8 weights is the model that transformers dequantises, adapters included."""

import copy
import json
import logging
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_patch_peft import PROJECTIONS, disturb, kernels_run, lora, wrap
from torch import nn
from transformers import Ministral3ForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

from m3kernels import patch, unpatch
from m3kernels.patching import adapters, classes, fp8
from models import FP32, assert_parity, assert_same, batch_for, build, distance, gradients, text_batch

FP8 = torch.float8_e4m3fn
BLOCKS = [None, (16, 12)]


def quantise(model: nn.Module, block_size=None) -> nn.Module:
    """The text layers' projections as FP8Linear, static activation scales as Ministral 3 Instruct has them."""
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] not in PROJECTIONS or "vision_tower" in name:
            continue
        rows, columns = module.weight.shape
        blocks = block_size or (rows, columns)
        layer = FP8Linear(columns, rows, block_size, activation_scheme="static")
        grid = [range(0, size, block) for size, block in zip((rows, columns), blocks)]
        scale = torch.empty([len(axis) for axis in grid])
        quantised = torch.empty(rows, columns)
        for i, top in enumerate(grid[0]):
            for j, left in enumerate(grid[1]):
                part = module.weight.detach().float()[top : top + blocks[0], left : left + blocks[1]]
                scale[i, j] = part.abs().max() / 448
                quantised[top : top + blocks[0], left : left + blocks[1]] = part.cpu() / scale[i, j]
        layer.weight = nn.Parameter(quantised.to(FP8), requires_grad=False)
        layer.weight_scale_inv = nn.Parameter(scale if block_size else scale.reshape(()), requires_grad=False)
        layer.activation_scale = nn.Parameter(torch.tensor(0.37), requires_grad=False)
        model.set_submodule(name, layer.to(module.weight.device))
    return model.eval()


def dequantised(model: nn.Module, to=lambda layer: layer) -> nn.Module:
    """A copy with plain linear layers; ``to`` may change an FP8 layer before its weight is taken."""
    plain, dtype = copy.deepcopy(model), next(p for p in model.parameters() if p.dtype != FP8).dtype
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, FP8Linear):
            to(layer)
            scale, weight = layer.weight_scale_inv.float(), layer.weight.float()
            if layer.block_size is not None:
                for axis, block in enumerate(layer.block_size):
                    scale = scale.repeat_interleave(block, axis).narrow(axis, 0, weight.shape[axis])
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device=weight.device)
            linear.weight = nn.Parameter((weight * scale).to(dtype), requires_grad=False)
            plain.set_submodule(name, linear)
    return plain.eval()


def pair(block_size=None, kind="text", device="cpu", **options):
    """(dequantised, patched with FP8 weights)."""
    ours = quantise(build(kind, device=device, **options), block_size)
    plain = dequantised(ours)
    patch(ours)
    return plain, ours


OLD_PEFT = tuple(map(int, version("peft").split(".")[:2])) < (0, 19)
needs_fp32_adapters = pytest.mark.skipif(OLD_PEFT, reason="PEFT before 0.19 makes adapters of FP8 layers in FP8")


def adapted(plain, ours, config):
    """Both with an adapter of the same numbers."""
    if OLD_PEFT:
        pytest.skip("PEFT before 0.19 makes adapters of FP8 layers in FP8")
    plain, ours = wrap(plain, config), wrap(ours, config)
    disturb(plain), disturb(ours)
    return plain, ours


@pytest.fixture
def kernels(monkeypatch):
    """Off the GPU the op's plain reference stands in for the kernels: as it were, the path of a GPU."""
    monkeypatch.setattr(adapters, "_kernels_run", lambda x: True)
    monkeypatch.setattr(classes, "_noted", set())


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("frozen", [True, False])
def test_without_adapters(block_size, kind, frozen, device):
    """Gradients reach everything below FP8 layers, which have none in transformers before 5.24."""
    plain, ours = pair(block_size, kind, device)
    if frozen:
        for model in (plain, ours):
            model.requires_grad_(False)
            model.get_input_embeddings().weight.requires_grad_(True)
    assert_parity(ours, plain, batch_for(plain))


CONFIGS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "fresh dora": lora(use_dora=True, init_lora_weights=True),
    "some layers": lora(target_modules=["q_proj", "up_proj"]),
    "dropout": lora(lora_dropout=0.4),
}


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fused", [True, False])
def test_adapters(name, block_size, fused, device, request):
    if fused and name != "dropout":
        request.getfixturevalue("kernels")
    if name == "dropout" and kernels_run(device):
        pytest.skip("masks are drawn from a counter: tests/ops/test_lora.py")
    plain, ours = adapted(*pair(block_size, device=device), CONFIGS[name])
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)
    batch = text_batch(plain)
    assert_parity(ours, plain, batch)
    embedded = [m.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_() for m in (ours, plain)]
    grads = []
    for model, x in zip((ours, plain), embedded):
        torch.manual_seed(0)
        model.train()
        grads += torch.autograd.grad(model(inputs_embeds=x, labels=batch["labels"]).loss, x)
    assert distance(*grads) <= FP32


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("dora", [False, True])
def test_five_steps_are_those_of_the_dequantised_model(block_size, dora, device, kernels):
    plain, ours = adapted(*pair(block_size, device=device), lora(use_dora=dora))
    weights = {n: b.clone() for n, b in ours.state_dict().items() if b.dtype == FP8 or "scale" in n}
    batch, losses, trained = text_batch(plain), [], []
    for model in (plain, ours):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
        losses.append([])
        model.train()
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        trained.append({n: p.detach() for n, p in parameters.items()})
    assert losses[1] == pytest.approx(losses[0], rel=10 * FP32) and losses[0][-1] < 0.98 * losses[0][0]
    assert_same(trained[1], trained[0], 20 * FP32)
    after = ours.state_dict()
    assert weights and all(torch.equal(after[n].float(), w.float()) for n, w in weights.items())


@needs_fp32_adapters
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_trained_over_fp8_load_in_plain_peft(block_size, dora, tmp_path, kernels):
    plain, ours = pair(block_size)
    ours = wrap(ours, lora(use_dora=dora))
    disturb(ours)
    batch = text_batch(plain)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        ours(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all(tensor.dtype == torch.float32 and "scale" not in name for name, tensor in saved.items())
    before = plain(**batch).logits
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        want = ours.eval()(**batch).logits
        assert distance(loaded(**batch).logits, want) <= 10 * FP32 and distance(before, want) > 1e-2


WRONG = {
    "scale forgotten": lambda layer: layer.weight_scale_inv.data.fill_(1),
    "scale rounded to bf16 first": lambda layer: layer.weight_scale_inv.data.copy_(layer.weight_scale_inv.bfloat16()),
    "activation scale applied": lambda layer: layer.weight_scale_inv.data.mul_(layer.activation_scale),
    "transposed block scales": lambda layer: layer.weight_scale_inv.data.copy_(
        layer.weight_scale_inv.T.reshape(layer.weight_scale_inv.shape).clone()
    ),
}


def test_adapters_in_fp8_are_reported():
    model = wrap(quantise(build()), lora(target_modules=["q_proj"]))
    for module in model.modules():
        if adapters.is_adapted(module):
            module.lora_A.to(FP8), module.lora_B.to(FP8)
    report = patch(model)
    assert report.patched["lora_linear"] == 0 and "use peft>=0.19" in str(report)


@needs_fp32_adapters
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_scale_is_noticed(wrong, dora, kernels):
    """Every comparison above has this one's bounds."""
    ours = quantise(build(), BLOCKS[1] if "block" in wrong else None)
    plain = dequantised(ours, WRONG[wrong])
    patch(ours)
    plain, ours = adapted(plain, ours, lora(use_dora=dora))
    with pytest.raises(AssertionError, match="grad of"):
        assert_parity(ours, plain, text_batch(plain))


def test_what_transformers_loads_dequantised(tmp_path):
    """Its own loading of an FP8 checkpoint, with dequantize=True, is the truth that the tests above stand on."""
    fp8_model = quantise(build())
    config = json.loads(fp8_model.config.to_json_string())
    config["architectures"] = ["Ministral3ForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "dequantize": True,
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {n: t.detach().contiguous() for n, t in fp8_model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = Ministral3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    patch(fp8_model)
    batch = {k: v for k, v in text_batch(loaded).items() if k != "labels"}
    with torch.no_grad():
        assert distance(fp8_model(**batch).logits, loaded(**batch).logits) <= FP32


def test_autocast_is_that_of_a_linear_layer(device):
    plain, ours = pair(device=device)
    with torch.autocast(device, torch.bfloat16):
        losses = [model.train()(**text_batch(model)).loss for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_gradient_checkpointing(device):
    plain, ours = adapted(*pair(device=device), lora())
    for model in (plain, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_parity(ours, plain, text_batch(plain))


def test_report_and_way_back():
    model = quantise(build())
    before = [type(m) for m in model.modules()]
    report = patch(model)
    assert report.patched["fp8_linear"] == 14 and "fp8_linear" in str(report)
    assert patch(model).patched["fp8_linear"] == 14
    unpatch(model)
    assert [type(m) for m in model.modules()] == before
    assert patch(model, ops=["swiglu"]).patched == {"swiglu": 2}


def test_layers_that_are_not_ours_are_reported():
    model = quantise(build())
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(84, 48), requires_grad=False)
    report = patch(model)
    assert report.patched["fp8_linear"] == 13
    (skip,) = [s for s in report.skipped if s.op == "fp8_linear"]
    assert skip.module == "model.layers.0.mlp.up_proj" and "torch.float32" in skip.reason


@needs_fp32_adapters
def test_adapters_that_came_first_are_found(device):
    model = wrap(quantise(build(device=device)), lora())
    report = patch(model)
    assert report.patched["lora_linear"] == report.patched["fp8_linear"] == 14


@needs_fp32_adapters
def test_dora_needs_the_patch_first(caplog):
    """PEFT alone has no arithmetic for FP8 norms; after unpatching it would take them without scales, which is said."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        wrap(quantise(build()), lora(use_dora=True))
    ours = quantise(build())
    patch(ours)
    ours = get_peft_model(ours, lora(use_dora=True, init_lora_weights=True))
    layer = next(m for m in ours.modules() if adapters.is_adapted(m))
    norms = (layer.base_layer.weight.float() * layer.base_layer.weight_scale_inv).norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norms)
    with caplog.at_level(logging.WARNING, "m3kernels"):
        unpatch(ours)
    assert "DoRA over FP8" in caplog.text


@pytest.mark.parametrize("dora", [False, True])
def test_merging_is_refused_and_changes_nothing(dora):
    plain, ours = adapted(*pair(), lora(use_dora=dora))
    with pytest.raises(RuntimeError, match="(?i)float8"):
        ours.merge_adapter()
    assert_parity(ours, plain, text_batch(plain))


def test_no_dequantised_weight_outlives_a_call(device):
    _, ours = pair(device=device)
    kept = []

    def pack(tensor):
        kept.append((tuple(sorted(tensor.shape)), tensor.dtype))
        return tensor

    ours.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = ours(**text_batch(ours)).loss
    sizes = {tuple(sorted(m.weight.shape)) for m in ours.modules() if fp8.is_fp8_linear(m)}
    assert {dtype for size, dtype in kept if size in sizes} == {FP8}
    loss.backward()
    assert gradients(ours)
