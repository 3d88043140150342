"""The host's way to LoRA's launches on Hopper, with the launches left out: every argument has a name in its kernel."""

import importlib

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

MODULES = "_linear_launch _lora_dy_launch _lora_x_hopper _lora_sums _dora_scale".split()
FORWARD = ["lora_linear (parts)", "lora_linear (x)", "lora_linear"]
BACKWARD = ["lora_linear backward (shrink)", "lora_linear backward (dy)", "lora_linear", "lora_linear backward"]


@pytest.fixture
def launched(monkeypatch):
    """Names of launches in their order, on a machine that takes itself for an H100."""
    of = lambda name: importlib.import_module(f"m3kernels.ops.{name}")
    names = []

    def check(self, *tensors):
        meta = [name for name in self.meta if name in self.kernel.arg_names]
        count = len(tensors) + len(self.numbers)
        assert not self.blocks or len(tensors) == len(self.blocks)
        assert sorted(self.kernel.arg_names[count:]) == sorted(meta)
        names.append(self.op)

    monkeypatch.setattr(of("_prepared").Prepared, "__call__", check)
    monkeypatch.setattr(of("_lora_products"), "_hopper", lambda device: of("_linear_launch"))
    for name in MODULES:
        monkeypatch.setattr(of(name), "sm_count", lambda device: 132)
    for name in ("_lora_products", "_lora_launch"):
        monkeypatch.setattr(of(name), "overlap_meta", lambda device: {"OVERLAP": True, "launch_pdl": True})
    yield names
    for name in MODULES + ["_lora_launch"]:
        for found in vars(of(name)).values():
            if hasattr(found, "cache_clear"):
                found.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "rank", "count", "dora"),
    [
        (torch.bfloat16, 16, 3, False),
        (torch.bfloat16, 64, 1, False),
        (torch.float32, 16, 2, True),
        (torch.bfloat16, 5, 1, True),
    ],
)
def test_arguments_fit_their_kernels(launched, dtype, rank, count, dora):
    op = importlib.import_module("m3kernels.ops.lora_linear")
    rows, width, ns = 1536, 3072, (3072, 1024, 1024)[:count]
    x, none = torch.randn(rows, width).bfloat16(), [None] * (3 - count)
    weights = [torch.empty(n, width, dtype=torch.bfloat16) for n in ns]
    many_a = [torch.randn(rank, width).to(dtype) for _ in ns]
    many_b = [torch.randn(n, rank).to(dtype) for n in ns]
    magnitudes = [torch.ones(n, dtype=dtype) if dora else None for n in ns] + none
    flat = [t for triple in zip(weights, many_a, many_b) for t in triple] + 3 * none
    scalings, blocks = [2.0] * count, [0, 0] * count
    out = op._forward(x, *flat, *magnitudes, None, None, None, None, None, scalings, 0.0, blocks)
    ys, t, kept = out[:count], out[count], out[count + 1 :]
    assert launched == FORWARD[:1] + ["dora_linear (norm)"] * dora + FORWARD[1:]
    launched.clear()
    grads = op._backward(
        [torch.empty_like(y) for y in ys], x, weights, many_a, many_b, t, ys if dora else [],
        *(kept[:2] if dora else (None, None)), None, scalings, 0.0, [], blocks, True, False, True, dtype,
    )  # fmt: skip
    # the pass over dy makes dA as well where the rank is small
    scaling = ["dora_linear backward"] * dora
    assert launched in [BACKWARD[:1] + scaling + BACKWARD[1:end] for end in (3, 4)]
    sizes = [(rows, width), (count, rank, width), (sum(ns), rank)]
    assert [tuple(g.shape) for g in grads[:3]] == sizes
