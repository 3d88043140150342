"""Our own LoRA and DoRA are PEFT's: in training, in files, merged, and with kernels."""

import copy
import json

import pytest
import torch
from hf_folders import save
from native import kept, like, seen, trained
from peft import PeftModel
from peft_twins import PARTS, adapted, disturb, fresh_peft, in_peft, steps
from safetensors.torch import load_file
from transformers import Ministral3ForCausalLM, Mistral3ForConditionalGeneration

import m3kernels
from m3kernels.models.ministral3 import (
    AdapterConfig,
    AdapterError,
    CheckpointError,
    Ministral3,
    adapter_of,
    adapter_parameters,
    add_adapters,
    load_adapter,
    merge_adapters,
    reset_adapters,
    save_adapter,
    set_recompute,
    targets_of,
)
from m3kernels.models.ministral3.adapted import AdaptedLinear, adapted_layers
from m3kernels.models.ministral3.recompute import RUN
from m3kernels.patching import adapters as fused
from models import FP32, assert_same, batch_for, build, distance, float64_islands, text_batch

PEFT = 1e-10
LAYER = "model.language_model.layers.0"
both = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
interpreter = pytest.mark.interpreter


def logits(model, batch: dict) -> torch.Tensor:
    return seen(model.eval(), batch)["logits"]


@both
def test_four_steps_are_pefts(kind, dora, tmp_path):
    hf, ours = adapted(kind, dora=dora)
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    theirs = in_peft(hf, tmp_path / "a", trainable=True).train()
    with float64_islands():
        batches = [batch_for(hf, seed=seed) for seed in range(4)]
        want, got = steps(theirs, batches), steps(ours.train(), batches)
    assert len(got) > 4 * len(adapter_parameters(ours))
    assert_same(got, want, PEFT)


@both
def test_dropout_is_pefts(dora, tmp_path):
    """Masks of one generator, too: q, k, v, o, gate, up and down draw in turn."""
    hf, ours = adapted("text", dora=dora, dropout=0.4)
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    theirs = in_peft(hf, tmp_path / "a", trainable=True).train()
    batch = text_batch(hf)
    with float64_islands():
        found = []
        for model in (theirs, ours.train()):
            torch.manual_seed(7)
            found.append(steps(model, [batch]))
        assert_same(found[1], found[0], PEFT)
        torch.manual_seed(8)
        assert distance(steps(ours, [batch])["loss 0"], found[0]["loss 0"]) > 1e-6


def scaled_twice(model, monkeypatch):
    for layer in adapted_layers(model).values():
        layer.scaling **= 2


def norm_with_a_gradient(model, monkeypatch):
    def norms(self, weight, A, B, backend="reference"):
        with torch.enable_grad():
            return torch.linalg.norm(weight + self.scaling * (B @ A), dim=1)

    monkeypatch.setattr(AdaptedLinear, "row_norms", norms)


def norm_of_the_weight_alone(model, monkeypatch):
    monkeypatch.setattr(AdaptedLinear, "row_norms", lambda self, w, A, B, backend="": torch.linalg.norm(w, dim=1))


@pytest.mark.parametrize("wrong", [scaled_twice, norm_with_a_gradient, norm_of_the_weight_alone])
def test_wrong_adapters_are_seen(wrong, monkeypatch):
    _, model = adapted("text", dora=True)
    batch = text_batch(model)
    with float64_islands():
        right = trained(model.train(), batch)
        wrong(model, monkeypatch)
        found = trained(model, batch)
    assert max(distance(found[name], right[name]) for name in right) > 1e-3


