"""Reading checkpoints: names of every layout, slices, shapes, FP8 against transformers'."""

import json
import shutil

import pytest
import torch
from hf_folders import (
    BLOCK,
    LAYOUTS,
    SIZES,
    bits,
    edit_config,
    fails,
    load,
    model,
    rewrite,
    save,
    save_fp8,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from m3kernels.models.ministral3 import fp8, weights
from m3kernels.models.ministral3.files import CheckpointError
from m3kernels.models.ministral3.weights import HEAD, Checkpoint, expected_shapes, runtime_name
from models import text_config, vision_config

Q = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each size and layout, made once; not to be changed."""
    made = {}

    def get(size="8b", layout="disk"):
        if (size, layout) not in made:
            made[size, layout] = save(tmp_path_factory.mktemp(f"{size}-{layout}"), size, layout)
        return made[size, layout]

    return get


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    made = {}

    def get(scale):
        if scale not in made:
            made[scale] = save_fp8(tmp_path_factory.mktemp(f"fp8-{scale}"), scale)
        return made[scale]

    return get


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the 8B folder to be damaged."""
    return shutil.copytree(saved(), tmp_path / "copy")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_layout_reads_by_runtime_names(saved, size, layout):
    checkpoint = Checkpoint.open(saved(size, layout))
    state = {runtime_name(name): tensor for name, tensor in model(size, layout).state_dict().items()}
    if SIZES[size]["tied"]:
        del state[HEAD]
    assert checkpoint.tied == SIZES[size]["tied"] and len(checkpoint.files) > 1
    assert sorted(checkpoint.names) == sorted(state) == sorted(checkpoint.check())
    for name, tensor in state.items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == torch.bfloat16
        assert torch.equal(bits(checkpoint.read(name)), bits(tensor)), name
    theta = checkpoint.config.get("text_config", checkpoint.config)["rope_parameters"]["rope_theta"]
    assert theta == (1e9 if size == "14b" else 500.0)


def test_a_single_file_reads_too(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path, shard="1GB"))
    assert list(checkpoint.files) == ["model.safetensors"] and checkpoint.check()


def test_runtime_names_are_those_that_transformers_loads():
    assert runtime_name("language_model.model.embed_tokens.weight") == "model.language_model.embed_tokens.weight"
    assert runtime_name("language_model.lm_head.weight") == runtime_name("lm_head.weight") == HEAD
    assert runtime_name("vision_tower.ln_pre.weight") == "model.vision_tower.ln_pre.weight"
    assert runtime_name("model.layers.3.mlp.up_proj.weight") == "model.language_model.layers.3.mlp.up_proj.weight"
    for size in SIZES:
        for name in model(size).state_dict():
            assert runtime_name(name) == name


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_slices_equal_the_whole_tensors(saved, data):
    checkpoint = Checkpoint.open(saved())
    name = data.draw(st.sampled_from(checkpoint.names))
    whole = checkpoint.read(name)
    index = []
    for size in whole.shape[: data.draw(st.integers(0, whole.dim()))]:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    dtype = data.draw(st.sampled_from([None, torch.float32, torch.float64]))
    part = checkpoint.read(name, tuple(index), dtype)
    assert part.dtype == (dtype or torch.bfloat16) and torch.equal(part, whole[tuple(index)].to(part.dtype))


@pytest.mark.parametrize("scale", ["tensor", "block"])
def test_only_the_asked_part_is_read(saved, quantised, scale, monkeypatch):
    taken = []
    opened = weights.safe_open

    class Tracking:
        def __init__(self, *args, **options):
            self.file = opened(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exception):
            return self.file.__exit__(*exception)

        def get_tensor(self, name):
            taken.append((name, tuple(self.file.get_slice(name).get_shape())))
            return self.file.get_tensor(name)

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Part:
                def __getitem__(self, index):
                    taken.append((name, tuple(part[index].shape)))
                    return part[index]

            return Part()

    checkpoint = Checkpoint.open(quantised(scale))
    monkeypatch.setattr(weights, "safe_open", Tracking)
    assert checkpoint.read(Q, (slice(3, 9), slice(0, 5))).shape == (6, 5)
    source = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert taken[0] == (source, (6, 5)) and [name for name, _ in taken[1:]] == [source + "_scale_inv"]


@pytest.mark.parametrize("make", ["saved", "fp8"])
def test_open_negative_and_empty_slices(saved, quantised, make):
    checkpoint = Checkpoint.open(saved() if make == "saved" else quantised("block"))
    whole = checkpoint.read(Q)
    for index in ((slice(-3, None),), (slice(None, -1), slice(-4, -2)), (slice(5, 5),), (slice(None), slice(9, 9))):
        part = checkpoint.read(Q, index)
        assert part.dtype == whole.dtype and part.shape == whole[index].shape and torch.equal(part, whole[index])


