"""The native model with our kernels in it: on the GPU and in the interpreter the kernels, elsewhere their references."""

import copy
import os
from collections import Counter

import pytest
import torch
from hf_folders import save
from native import kept, like, seen, trained, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import m3kernels
from m3kernels.models.ministral3 import Ministral3
from m3kernels.patching.joint import lay_side_by_side, whole_weight
from models import FP32, FP64, VOCAB, assert_same, batch_for, distance, float64_islands, text_batch, vlm_batch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.interpreter


class Counted(TorchDispatchMode):
    """Which ops ran inside, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def three(kind: str, device: str = "cpu", **options):
    """(Hugging Face's, native, native patched), the same weights, in training mode."""
    hf, plain = twins(kind, device=device, **options)
    ours = copy.deepcopy(plain)
    m3kernels.patch(ours)
    return hf.train(), plain.train(), ours.train()


@interpreter
@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_loss_and_gradients(kind, device):
    hf, plain, ours = three(kind, device)
    batch = batch_for(hf)
    want = trained(plain, batch)
    assert_same(trained(ours, batch), want, FP32)
    assert_same(want, trained(hf, batch), FP32)


@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_loss_and_gradients_in_fp64(kind):
    hf, plain, ours = three(kind, dtype=torch.float64)
    batch = batch_for(hf)
    with float64_islands():
        assert_same(trained(ours, batch), trained(plain, batch), FP64)


@interpreter
def test_logits_packed_padded_and_cached(device):
    _, plain, ours = three("text", device)
    plain.eval(), ours.eval()
    batch = text_batch(plain, batch=3, padding="left")
    assert_same(seen(ours, batch), seen(plain, batch), FP32)
    ids = batch["input_ids"][:1]
    bounds = {"cu_seqlens": [0, 5, 6, 19, 21]}
    with torch.no_grad():
        assert distance(ours(ids, **bounds).logits, plain(ids, **bounds).logits) <= FP32
        for chunks in ([20, 1], [3, 1, 17], [1, 1, 19]):
            caches, got = {}, {}
            for chunk in batch["input_ids"].split(chunks, dim=1):
                for name, model in (("ours", ours), ("plain", plain)):
                    out = model(chunk, cache=caches.get(name), use_cache=True)
                    caches[name] = out.cache
                    got[name] = out.logits
                assert distance(got["ours"], got["plain"]) <= FP32


@interpreter
def test_a_cached_batch_of_ragged_rows(device):
    _, plain, ours = three("vlm", device)
    plain.eval(), ours.eval()
    batch = vlm_batch(plain, [[(2, 3), (1, 4)], [(3, 2)]])
    batch.pop("labels")
    follow = torch.randint(11, VOCAB, (2, 3), generator=torch.Generator().manual_seed(3)).to(device)
    got = {}
    with torch.no_grad():
        for name, model in (("ours", ours), ("plain", plain)):
            out = model(**batch, use_cache=True)
            real = out.logits[kept(batch)]
            parts = [model(follow[:, i : i + 1], cache=out.cache).logits for i in range(3)]
            got[name] = {"prompt": real, "decoded": torch.cat(parts, dim=1)}
    assert_same(got["ours"], got["plain"], FP32)


def test_report_and_restore():
    _, plain, ours = three("vlm")
    assert m3kernels.is_patched(ours)
    report = m3kernels.patch(ours)
    layers = 2
    assert report.architecture == "Ministral3" and not report.skipped
    assert report.patched["rotary"] == report.patched["rotary_2d"] == layers
    assert report.patched["attention"] == report.patched["swiglu"] == 2 * layers
    assert report.patched["rms_norm"] == 2 * layers + 1 + 2 * layers + 1 + 1
    assert report.patched["linear_cross_entropy"] == 1
    m3kernels.unpatch(ours)
    assert not m3kernels.is_patched(ours)
    batch = batch_for(plain) if False else vlm_batch(plain, [[(2, 3)]])
    assert_same(trained(ours, batch), trained(plain, batch), 0.0)
    with m3kernels.patched(ours, ops="rms_norm") as report:
        assert report.patched == {"rms_norm": 2 * layers + 1 + 2 * layers + 1 + 1}
    assert not m3kernels.is_patched(ours)


def test_training_keeps_no_logits_and_evaluation_does():
    _, plain, ours = three("text")
    batch = text_batch(plain)
    assert ours(**batch).logits is None and ours(**batch, skip_logits=False).logits is not None
    assert plain(**batch).logits is not None
    assert ours.eval()(**batch).logits is not None


def test_weights_side_by_side_keep_names_and_values():
    _, plain, ours = three("text")
    attention, mlp = ours.model.language_model.layers[0].self_attn, ours.model.language_model.layers[0].mlp
    x = torch.randn(3, 48)
    whole = whole_weight(x, attention.q_proj, attention.k_proj, attention.v_proj)
    assert torch.equal(whole, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
    assert whole_weight(x, mlp.gate_proj, mlp.up_proj) is not None
    assert_same(dict(ours.state_dict()), dict(plain.state_dict()), 0.0)
    with torch.no_grad():
        attention.k_proj.weight.add_(1)
    assert torch.equal(whole[60:80], attention.k_proj.weight)


@pytest.mark.parametrize("apart", ["copy", "cast", "hook", "new", "bias"])
def test_weights_that_came_apart_have_products_of_their_own(apart):
    _, plain, ours = three("text")
    layers = [model.model.language_model.layers[0].mlp.gate_proj for model in (plain, ours)]
    if apart == "copy":
        ours = copy.deepcopy(ours)
    elif apart == "cast":
        ours = ours.double().float()
    elif apart == "hook":
        for layer in layers:
            layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
    elif apart == "new":
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach() * 2)
    else:
        for layer in layers:
            layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.weight.shape[0]))
    batch = text_batch(plain)
    assert_same(trained(ours, batch), trained(plain, batch), FP32)