def test_biases_stay_outside_of_doras_scale(tmp_path, calls):
    hf = build("vlm", dtype=torch.float64, multimodal_projector_bias=True)
    ours = like(hf)
    add_adapters(ours, AdapterConfig(rank=4, dora=True, dtype=None), targets_of(ours, text=False, projector=True))
    disturb(ours)
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    theirs, batch = in_peft(hf, tmp_path / "a", trainable=True).train(), batch_for(hf)
    with float64_islands():
        want = steps(theirs, [batch])
        assert_same(steps(copy.deepcopy(ours).train(), [batch]), want, PEFT)
        m3kernels.patch(ours)
        assert_same(steps(ours.train(), [batch]), want, PEFT)
    assert calls == [1] * 3


@both
def test_peft_reads_what_is_saved(kind, dora, tmp_path):
    hf, ours = adapted(kind, dora=dora)
    save_adapter(ours, tmp_path / "a", base_name_or_path="some/base")
    theirs = in_peft(hf, tmp_path / "a")
    batch = batch_for(hf)
    with float64_islands():
        want, base = logits(theirs, batch), logits(hf, batch)
        assert distance(logits(ours, batch), want) <= PEFT
    assert distance(base, want) > 1e-2
    assert not any(p.requires_grad for p in theirs.parameters())


@both
def test_files_are_those_that_peft_writes(kind, dora, tmp_path):
    """Names, shapes and every key of the config that we write, against PEFT's own of the same adapters."""
    hf, ours = adapted(kind, dora=dora, dropout=0.125)
    hf.name_or_path = "some/base"
    fresh_peft(hf, kind, use_dora=dora, lora_dropout=0.125).save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", base_name_or_path="some/base")
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {n: t.shape for n, t in tensors[0].items()} == {n: t.shape for n, t in tensors[1].items()}
    mine, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert mine.keys() <= theirs.keys()
    # where everything is adapted PEFT shortens its list to bare names; the tensors say which layers there are
    named = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors[1]}
    assert set(mine.pop("target_modules")) == named
    assert mine == {key: theirs[key] for key in mine}
    where = "model.layers.0" if kind == "text" else LAYER
    assert f"base_model.model.{where}.self_attn.q_proj.lora_A.weight" in tensors[0]
    assert (f"base_model.model.{where}.mlp.up_proj.lora_magnitude_vector" in tensors[0]) == dora


def test_adapters_of_the_text_leave_the_vision_tower_alone(tmp_path):
    hf = build("vlm", dtype=torch.float64)
    ours = like(hf)
    names = add_adapters(ours, AdapterConfig(rank=4, dtype=None), targets_of(ours))
    assert len(names) == 14 and all(name.startswith("model.language_model.layers.") for name in names)
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    theirs = in_peft(hf, tmp_path / "a")
    wrapped = [name for name, module in theirs.named_modules() if fused.is_adapted(module)]
    assert len(wrapped) == 14 and not any("vision_tower" in name for name in wrapped)


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_what_peft_saves_is_read(kind, change, tmp_path):
    hf = build(kind, dtype=torch.float64)
    theirs = fresh_peft(hf, kind, **change)
    theirs.save_pretrained(tmp_path / "a")
    ours = like(hf)
    config, targets = adapter_of(tmp_path / "a")
    assert (config.rank, config.dora) == (4, "use_dora" in change) and config.dtype == torch.float64
    assert config.alpha == pytest.approx(12.0 if "use_rslora" in change else 6.0)
    assert sorted(targets) == sorted(targets_of(ours, **PARTS[kind]))
    add_adapters(ours, config, targets)
    load_adapter(ours, tmp_path / "a")
    batch = batch_for(hf)
    with float64_islands():
        assert distance(logits(ours, batch), logits(theirs, batch)) <= PEFT


