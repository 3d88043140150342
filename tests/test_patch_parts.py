"""``patch(model, adapters=...)``: which parts' PEFT layers run fused."""

import copy

import pytest
from test_patch_head import layer_of
from test_patch_lora import calls  # noqa: F401  a fixture
from test_patch_peft import disturb, lora, wrap

from m3kernels import patch, patched
from m3kernels.patching import adapters, loss
from models import assert_parity, batch_for, build

PARTS = ("text", "vision", "projector")
# layers of the tiny model: 2 x 7 of text, 2 x 7 of vision, linear_1, linear_2 and the merger
LAYERS = {"text": 14, "vision": 14, "projector": 3}
EVERYTHING = lora(target_modules="all-linear")


def part_of(name: str) -> str:
    found = {"vision_tower": "vision", "multi_modal_projector": "projector"}
    return next((part for key, part in found.items() if key in name), "text")


def fused_layers(model) -> dict[str, int]:
    names = [n for n, m in model.named_modules() if getattr(type(m), "_m3k_forward", "") == "lora_linear"]
    return {part: sum(part_of(n) == part for n in names) for part in PARTS}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", PARTS),
        (("projector", "text"), ("text", "projector")),
        ("text", ("text",)),
        ("vision", ("vision",)),
        (["projector"], ("projector",)),
        ("none", ()),
        ((), ()),
    ],
)
def test_only_what_was_asked_for(given, expected, device, calls):  # noqa: F811
    plain = wrap(build("vlm", device=device), EVERYTHING)
    ours = copy.deepcopy(plain)
    disturb(plain), disturb(ours)
    report = patch(ours, adapters=given)
    assert fused_layers(ours) == {part: LAYERS[part] * (part in expected) for part in PARTS}
    assert report.patched["lora_linear"] == sum(LAYERS[part] for part in expected)
    left = [s for s in report.skipped if s.op == "lora_linear"]
    assert len(left) == sum(LAYERS.values()) - report.patched["lora_linear"]
    assert all(f"adapters of {part_of(s.module)} are left to PEFT" in s.reason for s in left)
    assert {part_of(s.module) for s in left} == set(PARTS) - set(expected)
    assert_parity(ours, plain, batch_for(plain), 1e-4)
    # two layers of q, k, v; o; gate, up; down in each of the two calls, and the projector's one by one
    assert len(calls) == 2 * (8 * ("text" in expected) + 8 * ("vision" in expected) + 3 * ("projector" in expected))


@pytest.mark.parametrize("given", ["all", "text", "vision", "none"])
def test_adapters_that_come_later(given, device, calls):  # noqa: F811
    plain = build("vlm", device=device)
    ours = copy.deepcopy(plain)
    patch(ours, adapters=given)
    plain, ours = wrap(plain, EVERYTHING), wrap(ours, EVERYTHING)
    disturb(plain), disturb(ours)
    assert_parity(ours, plain, batch_for(plain), 1e-4)
    assert len(calls) == 2 * (8 * (given in ("all", "text")) + 8 * (given in ("all", "vision")))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("given", ["text", "vision"])
def test_the_head_belongs_to_the_text_model(given, order, device, monkeypatch):
    seen, real = [], loss.linear_cross_entropy
    monkeypatch.setattr(
        loss,
        "linear_cross_entropy",
        lambda *args, **kw: (seen.append(len(kw.get("adapters", ()))), real(*args, **kw))[1],
    )
    config = lora(target_modules=["lm_head", "q_proj"])
    plain = build("vlm", device=device)
    ours = copy.deepcopy(plain)
    if order == "before":
        patch(ours, adapters=given)
    plain, ours = wrap(plain, config), wrap(ours, config)
    if order == "after":
        report = patch(ours, adapters=given)
        skips = [s.reason for s in report.skipped if s.op == "linear_cross_entropy"]
        assert len(skips) == (given == "vision") and all("left to PEFT" in reason for reason in skips)
    disturb(plain), disturb(ours)
    assert_parity(ours, plain, batch_for(plain))
    assert seen == [1] * (given == "text")
    assert adapters.is_adapted(layer_of(ours))


def test_a_second_patch_adds_parts_and_restores_them(device, calls):  # noqa: F811
    model = wrap(build("vlm", device=device), EVERYTHING)
    patch(model, adapters="none")
    with patched(model, adapters="vision"):
        assert fused_layers(model) == {"text": 0, "vision": 14, "projector": 0}
        model(**batch_for(model))
        assert len(calls) == 8
    assert fused_layers(model) == dict.fromkeys(PARTS, 0)
    model(**batch_for(model))
    assert len(calls) == 8
    patch(model)
    assert fused_layers(model) == LAYERS


def test_inner_models_are_parts_as_well():
    tower = wrap(build("vlm"), lora(target_modules=["q_proj"])).base_model.model.model.vision_tower
    assert patch(tower, adapters="text").patched["lora_linear"] == 0
    assert patch(tower, adapters="vision").patched["lora_linear"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "vison",
            "unknown part for adapters 'vison'; did you mean 'vision'\\? Allowed: 'all', 'none' or any of text, vision",
        ),
        (("text", "tower"), "unknown part for adapters 'tower'"),
        (("text", "none"), "unknown part for adapters 'none'"),
    ],
)
def test_unknown_names(given, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        patch(model, adapters=given)
    assert not any(hasattr(type(m), "_m3k_original") for m in model.modules())
