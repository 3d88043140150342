"""The released sizes on every layout, without memory or ranks: a fake process group, parameters on the meta device."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import debug
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Mistral3Config

from m3kernels.models.ministral3 import Config, Ministral3, sharding
from m3kernels.models.ministral3.loading import local_slices, part_of
from m3kernels.models.ministral3.parallel import parallelize
from m3kernels.models.ministral3.weights import EMBEDDING, HEAD
from m3kernels.parallel import ParallelError, make_mesh
from models import released_rope

# layers, hidden, intermediate, theta, tied
RELEASED = {
    "3b": (26, 3072, 9216, 1e6, True),
    "8b": (34, 4096, 14336, 1e6, False),
    "14b": (40, 5120, 16384, 1e9, False),
}
QUERY_WIDTH, KV_WIDTH, VOCAB = 32 * 128, 8 * 128, 131072
LAYOUTS = list(itertools.product((1, 2, 4, 8), (1, 2)))


def config_of(size: str, vocab: int = VOCAB, layers: int | None = None, tower_layers: int = 24) -> Config:
    depth, hidden, intermediate, theta, tied = RELEASED[size]
    text = {
        "model_type": "ministral3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": released_rope(rope_theta=theta),
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": tower_layers,
        "num_attention_heads": 16,
        "head_dim": 64,
        "patch_size": 14,
        "image_size": 1540,
        "hidden_act": "silu",
    }
    options = {"image_token_index": 10, "tie_word_embeddings": tied, "multimodal_projector_bias": False}
    return Config.from_hf(Mistral3Config(text_config=text, vision_config=vision, **options))


def on_meta(config: Config) -> Ministral3:
    with torch.device("meta"):
        return Ministral3(config).to(torch.bfloat16)


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of many: collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        # what DTensor remembers of shardings holds meshes, whose groups end here
        debug._clear_sharding_prop_cache()
        dist.destroy_process_group()


def sharded(config: Config, tp: int, dp: int) -> dict[str, Tensor]:
    """The parameters of this rank."""
    model = on_meta(config)
    parallelize(model, make_mesh(tp, dp, device_type="cpu"))
    return dict(model.named_parameters())


def local_shape(name: str, shape: tuple[int, ...], tp: int, dp: int) -> tuple[int, ...]:
    """By the table: tensor parallelism along the row's dimension, then FSDP2 along the first."""
    sizes, dim = list(shape), sharding.row_of(name).dim
    if dim is not None:
        sizes[dim] //= tp
    sizes[0] //= dp
    return tuple(sizes)


def split_elements(size: str) -> int:
    """Elements that tensor parallelism splits, counted by hand."""
    layers, hidden, intermediate, _, tied = RELEASED[size]
    layer = 2 * QUERY_WIDTH * hidden + 2 * KV_WIDTH * hidden + 3 * intermediate * hidden
    return layers * layer + (1 if tied else 2) * VOCAB * hidden


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize("tp, dp", LAYOUTS)
def test_parts_are_those_of_the_table(size, tp, dp):
    config = config_of(size)
    whole = {name: tuple(p.shape) for name, p in on_meta(config).named_parameters()}
    elements = sum(map(math.prod, whole.values()))
    split = split_elements(size)
    with rank_of(tp * dp - 1, tp * dp):
        parts = sharded(config, tp, dp)
        assert parts.keys() == whole.keys()
        for name, parameter in parts.items():
            assert part_of(parameter).shape == local_shape(name, whole[name], tp, dp), name
            if tp > 1:
                on_tp = getattr(parameter.placements[-1], "dim", None)
                assert on_tp == sharding.row_of(name).dim, (name, parameter.placements)
            if tp > 1 and dp > 1:
                # parts of rows or parts of what is whole; FSDP2's own kind says that tensor parallelism splits first
                assert getattr(parameter.placements[0], "dim", None) == 0, (name, parameter.placements)
        # all sizes divide, so that every rank has as much
        nbytes = sum(part_of(p).nbytes for p in parts.values())
    assert nbytes == 2 * (split // tp + elements - split) // dp


@pytest.mark.parametrize("size, tp, dp", [("8b", *layout) for layout in LAYOUTS[1:]] + [("3b", 8, 2), ("14b", 8, 2)])
def test_slices_of_all_ranks_tile_every_parameter(size, tp, dp):
    """One layer: all are alike."""
    config = config_of(size, layers=1, tower_layers=1)
    boxes: dict[str, list] = {}
    for rank in range(tp * dp):
        with rank_of(rank, tp * dp):
            for name, parameter in sharded(config, tp, dp).items():
                slices = local_slices(parameter)
                shape, begin = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements
                )
                assert [s.start for s in slices] == list(begin), (name, rank)
                assert [s.stop - s.start for s in slices] == list(shape) == list(part_of(parameter).shape), (name, rank)
                boxes.setdefault(name, []).append(tuple((s.start, s.stop) for s in slices))
    for name, parameter in on_meta(config).named_parameters():
        distinct = set(boxes[name])
        copies = tp if sharding.row_of(name).dim is None else 1
        assert all(boxes[name].count(box) == copies for box in distinct), name
        assert not any(overlap(a, b) for a, b in itertools.combinations(distinct, 2)), name
        assert sum(math.prod(b - a for a, b in box) for box in distinct) == parameter.numel(), name


def overlap(a: tuple, b: tuple) -> bool:
    return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b))


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize("tp", [3, 16])
def test_ranks_that_cannot_share_the_heads_are_refused(size, tp):
    message = f"tp={tp} does not divide the 8 key-value heads; allowed: 1, 2, 4, 8. For more ranks raise dp instead"
    with rank_of(0, tp), pytest.raises(ParallelError, match=message):
        sharded(config_of(size, layers=1, tower_layers=1), tp, 1)


@pytest.mark.parametrize("tp, rows", [(2, 131076), (4, 131076), (8, 131080)])
def test_a_vocabulary_with_added_tokens_is_refused_with_the_fix(tp, rows):
    with rank_of(0, tp), pytest.raises(ParallelError, match=f"of 131075: pad it to {rows} rows.*pad_vocab_to={tp}"):
        sharded(config_of("3b", VOCAB + 3, layers=1, tower_layers=1), tp, 1)


@pytest.mark.parametrize("size", ["3b", "8b"])
@pytest.mark.parametrize("tp", [2, 8])
def test_the_fix(size, tp):
    config = config_of(size, VOCAB + 3, layers=1, tower_layers=1)
    config = replace(config, text=replace(config.text, pad_vocab_to=tp))
    with rank_of(tp - 1, tp):
        parts = sharded(config, tp, 1)
        rows = -(-(VOCAB + 3) // tp)
        assert {part_of(parts[name]).shape[0] for name in (EMBEDDING, HEAD) if name in parts} == {rows}