REFUSED = {
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "another start": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "another rank": ({"r": 8}, "rank 8, the model's adapters 4"),
    "another scaling": ({"lora_alpha": 7}, "scaling 1.75, the model's adapters 1.5"),
    "DoRA": ({"use_dora": True}, "dora True, the model's adapters False"),
    "fewer layers": ({"target_modules": ["q_proj"]}, "lacks model.language_model.layers.0.mlp.down_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused(case, tmp_path):
    change, message = dict(REFUSED[case][0]), REFUSED[case][1]
    hf, ours = adapted("text")
    start = change.pop("init_lora_weights", True)
    fresh_peft(hf, "text", **change).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_adapter(ours, tmp_path / "a")
    assert_same(dict(ours.state_dict()), dict(before), 0.0)


def test_modules_trained_whole_are_saved_beside_the_adapters(tmp_path):
    hf = build("vlm", dtype=torch.float64)
    ours = like(hf)
    add_adapters(ours, AdapterConfig(rank=4, alpha=6, dtype=None), targets_of(ours))
    ours.model.multi_modal_projector.requires_grad_(True)
    disturb(ours)
    with torch.no_grad():
        for parameter in ours.model.multi_modal_projector.parameters():
            parameter.mul_(1.3)
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    wrapped = fresh_peft(hf, "vlm", target_modules=targets_of(ours), modules_to_save=["model.multi_modal_projector"])
    wrapped.save_pretrained(tmp_path / "theirs")
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("a", "theirs")]
    assert {n: t.shape for n, t in tensors[0].items()} == {n: t.shape for n, t in tensors[1].items()}
    assert "base_model.model.model.multi_modal_projector.linear_1.weight" in tensors[0]
    theirs, batch = in_peft(hf, tmp_path / "a"), batch_for(hf)
    again = like(hf)
    add_adapters(again, *adapter_of(tmp_path / "a"))
    load_adapter(again, tmp_path / "a")
    with float64_islands():
        want = logits(theirs, batch)
        assert distance(logits(ours, batch), want) <= PEFT and distance(logits(again, batch), want) <= PEFT


def test_a_module_trained_in_part_has_no_place_in_pefts_format(tmp_path):
    _, ours = adapted("text")
    ours.model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="q_proj.weight is trained beside an adapter"):
        save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    assert not (tmp_path / "a").exists()


def test_a_tied_embedding_has_no_place_in_pefts_format(tmp_path):
    ours = like(build("text", tie_word_embeddings=True))
    add_adapters(ours, AdapterConfig(rank=4), targets_of(ours))
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    ours.lm_head.requires_grad_(True)
    with pytest.raises(AdapterError, match="is the head, too"):
        save_adapter(ours, tmp_path / "b", base_name_or_path=None)
    assert not (tmp_path / "b").exists()