def test_an_index_must_be_slices_of_step_1(saved):
    checkpoint = Checkpoint.open(saved())
    for index in ((0,), (slice(0, 4, 2),), (slice(None),) * 3):
        with pytest.raises(CheckpointError, match="no tuple of slices"):
            checkpoint.read(Q, index)
    with pytest.raises(CheckpointError, match="no tensor model.nothing"):
        checkpoint.read("model.nothing")


class TestShapes:
    RELEASED = {
        "3b": (26, 3072, 9216, True, 1e6),
        "8b": (34, 4096, 14336, False, 1e6),
        "14b": (40, 5120, 16384, False, 1e9),
    }

    def config(self, size, text_only):
        from transformers import Mistral3Config

        layers, hidden, intermediate, tied, theta = self.RELEASED[size]
        text = text_config(
            vocab_size=131072,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
        )
        text.rope_parameters["rope_theta"] = theta
        vision = vision_config(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        )
        whole = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        return (text if text_only else whole), tied

    @pytest.mark.parametrize("text_only", [False, True])
    @pytest.mark.parametrize("size", RELEASED)
    def test_released_sizes_equal_transformers_on_meta(self, size, text_only):
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        config, tied = self.config(size, text_only)
        shapes = expected_shapes(json.loads(config.to_json_string()), tied)
        with torch.device("meta"):
            theirs = (AutoModelForCausalLM if text_only else AutoModelForImageTextToText).from_config(config)
        theirs = {runtime_name(name): tuple(p.shape) for name, p in theirs.named_parameters()}
        assert shapes == theirs
        layers, hidden, intermediate, tied, _ = self.RELEASED[size]
        prefix = f"model.language_model.layers.{layers - 1}."
        assert shapes[prefix + "self_attn.q_proj.weight"] == (4096, hidden)
        assert shapes[prefix + "self_attn.v_proj.weight"] == (1024, hidden)
        assert shapes[prefix + "self_attn.o_proj.weight"] == (hidden, 4096)
        assert shapes[prefix + "mlp.down_proj.weight"] == (hidden, intermediate)
        assert shapes["model.language_model.embed_tokens.weight"] == (131072, hidden)
        assert f"model.language_model.layers.{layers}.input_layernorm.weight" not in shapes
        assert (HEAD in shapes) != tied
        if not text_only:
            assert shapes["model.multi_modal_projector.patch_merger.merging_layer.weight"] == (1024, 4096)
            assert shapes["model.multi_modal_projector.linear_1.weight"] == (hidden, 1024)

    def test_a_projector_with_biases(self):
        config, _ = self.config("3b", False)
        config = json.loads(config.to_json_string())
        shapes = expected_shapes({**config, "multimodal_projector_bias": True, "spatial_merge_size": 3}, tied=False)
        assert shapes["model.multi_modal_projector.linear_2.bias"] == (3072,)
        assert shapes["model.multi_modal_projector.patch_merger.merging_layer.weight"] == (1024, 9216)

    def test_missing_extra_and_misshapen_tensors_are_named(self, folder):
        def damage(held):
            held.pop("language_model.model.norm.weight", None)
            for name in list(held):
                if name.endswith("layers.0.mlp.up_proj.weight"):
                    held[name] = held[name].T.contiguous()
                if name == "language_model.lm_head.weight":
                    held["surplus.weight"] = held[name].clone()
            return held

        rewrite(folder, damage)
        fails(
            folder,
            "missing: model.language_model.norm.weight",
            "not in this model: surplus.weight",
            "mlp.up_proj.weight is [60, 84], config.json says [84, 60]",
            check=True,
        )

    def test_a_head_that_is_missing_is_named(self, folder, saved):
        rewrite(folder, lambda held: {k: v for k, v in held.items() if "lm_head" not in k})
        assert Checkpoint.open(folder).tied
        fails(folder, "missing: lm_head.weight", check=True)
        # flags stand at two levels: true at either means that a head may be absent
        edit_config(folder, tie_word_embeddings=True)
        assert HEAD not in Checkpoint.open(folder).check()

    def test_a_checkpoint_with_a_head_is_never_tied(self, folder):
        edit_config(folder, tie_word_embeddings=True)
        checkpoint = Checkpoint.open(folder)
        assert not checkpoint.tied and HEAD in checkpoint.check()


