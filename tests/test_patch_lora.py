"""Which of PEFT's layers run our ops, which together, and what falls back with a reason."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_patch_peft import PROJECTIONS, disturb, lora, pair_with, wrap
from torch import nn

from m3kernels import patch, unpatch
from m3kernels.patching import adapters, classes
from models import assert_same, batch_for, build, observe, text_batch


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the op takes; off the GPU the op's plain reference stands in for the kernels."""
    seen = []
    real = adapters.lora_linears

    def counting(x, layers, **options):
        seen.append(len(layers))
        return real(x, layers, **options)

    monkeypatch.setattr(adapters, "lora_linears", counting)
    monkeypatch.setattr(adapters, "_kernels_run", lambda x: True)
    monkeypatch.setattr(classes, "_noted", set())
    return seen


def step(model, batch):
    model.train()
    return model(**batch).loss


def assert_taken(ours, plain, batch, calls, expected):
    """One forward takes as many layers a call as expected, and a step is PEFT's."""
    step(ours, batch)
    assert calls == expected
    assert_same(observe(ours, batch), observe(plain, batch), 1e-4)


# q, k, v; o; gate, up; down
LAYER = [3, 1, 2, 1]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("dora", [False, True])
def test_projections_of_one_input_go_together(order, dora, device, calls):
    plain, ours = pair_with(lora(use_dora=dora), "text", order, device)
    disturb(plain), disturb(ours)
    assert_taken(ours, plain, text_batch(ours), calls, LAYER * 2)


def test_vision_tower(device, calls):
    plain, ours = pair_with(lora(), "vlm", "after", device)
    disturb(plain), disturb(ours)
    assert_taken(ours, plain, batch_for(plain), calls, LAYER * 4)


def test_ranks_and_targets_that_differ_go_apart(device, calls):
    config = lora(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"], rank_pattern={"v_proj": 7, "up_proj": 9})
    plain, ours = pair_with(config, "text", "after", device)
    disturb(plain), disturb(ours)
    assert_taken(ours, plain, text_batch(ours), calls, [1, 1, 1, 1] * 2)


def test_several_active_adapters_are_one(device, calls):
    plain, ours = pair_with(lora(), "text", "after", device)
    for model in (plain, ours):
        torch.manual_seed(6)
        model.add_adapter("second", lora(r=6, lora_alpha=3))
        model.base_model.set_adapter(["default", "second"])
    disturb(plain), disturb(ours)
    assert_taken(ours, plain, text_batch(ours), calls, LAYER * 2)


def test_switched_off_and_merged_layers_are_the_base_layer(device, calls):
    _, ours = pair_with(lora(), "text", "after", device)
    with ours.disable_adapter():
        step(ours, text_batch(ours))
    ours.merge_adapter()
    step(ours, text_batch(ours))
    assert calls == []
    ours.unmerge_adapter()
    step(ours, text_batch(ours))
    assert calls


FALLBACKS = {
    "dropout with DoRA": lambda model: None,
    "hooks on the base layer": lambda model: first(model).base_layer.register_forward_hook(lambda *_: None),
    "lora_A is no plain": lambda model: setattr(
        first(model).lora_A["default"], "bias", nn.Parameter(torch.zeros(4, device=model.device))
    ),
    "autocast": lambda model: None,
}


def first(model):
    return next(module for module in model.modules() if adapters.is_adapted(module))


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_is_not_covered_runs_peft_and_is_logged(reason, device, calls, caplog):
    config = lora(target_modules=["q_proj"], layers_to_transform=[0])
    if "DoRA" in reason:
        config = lora(target_modules=["q_proj"], layers_to_transform=[0], use_dora=True, lora_dropout=0.3)
    plain, ours = pair_with(config, "text", "after", device)
    FALLBACKS[reason](ours), FALLBACKS[reason](plain)
    with caplog.at_level(logging.WARNING, "m3kernels"), torch.autocast(device, torch.bfloat16, reason == "autocast"):
        torch.manual_seed(0)
        ours_loss = step(ours, text_batch(ours))
        torch.manual_seed(0)
        plain_loss = step(plain, text_batch(plain))
    assert calls == [] and any(reason in record.message for record in caplog.records), caplog.text
    torch.testing.assert_close(ours_loss, plain_loss, rtol=2e-2 if reason == "autocast" else 1e-4, atol=0)


def test_report_counts_layers_and_says_what_is_left():
    model = get_peft_model(build("vlm"), LoraConfig(r=4, target_modules="all-linear"))
    report = patch(model)
    assert report.patched["lora_linear"] == sum(map(adapters.is_adapted, model.modules())) == 31
    model = wrap(build(), lora(use_dora=True, lora_dropout=0.1, target_modules=["q_proj"]))
    report = patch(model)
    assert report.patched["lora_linear"] == 0 and {s.op for s in report.skipped} == {"lora_linear"}
    assert "dropout with DoRA" in str(report)


def test_the_op_alone_and_its_way_back(device, calls):
    plain = wrap(build(device=device), lora())
    ours = copy.deepcopy(plain)
    patch(ours, ops="lora_linear")
    assert_taken(ours, plain, text_batch(ours), calls, [1] * 14)  # one by one: attention and MLP are the model's own
    unpatch(ours)
    calls.clear()
    step(ours, text_batch(ours))
    assert calls == [] and [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


def test_other_ops_leave_adapters_to_peft(device, calls):
    model = wrap(build(device=device), lora())
    patch(model, ops=["rotary", "swiglu"])
    step(model, text_batch(model))
    assert calls == []


@pytest.mark.parametrize("dora", [False, True])
def test_twenty_steps_move_as_pefts(dora, device, calls):
    """AdamW turns rounding into steps of its size: what counts is that the losses stay together, and how far they moved."""
    plain, ours = pair_with(lora(use_dora=dora, target_modules=PROJECTIONS), "text", "before", device)
    batch, losses = text_batch(plain), []
    for model in (plain, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        mine = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = step(model, batch)
            loss.backward()
            optimizer.step()
            mine.append(loss.item())
        losses.append(mine)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][-1] < 0.9 * losses[0][0]
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(trained[name], p, rtol=0, atol=2e-3)


def test_an_adapter_on_the_head_survives_a_second_patch(device):
    plain, ours = pair_with(lora(target_modules=["lm_head", "q_proj"]), "text", "after", device)
    disturb(plain), disturb(ours)
    assert patch(ours).patched["linear_cross_entropy"] == 1
    assert_same(observe(ours, text_batch(ours)), observe(plain, text_batch(plain)), 1e-4)


@pytest.mark.parametrize("part", ["lora_dropout", "lora_magnitude_vector"])
def test_hooks_on_any_part_run(part, device, calls):
    model = wrap(build(device=device), lora(target_modules=["q_proj"], use_dora=part != "lora_dropout"))
    patch(model)
    seen = []
    getattr(first(model), part)["default"].register_forward_hook(lambda *_: seen.append(part))
    step(model, text_batch(model))
    assert seen and len(calls) == 1  # the other layer's


def test_dropout_of_everything_is_pefts(device, calls):
    model = wrap(build(device=device), lora(target_modules=["q_proj"], lora_dropout=1.0))
    patch(model)
    assert torch.isfinite(step(model, text_batch(model))) and calls == []


def two_adapters(model):
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])


