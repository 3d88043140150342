"""Recompute changes what is kept, never what comes out."""

import contextlib
import copy
import importlib
import os

import pytest
import torch
from native import trained, twins

import m3kernels
from m3kernels.models.ministral3.recompute import RUN, kept_bytes, least_recompute, set_recompute
from m3kernels.ops import _recompute
from m3kernels.patching import classes
from models import FP64, IMAGES, assert_same, text_batch, vlm_batch

attention = importlib.import_module("m3kernels.ops.attention")  # the package has the function by this name

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MODES = list(RUN)


def model(kind: str, patched: bool, device: str = "cpu", **options):
    made = twins(kind, device=device, **options)[1].train()
    if patched:
        m3kernels.patch(made)
    return made


@pytest.mark.parametrize(
    "patched", [pytest.param(False, id="eager"), pytest.param(True, id="patched", marks=pytest.mark.interpreter)]
)
@pytest.mark.parametrize("mode", [*MODES[1:], ("cheap", "attention")], ids=str)
def test_gradients_are_the_same_bits(mode, patched, device):
    ours = model("text", patched, device)
    batch = text_batch(ours)
    want = trained(ours, batch)
    set_recompute(ours, mode)
    assert_same(trained(ours, batch), want, 0.0)


@pytest.mark.parametrize("mode", MODES[1:])
def test_with_images_and_dropout(mode):
    ours = model("vlm", False, dtype=torch.float64, text={"attention_dropout": 0.3})
    batch = vlm_batch(ours, IMAGES)
    torch.manual_seed(0)
    want = trained(ours, batch)
    set_recompute(ours, mode)
    torch.manual_seed(0)
    assert_same(trained(ours, batch), want, FP64)


@pytest.mark.parametrize("patched", [False, True], ids=["eager", "patched"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_the_vision_tower_recomputes_by_itself(mode, patched, device):
    ours = model("vlm", patched, device)
    batch = vlm_batch(ours, IMAGES)
    want, calls = trained(ours, batch), []
    tower = ours.model.vision_tower
    tower.recompute = mode
    tower.transformer.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(trained(ours, batch), want, 0.0)
    assert len(calls) == (1 if mode == "cheap" else 2)


@pytest.mark.parametrize("mode", MODES[1:])
def test_dropout_of_adapters_is_drawn_alike(mode):
    from peft import LoraConfig, get_peft_model

    ours = model("text", False, dtype=torch.float64)
    targets = ["q_proj", "down_proj"]
    wrapped = get_peft_model(ours, LoraConfig(target_modules=targets, lora_dropout=0.5, init_lora_weights=False))
    batch, found = text_batch(ours), []
    for each in ("none", mode):
        set_recompute(ours, each)
        torch.manual_seed(0)
        found.append(trained(wrapped, batch))
    assert_same(*found, FP64)


def forgetful(change, forgets: bool) -> dict:
    """Gradients of products of a sine, in several shapes, that may be forgotten; ``change`` is done to it in place."""
    x, w = torch.linspace(-3, 4, 50, dtype=torch.float64).view(2, 5, 5).requires_grad_().unbind()
    x.retain_grad(), w.retain_grad()
    with _recompute.forgetting() if forgets else contextlib.nullcontext():
        y = _recompute.forget(x.sin() * 2, lambda: x.sin() * 2)
        change(y)
        uses = (y @ w, y.t() @ w, y.view(-1) ** 2, y[1:3] @ w, y.view(5, 1, 5) * w, y.view(25, 1).t() ** 3)
        torch.cat([use.flatten() for use in uses]).square().sum().backward()
    return {"x": x.grad, "w": w.grad}


@pytest.mark.parametrize(
    "change",
    [lambda y: None, lambda y: y.mul_(3), lambda y: y.view(-1)[7:].zero_(), lambda y: y.detach().add_(1)],
    ids=["nothing", "whole", "part", "detached"],
)
def test_what_is_made_again_is_what_was_there(change):
    assert_same(forgetful(change, True), forgetful(change, False), 0.0)


class Kept:
    """Bytes of the distinct memory that a forward keeps for its backward, parameters aside."""

    def __init__(self, module):
        self.own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.seen = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.seen.values())


kernels_run = pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="needs the kernels")