class TestFP8:
    @pytest.mark.parametrize("scale", ["tensor", "one", "block"])
    def test_reads_what_transformers_dequantises(self, quantised, scale):
        checkpoint = Checkpoint.open(quantised(scale))
        theirs = load(quantised(scale)).state_dict()
        assert sorted(checkpoint.check()) == sorted(theirs) and checkpoint.dtype(Q) == torch.bfloat16
        assert not any("scale" in name for name in checkpoint.names)
        for name, tensor in theirs.items():
            assert torch.equal(bits(checkpoint.read(name)), bits(tensor)), name

    def test_a_product_in_bf16_would_be_seen(self, quantised):
        held, checkpoint = tensors(quantised("tensor")), Checkpoint.open(quantised("tensor"))
        scaled = [name for name in held if name + "_scale_inv" in held]
        wrong = {name: held[name].to(torch.bfloat16) * held[name + "_scale_inv"].to(torch.bfloat16) for name in scaled}
        assert any(not torch.equal(checkpoint.read(runtime_name(name)), wrong[name]) for name in scaled)

    @given(data=st.data())
    @settings(max_examples=30, deadline=None)
    def test_slices_take_their_own_blocks(self, quantised, data):
        checkpoint = Checkpoint.open(quantised("block"))
        whole = checkpoint.read(Q, dtype=torch.float32)
        index = tuple(
            slice(start, data.draw(st.integers(start + 1, size)))
            for size in whole.shape
            for start in [data.draw(st.integers(0, size - 1))]
        )
        assert torch.equal(checkpoint.read(Q, index, torch.float32), whole[index])

    def test_blocks_at_the_edge_may_be_cut_off(self):
        weight = torch.randn(70, 50).to(torch.float8_e4m3fn)
        scale = torch.rand(3, 2) + 0.5
        spread = fp8.spread(scale, (BLOCK, BLOCK), range(70), range(50))
        assert spread.shape == weight.shape and spread[69, 49] == scale[2, 1] and spread[31, 31] == scale[0, 0]

    @given(
        scale=st.floats(2**-20, 2**10, width=32),
        dtype=st.sampled_from([torch.bfloat16, torch.float32]),
        scale_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_value_survives_bf16_and_comes_back(self, scale, dtype, scale_dtype):
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        values = values[~values.float().isnan()].reshape(1, -1)
        scale = torch.tensor(scale).to(scale_dtype)
        weight = fp8.dequantize(values, fp8.spread(scale, fp8.BLOCK, range(1), range(254)), dtype)
        back, kept, outgrown = fp8.quantize(weight, scale, fp8.BLOCK)
        assert not outgrown and torch.equal(kept, scale) and torch.equal(bits(back), bits(values))

    def test_only_a_block_that_has_outgrown_its_scale_gets_another(self):
        weight, scale = torch.full((64, 64), 0.5), torch.full((2, 2), 0.01)
        weight[40, 3] = 10.0
        quantized, new, outgrown = fp8.quantize(weight, scale, (32, 32))
        assert outgrown and new.flatten().tolist() == pytest.approx([0.01, 0.01, 10 / 448, 0.01])
        back = fp8.dequantize(quantized, fp8.spread(new, (32, 32), range(64), range(64)), torch.float32)
        assert (back - weight).abs().max() < 0.5 / 16 and back[40, 3] == pytest.approx(10.0)

    def test_zeros_with_a_scale_of_zero(self):
        quantized, _, outgrown = fp8.quantize(torch.zeros(4, 4), torch.tensor(0.0), fp8.BLOCK)
        assert not outgrown and (quantized.float() == 0).all()

    @pytest.mark.parametrize(
        ("shape", "says"), [(None, "_scale_inv is missing"), ((3, 1), "it must be a scalar, [1] or [3, 2]")]
    )
    def test_bad_scales_are_named(self, quantised, tmp_path, shape, says):
        folder = shutil.copytree(quantised("block"), tmp_path / "copy")

        def damage(held):
            for name in list(held):
                if name.endswith("layers.0.self_attn.q_proj.weight_scale_inv"):
                    held.pop(name)
                    held |= {name: torch.ones(shape)} if shape else {}
            return held

        rewrite(folder, damage)
        fails(folder, "language_model.model.layers.0.self_attn.q_proj.weight", says)

    def test_scales_of_no_weight_are_named(self, quantised, tmp_path):
        folder = shutil.copytree(quantised("tensor"), tmp_path / "copy")
        rewrite(
            folder, lambda held: {k.replace("0.mlp.up_proj.activ", "0.mlp.uq_proj.activ"): v for k, v in held.items()}
        )
        fails(folder, "scales of no weight: model.language_model.layers.0.mlp.uq_proj.activation_scale", check=True)