def test_only_what_was_laid_side_by_side_is_taken_for_one():
    a, b = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    for layer, rows in zip((a, b), torch.randn(8, 8).split(4)):
        layer.is_plain_linear = True
        layer.weight.data = rows
    x = torch.randn(2, 8)
    assert whole_weight(x, a, b) is None
    lay_side_by_side(a, b)
    assert whole_weight(x, a, b) is not None and whole_weight(x, b, a) is None
    a.weight.data = a.weight.clone()
    assert whole_weight(x, a, b) is None
    lay_side_by_side(a, b)
    assert whole_weight(x, a, b) is not None


def side_by_side(model) -> bool:
    """Whether the gate and up products of a layer are one."""
    mlp = model.model.language_model.layers[0].mlp
    return whole_weight(torch.empty(0, dtype=model.dtype), mlp.gate_proj, mlp.up_proj) is not None


def test_every_weight_is_saved(tmp_path):
    """Of a shared storage safetensors saves nothing, and accelerate one tensor alone: each has to be a storage by itself."""
    import safetensors.torch as st
    from accelerate.utils.other import clean_state_dict_for_safetensors

    _, plain, ours = three("text")
    assert side_by_side(ours)
    state = dict(plain.state_dict())
    assert_same(clean_state_dict_for_safetensors(dict(ours.state_dict())), state, 0.0)
    st.save_model(ours, tmp_path / "m.safetensors")
    assert_same(st.load_file(tmp_path / "m.safetensors"), state, 0.0)
    gate = ours.model.language_model.layers[0].mlp.gate_proj.weight
    torch.save(gate, tmp_path / "gate.pt")
    assert (tmp_path / "gate.pt").stat().st_size < 1.5 * gate.nbytes
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    st.load_model(ours, tmp_path / "m.safetensors")
    assert_same(dict(ours.state_dict()), state, 0.0)
    assert side_by_side(ours)


def test_patching_again_lays_weights_side_by_side_again():
    _, plain, ours = three("text")
    ours = copy.deepcopy(ours).double()
    assert not side_by_side(ours)
    m3kernels.patch(ours)
    assert side_by_side(ours)
    assert_same(dict(ours.state_dict()), dict(plain.double().state_dict()), 0.0)


def test_weights_are_read_side_by_side(tmp_path):

    folder = save(tmp_path / "hf")
    ours = Ministral3.from_pretrained(folder, prepare=m3kernels.patch)
    assert side_by_side(ours)
    assert_same(dict(ours.state_dict()), dict(Ministral3.from_pretrained(folder).state_dict()), 0.0)


def test_a_weight_changed_before_the_backward_is_an_error():
    _, _, ours = three("text")
    loss = ours(**text_batch(ours)).loss
    with torch.no_grad():
        ours.model.language_model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreter
@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_weights_that_have_come_apart(kind, device):
    """Of FSDP2, shards and copies: what autograd adds up for an input of several products, the products do."""
    _, plain, ours = three(kind, device)
    for parameter in ours.parameters():
        parameter.data = parameter.detach().clone()
    assert not side_by_side(ours)
    batch = batch_for(plain)
    with Counted() as apart:
        got = trained(ours, batch)
    assert_same(got, trained(plain, batch), FP32)
    frozen = "k_proj", "gate_proj"
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        model.zero_grad()
    assert_same(trained(ours, batch), trained(plain, batch), FP32)
    # q with k and v, gate with up
    layers = [*ours.model.language_model.layers]
    layers += ours.model.vision_tower.transformer.layers if kind == "vlm" else []
    assert apart.calls["addmm_"] == 3 * len(layers)


@interpreter
@pytest.mark.parametrize("frozen", ["q_proj", "mlp", "language_model"])
def test_frozen_weights_get_no_gradient(frozen, device):
    hf, plain, ours = three("vlm", device)
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
    batch = vlm_batch(plain, [[(2, 3)]])
    assert_same(trained(ours, batch), trained(plain, batch), FP32)


def test_adapters_of_peft(device):
    """PEFT wraps native layers by the names that it knows, and what it trains is the same with kernels and without."""
    from peft import LoraConfig, get_peft_model

    grads = {}
    for patched in (False, True):
        torch.manual_seed(0)
        model = like(twins("text", device=device)[0]).train()
        wrapped = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj", "up_proj"])
        )
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator(device).manual_seed(1))
        if patched:
            report = m3kernels.patch(wrapped)
            assert report.patched["lora_linear"] == 10 and not report.skipped
        grads[patched] = trained(wrapped, text_batch(model))
    assert len(grads[True]) == 21
    assert_same(grads[True], grads[False], FP32)


@pytest.mark.parametrize("wrong", ["order", "scale"])
def test_wrong_joint_products_are_seen(wrong, monkeypatch):
    from m3kernels.patching import joint

    right = joint._JointLinear.backward

    def backward(ctx, *dys):
        dx, _, _, *dws = right(ctx, *dys)
        return (
            dx,
            None,
            None,
            *(dws[::-1] if wrong == "order" and len({w.shape for w in dws}) == 1 else [w * 2 for w in dws]),
        )

    monkeypatch.setattr(joint._JointLinear, "backward", staticmethod(backward))
    _, plain, ours = three("text")
    batch = text_batch(plain)
    got, want = trained(ours, batch), trained(plain, batch)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert distance(got[name], want[name]) > 0.1