@kernels_run
@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["none", "cheap"])
def test_kept_bytes_are_those_of_the_plan(mode, monkeypatch):
    """Of one layer: what two layers keep less what one keeps."""
    found, device = {}, "cpu" if INTERPRET else "cuda"
    forgotten = _recompute._Forgotten.pack
    for layers in (1, 2):
        ours = model("text", True, device, num_hidden_layers=layers)
        set_recompute(ours, mode)
        kept = Kept(ours)

        def pack(self, tensor, kept=kept):
            packed = forgotten(self, tensor)
            return kept.pack(packed) if isinstance(packed, torch.Tensor) else packed

        monkeypatch.setattr(_recompute._Forgotten, "pack", pack)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            ours(**text_batch(ours))
        found[layers] = kept.bytes
    plan = kept_bytes(ours.config.text, 42, torch.float32)
    assert found[2] - found[1] == pytest.approx(plan[mode], rel=0.01)
    assert plan["none"] > plan["cheap"] > plan["attention"] > plan["all"]


@kernels_run
@pytest.mark.interpreter
@pytest.mark.parametrize("mode, runs", [("none", 1), ("cheap", 1), ("attention", 1), ("all", 2)])
def test_attention_is_computed_once_where_its_output_is_kept(mode, runs, monkeypatch):
    ours = model("text", True, "cpu" if INTERPRET else "cuda")
    set_recompute(ours, mode)
    ways, choose = [], attention.choose
    monkeypatch.setattr(attention, "choose", lambda way, *rest: ways.append(way) or choose(way, *rest))
    trained(ours, text_batch(ours))
    assert ways.count("forward") == 2 * runs and ways.count("backward") == 2


@pytest.mark.parametrize(
    "budget, want",
    [
        (1000, ("none",) * 4),
        (400, ("none",) * 4),
        (399, ("cheap", "none", "none", "none")),
        (280, ("cheap",) * 4),
        (279, ("attention", "cheap", "cheap", "cheap")),
        (120, ("attention",) * 4),
        (90, ("all", "all", "attention", "attention")),
        (80, ("all",) * 4),
    ],
)
def test_the_least_recompute_that_fits(budget, want):
    kept = {"none": 100, "cheap": 70, "attention": 30, "all": 10}
    if budget == 80:
        kept["all"] = 20
    modes = least_recompute(kept, 4, budget)
    assert modes == want
    assert sum(kept[mode] for mode in modes) <= budget


def test_what_does_not_fit_is_refused():
    ours = model("text", False)
    for match, call in (
        ("unknown recompute mode", lambda: set_recompute(ours, "some")),
        ("3 recompute modes for 2 layers", lambda: set_recompute(ours, ["none"] * 3)),
        ("either a mode or", lambda: set_recompute(ours)),
        ("needs tokens", lambda: set_recompute(ours, budget_bytes=1)),
        ("take fewer tokens", lambda: set_recompute(ours, budget_bytes=1, tokens=64)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert set_recompute(ours, budget_bytes=2**30, tokens=64) == ("none", "none")


def test_an_attention_that_cannot_be_kept_is_reported_once(caplog, monkeypatch):
    monkeypatch.setattr(classes, "_noted", set())
    ours = model("text", False)
    for mode, said in (("all", 0), ("attention", 1), ("attention", 1)):
        set_recompute(ours, mode)
        with torch.no_grad():
            ours(**text_batch(ours))
        trained(ours, text_batch(ours))
        assert sum("computed again" in record.message for record in caplog.records) == said


def test_a_copy_keeps_its_modes():
    ours = model("text", False)
    set_recompute(ours, "all")
    assert copy.deepcopy(ours).model.language_model.recompute == ("all", "all")