def test_folders_that_are_not_free(tmp_path):
    _, ours = adapted("text")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty"):
        save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    with pytest.raises(CheckpointError, match="no adapter"):
        save_adapter(ours, tmp_path / "a", base_name_or_path=None, overwrite=True)
    assert (tmp_path / "a" / "thesis.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["a"]
    save_adapter(ours, tmp_path / "b", base_name_or_path=None, dtype=torch.bfloat16)
    save_adapter(ours, tmp_path / "b", base_name_or_path="x", overwrite=True, dtype=torch.bfloat16)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_a_full_disk_leaves_the_last_adapter(tmp_path, monkeypatch):
    from m3kernels.models.ministral3 import adapter_files

    _, ours = adapted("text")
    save_adapter(ours, tmp_path / "a", base_name_or_path=None)
    before = load_file(tmp_path / "a" / "adapter_model.safetensors")

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "write_text", full)
    disturb(ours)
    with pytest.raises(OSError, match="No space"):
        save_adapter(ours, tmp_path / "a", base_name_or_path=None, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(load_file(tmp_path / "a" / "adapter_model.safetensors"), before, 0.0)


def test_adapters_start_as_pefts():
    _, ours = adapted("text", torch.float32, dora=True)
    reset_adapters(ours, 5)
    first = {name: p.detach().clone() for name, p in adapter_parameters(ours).items()}
    reset_adapters(ours, 6)
    other = adapter_parameters(ours)
    for name, p in first.items():
        if name.endswith("lora_A"):
            bound = p.shape[1] ** -0.5
            # of 192 and more uniform draws one comes near the bound
            assert 0.9 * bound < p.abs().max() <= bound and abs(p.mean()) < 0.2 * bound
            assert not torch.equal(p, other[name])
        elif name.endswith("lora_B"):
            assert not p.any()
        else:
            weight = ours.get_parameter(name.replace("lora_magnitude", "weight"))
            torch.testing.assert_close(p, weight.square().sum(1).sqrt())
    reset_adapters(ours, 5)
    assert_same({n: p.detach() for n, p in adapter_parameters(ours).items()}, first, 0.0)


@both
def test_fresh_adapters_change_nothing(kind, dora):
    hf = build(kind)
    ours = like(hf)
    names = add_adapters(ours, AdapterConfig(rank=4, dora=dora), targets_of(ours, **PARTS[kind]))
    assert list(adapted_layers(ours)) == names
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == adapter_parameters(ours).keys()
    batch = batch_for(hf)
    assert distance(logits(ours, batch), logits(hf, batch)) <= FP32


@both
def test_adapters_beside_a_checkpoint(dora, tmp_path):
    """They are fp32 beside bf16 weights, and start as reset_adapters(model, 0) has them."""
    folder = save(tmp_path / "hf", dtype=torch.bfloat16)
    add = lambda model: add_adapters(model, AdapterConfig(rank=4, dora=dora), targets_of(model))
    for dtype, want in ((None, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        ours = Ministral3.from_pretrained(folder, dtype=dtype, prepare=add)
        adapters = adapter_parameters(ours)
        assert {p.dtype for p in adapters.values()} == {torch.float32}
        assert {p.dtype for n, p in ours.named_parameters() if n not in adapters} == {want}
        assert all(p.requires_grad == (n in adapters) for n, p in ours.named_parameters())
        before = {name: p.detach().clone() for name, p in adapters.items()}
        reset_adapters(ours, 0)
        assert_same({n: p.detach() for n, p in adapters.items()}, before, 0.0)
    plain = Ministral3.from_pretrained(folder, dtype=torch.float16)
    assert_same({n: ours.state_dict()[n] for n in plain.state_dict()}, dict(plain.state_dict()), 0.0)


def test_adapters_and_kernels_before_the_weights(tmp_path, calls):
    folder = save(tmp_path / "hf", dtype=torch.float32)

    def prepare(model: Ministral3) -> None:
        add_adapters(model, AdapterConfig(rank=4), targets_of(model))
        assert m3kernels.patch(model).patched["lora_linear"] == 14

    ours, plain = Ministral3.from_pretrained(folder, prepare=prepare), Ministral3.from_pretrained(folder)
    batch = batch_for(plain)
    assert distance(logits(ours, batch), logits(plain, batch)) <= FP32
    assert calls == TOGETHER * 2


@both
def test_a_merged_export_is_the_unmerged_model(kind, dora, tmp_path):
    hf, ours = adapted(kind, torch.float64, dora=dora)
    batch = batch_for(hf)
    names = {"text": Ministral3ForCausalLM, "vlm": Mistral3ForConditionalGeneration}
    hf.save_pretrained(tmp_path / "hf")
    ours.save_pretrained(tmp_path / "merged")
    assert ours.adapters is not None
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "hf" / "model.safetensors").keys()
    again = names[kind].from_pretrained(tmp_path / "merged", dtype=torch.float64)
    with float64_islands():
        want, base = logits(ours, batch), logits(hf, batch)
        assert distance(logits(again, batch), want) <= PEFT < 1e-2 < distance(base, want)
        merge_adapters(ours)
        assert ours.adapters is None and not adapter_parameters(ours)
        assert distance(logits(ours, batch), want) <= PEFT
    ours.save_pretrained(tmp_path / "in place")
    assert_same(load_file(tmp_path / "in place" / "model.safetensors"), written, 0.0)
    add_adapters(ours, AdapterConfig(rank=2, dtype=None), targets_of(ours))


@both
def test_merging_rounds_once(dora):
    """bf16 weights are the rounding of what fp32 arithmetic gives; in bf16 arithmetic a fifth of them would be others."""
    ours = like(build("text", dtype=torch.bfloat16))
    add_adapters(ours, AdapterConfig(rank=4, alpha=6, dora=dora), targets_of(ours))
    disturb(ours)
    layer = ours.model.language_model.layers[1].self_attn.o_proj
    weight, A, B = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    total = weight + 1.5 * B @ A
    if dora:
        total *= (layer.lora_magnitude.detach().double() / total.norm(dim=1))[:, None]
    merge_adapters(ours)
    off = (layer.weight != total.bfloat16()).double().mean()
    assert layer.weight.dtype == torch.bfloat16 and off < 0.01
    careless = weight.bfloat16() + (1.5 * B.bfloat16()) @ A.bfloat16()
    assert (careless != total.bfloat16()).double().mean() > 0.05


WRONG = {
    "misspelt": (["model.language_model.layers.0.self_attn.qproj"], "near: .*layers.0.self_attn.q_proj"),
    "bare": (["q_proj"], "no module 'q_proj' to adapt"),
    "head": (["lm_head"], "lm_head takes no adapter here"),
    "embedding": (["model.language_model.embed_tokens"], "embed_tokens takes no adapter here"),
    "norm": ([f"{LAYER}.input_layernorm"], "is a RMSNorm"),
    "none": ([], "no targets"),
}


@pytest.mark.parametrize("case", WRONG)
def test_targets_that_there_are_not(case):
    targets, message = WRONG[case]
    ours = like(build("text"))
    with pytest.raises(AdapterError, match=message):
        add_adapters(ours, AdapterConfig(), [f"{LAYER}.self_attn.k_proj", *targets] if targets else targets)
    assert not adapter_parameters(ours) and all(p.requires_grad for p in ours.parameters())


def test_what_comes_at_the_wrong_time():
    ours = like(build("text"))
    for action in (
        lambda: reset_adapters(ours, 0),
        lambda: merge_adapters(ours),
        lambda: load_adapter(ours, "nowhere"),
    ):
        with pytest.raises(AdapterError, match="no adapters: add_adapters"):
            action()
    add_adapters(ours, AdapterConfig(), targets_of(ours))
    with pytest.raises(AdapterError, match="adapters already: merge_adapters"):
        add_adapters(ours, AdapterConfig(), targets_of(ours))
    with torch.device("meta"):
        empty = Ministral3(ours.config)
    add_adapters(empty, AdapterConfig(), targets_of(empty))
    with pytest.raises(AdapterError, match="meta device: load its weights"):
        reset_adapters(empty, 0)
    for options, message in (({"rank": 0}, "1 to 512"), ({"dropout": 1.0}, "below 1"), ({"alpha": 0}, "above 0")):
        with pytest.raises(AdapterError, match=message):
            AdapterConfig(**options)
    with pytest.raises(ValueError, match="vision=True"):
        targets_of(ours, vision=True)


@both
@pytest.mark.parametrize("mode", [mode for mode in RUN if mode != "none"])
def test_recompute_gives_the_same_bits(mode, dora):
    _, ours = adapted("vlm", dora=dora, dropout=0.3)
    ours.train()
    batch, found = batch_for(ours), {}
    for each in ("none", mode):
        set_recompute(ours, each)
        torch.manual_seed(1)
        found[each] = trained(ours, batch)
    assert_same(found[mode], found["none"], 0.0)


def test_recompute_with_other_masks_is_seen(monkeypatch):
    from m3kernels.models.ministral3 import recompute

    monkeypatch.setattr(recompute, "_draws", lambda layer: False)
    _, ours = adapted("text", dropout=0.3)
    ours.train()
    batch, found = text_batch(ours), {}
    for mode in ("none", "all"):
        set_recompute(ours, mode)
        torch.manual_seed(1)
        found[mode] = trained(ours, batch)
    name = f"{LAYER}.mlp.down_proj.lora_A"
    assert distance(found["all"][name], found["none"][name]) > 1e-2


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the op takes; off the GPU the op's plain reference stands in for the kernels."""
    taken, real = [], fused.lora_linears

    def counting(x, layers, **options):
        taken.append(len(layers))
        return real(x, layers, **options)

    monkeypatch.setattr(fused, "lora_linears", counting)
    monkeypatch.setattr(fused, "_kernels_run", lambda x: True)
    return taken


# q, k, v; o; gate, up; down
TOGETHER = [3, 1, 2, 1]


@interpreter
@pytest.mark.parametrize("dora, order", [(False, "before"), (True, "after")])
def test_kernels(kind, dora, order, calls):
    hf, plain = adapted(kind, torch.float32, dora=dora)
    ours = copy.deepcopy(plain)
    if order == "before":
        ours = like(hf)
        m3kernels.patch(ours)
        add_adapters(ours, plain.adapters, targets_of(ours, **PARTS[kind]))
        ours.load_state_dict(plain.state_dict())
    else:
        report = m3kernels.patch(ours)
        assert report.patched["lora_linear"] == len(adapted_layers(ours)) and not report.skipped
    batch = batch_for(hf)
    got = trained(ours.train(), batch)
    # the tower's layers, the projector's three where they were there to be patched, the text's
    projector = [1] * 3 if order == "after" else []
    assert calls == (TOGETHER * 2 + projector + TOGETHER * 2 if kind == "vlm" else TOGETHER * 2)
    assert_same(got, trained(plain.train(), batch), 4 * FP32)


@interpreter
def test_dropout_in_kernels(calls):
    """The op's masks are a counter's: at the right rate, and the same in the backward, so that a difference quotient fits."""
    _, ours = adapted("text", torch.float32, dropout=0.5)
    m3kernels.patch(ours)
    ours.train()
    batch = text_batch(ours)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        losses.append(ours(**batch).loss.item())
    assert calls[:4] == TOGETHER and len(set(losses)) == 3
    assert len({ours.eval()(**batch).loss.item() for _ in range(2)}) == 1


def test_dora_with_dropout_runs_plain_and_is_logged(calls, caplog, monkeypatch):
    from m3kernels.patching import classes

    monkeypatch.setattr(classes, "_noted", set())
    _, plain = adapted("text", torch.float32, dora=True, dropout=0.5)
    ours = copy.deepcopy(plain)
    report = m3kernels.patch(ours)
    assert "dropout with DoRA" in str(report)
    found = []
    for model in (plain, ours):
        torch.manual_seed(3)
        found.append(trained(model.train(), text_batch(model)))
    assert calls == [] and "dropout with DoRA" in caplog.text
    assert_same(found[1], found[0], FP32)


def test_other_parts_and_ops_leave_adapters_plain(calls):
    _, ours = adapted("vlm", torch.float32)
    report = m3kernels.patch(ours, adapters="vision")
    assert report.patched["lora_linear"] == 14
    trained(ours.train(), batch_for(ours))
    assert calls == TOGETHER * 2
    m3kernels.unpatch(ours)
    calls.clear()
    trained(ours, batch_for(ours))
    assert calls == []


def test_merged_while_patched(calls):
    _, ours = adapted("text", torch.float32, dora=True)
    batch = text_batch(ours)
    want = logits(ours, batch)
    m3kernels.patch(ours)
    merge_adapters(ours)
    assert distance(logits(ours, batch), want) <= FP32 and calls == []


def test_padding_and_kept_logits_are_as_ever():
    _, ours = adapted("text", torch.float32)
    batch = text_batch(ours, padding="right")
    assert kept(batch).sum() < kept(batch).numel() and logits(ours, batch).shape[0] == kept(batch).sum()
    assert isinstance(ours, Ministral3) and not isinstance(ours, PeftModel)
