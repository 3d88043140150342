"""``m3kernels.peft.target_modules``: the modules that PEFT then wraps are the ones asked for, and no others."""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

import m3kernels
from m3kernels.peft import NAMES, target_modules
from models import assert_parity, batch_for, build

ATTENTION, MLP = NAMES[:4], NAMES[4:]
TEXT, VLM_TEXT = "model.layers", "model.language_model.layers"
VISION, PROJECTOR = "model.vision_tower.transformer.layers", "model.multi_modal_projector"


def text_names(prefix: str, layers=range(2), names=NAMES) -> set[str]:
    return {f"{prefix}.{i}.{'self_attn' if n in ATTENTION else 'mlp'}.{n}" for i in layers for n in names}


def vision_names(prefix: str, layers=range(2), names=NAMES) -> set[str]:
    return {f"{prefix}.{i}.{'attention' if n in ATTENTION else 'feed_forward'}.{n}" for i in layers for n in names}


def projector_names(prefix: str) -> set[str]:
    return {f"{prefix}.{n}" for n in ("linear_1", "linear_2", "patch_merger.merging_layer")}


def adapted(model, adapter: str = "default") -> set[str]:
    """Names of the modules with this adapter, relative to the base model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {n for n, m in base.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}


def lora(targets, **changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False, **changes})


# --- names


def test_names_of_the_text_model():
    model = build("text")
    found = target_modules(model)
    assert set(found) == text_names(TEXT) and len(found) == 14
    assert found == [n for n, _ in model.named_modules() if n in set(found)], "not in the model's order"
    assert set(target_modules(model.model)) == text_names("layers")


def test_names_of_the_vision_language_model():
    model = build("vlm")
    text, vision, projector = text_names(VLM_TEXT), vision_names(VISION), projector_names(PROJECTOR)
    for parts in itertools.product((True, False), repeat=3):
        if any(parts):
            expected = set().union(*(s for s, asked in zip((text, vision, projector), parts) if asked))
            found = target_modules(model, *parts)
            assert set(found) == expected and len(found) == len(expected)
            assert all(isinstance(model.get_submodule(n), nn.Linear) for n in found)
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert set(target_modules(model, True, True, True)) == linear - {"lm_head"}


def test_names_of_inner_models():
    model = build("vlm").model
    assert set(target_modules(model, True, True, True)) == (
        text_names("language_model.layers")
        | vision_names("vision_tower.transformer.layers")
        | projector_names("multi_modal_projector")
    )
    assert set(target_modules(model.language_model)) == text_names("layers")
    assert set(target_modules(model.vision_tower, text=False, vision=True)) == vision_names("transformer.layers")
    projector = target_modules(model.multi_modal_projector, text=False, projector=True)
    assert sorted(projector) == ["linear_1", "linear_2", "patch_merger.merging_layer"]
    assert set(target_modules(model.language_model.layers[0])) == {f"self_attn.{n}" for n in ATTENTION} | {
        f"mlp.{n}" for n in MLP
    }


def test_some_names_and_layers(kind):
    model, prefix = build(kind), TEXT if kind == "text" else VLM_TEXT
    assert set(target_modules(model, names=["v_proj", "up_proj", "v_proj"])) == text_names(
        prefix, names=["v_proj", "up_proj"]
    )
    assert set(target_modules(model, names="q_proj")) == text_names(prefix, names=["q_proj"])
    for layers in ([1], {1}, range(1, 2), (i for i in [1, 1]), np.array([1]), torch.tensor([1])):
        assert set(target_modules(model, layers=layers)) == text_names(prefix, [1])
    if kind == "vlm":
        both = target_modules(model, vision=True, projector=True, names=["o_proj"], layers=[0])
        assert set(both) == (
            text_names(prefix, [0], ["o_proj"]) | vision_names(VISION, names=["o_proj"]) | projector_names(PROJECTOR)
        )
        assert len(target_modules(model, text=False, projector=True, names=())) == 3


@pytest.mark.parametrize("wrapper", ["patched", "PEFT", "twice", "injected", "compiled", "DataParallel", "head"])
def test_wrapped_models(wrapper, kind):
    plain = build(kind)
    expected, model = target_modules(plain, vision=kind == "vlm", projector=kind == "vlm"), copy.deepcopy(plain)
    if wrapper == "patched":
        m3kernels.patch(model)
    elif wrapper == "PEFT":
        model = get_peft_model(model, lora(["q_proj", "linear_1", "lm_head"], modules_to_save=["norm"]))
    elif wrapper == "twice":
        m3kernels.patch(model)
        model = torch.compile(get_peft_model(model, lora("all-linear", use_dora=True)))
    elif wrapper == "injected":
        model = inject_adapter_in_model(lora("all-linear"), model)
    elif wrapper == "compiled":
        model = torch.compile(model)
    elif wrapper == "DataParallel":
        model = nn.DataParallel(model)
    elif wrapper == "head":
        model.lm_head = nn.Linear(48, 7)
    assert target_modules(model, vision=kind == "vlm", projector=kind == "vlm") == expected


def test_a_subclass():
    model = build("text")
    model.__class__ = type("Mine", (type(model),), {})
    model.model.layers[0].__class__ = type("MyLayer", (type(model.model.layers[0]),), {})
    assert set(target_modules(model)) == text_names(TEXT)


# --- what PEFT makes of them

WIDE = {"text": {"num_hidden_layers": 12}, "vision": {"num_hidden_layers": 12}}  # so that "1" and "11" are layers
CHOICES = {
    "text": {},
    "vision": {"text": False, "vision": True},
    "projector": {"text": False, "projector": True},
    "text and vision": {"vision": True},
    "text and projector": {"projector": True},
    "all": {"vision": True, "projector": True},
    "attention": {"names": ATTENTION},
    "attention of both": {"names": ATTENTION, "vision": True},
    "mlp": {"names": MLP},
    "few": {"names": ["q_proj"], "layers": [1]},
    "layer 1": {"layers": [1]},
    "layers 1 and 11": {"layers": [1, 11]},
    "all layers but one": {"layers": [i for i in range(12) if i != 1]},
    "layer 1 and vision": {"layers": [1], "vision": True},
    "layers and vision's q": {"layers": range(1, 12), "vision": True, "names": ["q_proj"]},
}


@pytest.fixture(scope="module")
def wide():
    return build("vlm", **WIDE)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_peft_wraps_exactly_these(name, inner, wide):
    """Above 20 names PEFT shortens a list to suffixes: the set that it wraps must stay the same."""
    model = copy.deepcopy(wide.model if inner else wide)
    targets = target_modules(model, **CHOICES[name])
    config = lora(targets)
    wrapped = get_peft_model(model, config)
    assert adapted(wrapped) == set(targets)
    if len(targets) >= 20:
        assert len(config.target_modules) <= len(targets)
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert {n.removeprefix("base_model.model.").split(".lora_")[0] for n in trained} == set(targets)
    assert target_modules(wrapped, **CHOICES[name]) == targets


def test_peft_wraps_exactly_these_of_a_text_model():
    model = build("text", num_hidden_layers=12)
    for choice in ({}, {"layers": [1]}, {"layers": [0, 1, 2, 10]}, {"names": ["v_proj"], "layers": [11]}):
        targets = target_modules(model, **choice)
        assert adapted(get_peft_model(copy.deepcopy(model), lora(targets))) == set(targets)


def test_generic_names_hit_the_vision_tower(wide):
    """What this module is there for; if PEFT or transformers change that, it has lost its point."""
    wrapped = get_peft_model(copy.deepcopy(wide), lora(list(NAMES)))
    assert any("vision_tower" in n for n in adapted(wrapped))


def test_names_are_no_ends_of_others(wide):
    """PEFT takes ``key.endswith("." + target)`` too."""
    targets, keys = target_modules(wide, True, True, True), [n for n, _ in wide.named_modules()]
    assert all([k for k in keys if k == t or k.endswith(f".{t}")] == [t] for t in targets)
    # a list made for an inner model means the same modules in the outer one
    for part, prefix in ((wide.model, "model."), (wide.model.language_model, "model.language_model.")):
        for t in target_modules(part):
            assert [k for k in keys if k.endswith(f".{t}")] == [prefix + t]


@pytest.mark.parametrize("order", ["before", "after"])
def test_with_a_patch(order, kind):
    plain = build(kind)
    ours, choice = copy.deepcopy(plain), {"projector": kind == "vlm"}
    if order == "before":
        m3kernels.patch(ours)
    torch.manual_seed(3)
    ours = get_peft_model(ours, lora(target_modules(ours, **choice)))
    torch.manual_seed(3)
    targets = target_modules(plain, **choice)
    plain = get_peft_model(plain, lora(targets))
    if order == "after":
        m3kernels.patch(ours)
    assert adapted(ours) == adapted(plain) == set(targets)
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_a_second_adapter(targets, wide):
    model = get_peft_model(copy.deepcopy(wide), lora(targets))
    first = adapted(model)
    for name, choice in (("text", {"layers": [1, 11]}), ("vision", {"text": False, "vision": True})):
        wanted = target_modules(model, **choice)
        model.add_adapter(name, lora(wanted))
        assert adapted(model, name) == set(wanted)
    assert adapted(model) == first


def test_with_modules_to_save(wide):
    targets = target_modules(wide)
    model = get_peft_model(copy.deepcopy(wide), lora(targets, modules_to_save=["multi_modal_projector", "lm_head"]))
    assert adapted(model) == set(targets)
    assert target_modules(model) == targets


def test_other_adapters(wide):
    """IA3 keeps long lists as they are."""
    targets = target_modules(wide)
    down = target_modules(wide, names="down_proj")
    model = get_peft_model(copy.deepcopy(wide), IA3Config(target_modules=targets, feedforward_modules=down))
    base = model.get_base_model()
    assert {n for n, m in base.named_modules() if hasattr(m, "ia3_l") and "default" in m.ia3_l} == set(targets)


@pytest.mark.parametrize("choice", [{"layers": [1], "names": ["q_proj"]}, {"layers": range(1, 12), "projector": True}])
def test_saved_adapter_loads_in_plain_peft(choice, wide, tmp_path):
    """A short list, which stays as it is, and a long one."""
    targets = target_modules(wide, **choice)
    trained = copy.deepcopy(wide)
    m3kernels.patch(trained)
    trained = get_peft_model(trained, lora(targets))
    trained.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(written, list) and (len(targets) >= 20 or written == targets)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(wide), tmp_path, is_trainable=True)
    assert adapted(reloaded) == set(targets)
    m3kernels.unpatch(trained)
    assert_parity(reloaded, trained, batch_for(wide), 0.0)


# --- errors

WRONG = {
    "unknown name": ({"names": ["q_porj"]}, ["'q_porj'", "did you mean 'q_proj'?", "gate_proj"]),
    "unlike any name": ({"names": ["zzz"]}, ["'zzz'", "Allowed", "down_proj"]),
    "the head": ({"names": ["lm_head"]}, ["'lm_head'"]),
    "embeddings": ({"names": ["embed_tokens"]}, ["'embed_tokens'"]),
    "no string": ({"names": [3]}, ["unknown name 3"]),
    "no names": ({"names": []}, ["names is empty", "q_proj"]),
    "nothing": ({"text": False}, ["all False", "pass True"]),
    "no vision tower": ({"vision": True}, ["vision=True", "Ministral3ForCausalLM", "pass vision=False"]),
    "no projector": ({"projector": True}, ["projector=True", "Ministral3ForCausalLM", "pass projector=False"]),
    "layer too high": ({"layers": [0, 2]}, ["layer 2", "0 to 1"]),
    "negative layer": ({"layers": [-1]}, ["layer -1", "0 to 1"]),
    "no layers": ({"layers": []}, ["layers is empty", "0 to 1"]),
    "layers without text": ({"text": False, "vision": True, "layers": [0]}, ["text=False", "layers"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    options, said = WRONG[name]
    with pytest.raises(ValueError) as error:
        target_modules(build("text"), **options)
    assert all(part in str(error.value) for part in said), error.value


@pytest.mark.parametrize("model", [None, "mistralai/Ministral-3-3B", dict])
def test_no_model(model):
    with pytest.raises(TypeError, match=r"needs a model \(torch.nn.Module\), got"):
        target_modules(model)


@pytest.mark.parametrize("layers", [1, ["1"], "01", [0.0]])
def test_layers_that_are_no_integers(layers):
    with pytest.raises(TypeError, match=r"iterable of integers such as range\(2\)"):
        target_modules(build("text"), layers=layers)


def test_other_models():
    with pytest.raises(ValueError, match="text=True, but Linear has no Ministral 3 text model"):
        target_modules(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="text=True, but PixtralVisionModel has no Ministral 3 text model"):
        target_modules(build("vlm").model.vision_tower)
    with pytest.raises(ValueError, match=r"2 modules Ministral3Model \(0.model, 1\)"):
        target_modules(nn.ModuleList([build("text"), build("text").model]))


def test_modules_that_are_saved_whole():
    """PEFT keeps copies of these: the names that they had are gone."""
    model = get_peft_model(build("vlm"), lora(["q_proj"], modules_to_save=["mlp", "multi_modal_projector"]))
    with pytest.raises(ValueError, match=r"no module 'model.language_model.layers.0.mlp.down_proj' \(6 such names\)"):
        target_modules(model)
    with pytest.raises(ValueError, match="no Mistral 3 projector"):
        target_modules(model, names=ATTENTION, projector=True)
    assert set(target_modules(model, names=ATTENTION)) == text_names(VLM_TEXT, names=ATTENTION)


# --- the package


def test_m3kernels_does_not_import_peft():
    program = (
        "import sys, m3kernels; assert 'peft' not in sys.modules\n"
        "assert m3kernels.peft.target_modules and 'peft' not in m3kernels.__all__\n"
        "import m3kernels.peft as ours, peft as theirs\n"
        "assert ours is m3kernels.peft and theirs.LoraConfig and ours is not theirs"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