# what is done to a model, and whether a call still is the usual one
UNUSUAL = {
    "nothing": (lambda model: None, {}, True),
    "dropout": (lambda model: None, {"lora_dropout": 0.3}, True),
    "dropout in evaluation": (lambda model: model.eval(), {"lora_dropout": 0.3}, True),
    "dropout of everything": (lambda model: None, {"lora_dropout": 1.0}, False),
    "DoRA": (lambda model: None, {"use_dora": True}, False),
    "a bias of B": (lambda model: None, {"lora_bias": True}, False),
    "two adapters": (two_adapters, {}, False),
    "merged": (lambda model: model.merge_adapter(), {}, False),
    "switched off": (lambda model: model.base_model.disable_adapter_layers(), {}, False),
    "a bias of the base": (
        lambda model: setattr(first(model).base_layer, "bias", nn.Parameter(torch.ones(1))),
        {},
        False,
    ),
    "a hook": (lambda model: first(model).lora_A["default"].register_forward_hook(lambda *_: None), {}, False),
    "a forward": (lambda model: vars(first(model).base_layer).update(forward=lambda x: x), {}, False),
    "another class": (lambda model: setattr(first(model).lora_B["default"], "__class__", nn.Bilinear), {}, False),
    "another dtype": (lambda model: first(model).lora_B["default"].half(), {}, False),
    "a frozen weight that is no parameter": (
        lambda model: first(model).base_layer._parameters.update(weight=first(model).base_layer.weight.detach()),
        {},
        False,
    ),
}


@pytest.mark.parametrize("state", UNUSUAL)
def test_the_short_way_to_a_plan_finds_the_same(state, monkeypatch):
    """Whatever is done to a layer, a call that skips the long list of questions answers none of them otherwise."""
    change, config, usual = UNUSUAL[state]
    model = wrap(build(), lora(target_modules=["q_proj"], layers_to_transform=[0], **config)).train()
    change(model)
    layer, x = first(model), torch.zeros(2, 64, dtype=model.dtype)
    short = adapters._usual(layer, x)
    assert (short is not None) == usual
    with torch.autocast("cpu", torch.bfloat16):
        assert adapters._usual(layer, x) is None
    assert adapters._usual(layer, x.double()) is None
    monkeypatch.setattr(adapters, "_usual", lambda *_: None)
    long = adapters._plan(layer, x)
    if short is not None:
        assert short.dropout == long.dropout and short.bias is long.bias is None
        for name, value in vars(short.adapted).items():
            assert getattr(long.adapted, name) is value, name
