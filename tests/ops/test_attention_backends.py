"""The dispatcher, on a pretended H100: order, exactness, refusals. What the backends compute is test_attention.py's."""

from dataclasses import replace

import pytest
import torch

from m3kernels.ops import _attention_backends as backends
from m3kernels.ops._attention_backends import BACKENDS, choose, explain
from m3kernels.ops._attention_triton import Problem


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "INTERPRET", False)
    monkeypatch.setattr(backends, "_asked_of_cudnn", type(backends._asked_of_cudnn)())
    here = {"triton", "hopper", "flash", "cudnn"}
    for name, backend in BACKENDS.items():
        absent = "" if name in here else "not installed"
        monkeypatch.setitem(BACKENDS, name, replace(backend, missing=lambda device, absent=absent: absent))


def problem(causal=True, window=0, packed=False, ranges=False, deterministic=False, same=True) -> Problem:
    cu = torch.tensor([0, 4096], dtype=torch.int32) if packed else None
    by_value = torch.zeros(1, 4096, 2, dtype=torch.int32) if ranges else None
    return Problem(cu, cu if same else cu.clone(), by_value, 4096, 4096, causal, window, 0.1, deterministic)


def tensors(dim=128, dtype=torch.bfloat16, queries=4096, keys=4096):
    make = lambda heads, seq: torch.empty(1, heads, seq, dim, dtype=dtype, device="meta")
    return make(32, queries), make(8, keys)


@pytest.mark.parametrize(
    ("case", "inputs", "forward", "backward"),
    [
        (problem(), tensors(), "hopper", "hopper"),
        (problem(window=100), tensors(), "hopper", "hopper"),
        (problem(packed=True), tensors(), "hopper", "hopper"),
        (problem(deterministic=True), tensors(), "hopper", "triton"),
        (problem(ranges=True, causal=False), tensors(), "triton", "triton"),
        (problem(), tensors(dtype=torch.float32), "triton", "triton"),
        (problem(), tensors(dim=80), "triton", "triton"),
    ],
)
def test_first_call_of_a_shape(h100, case, inputs, forward, backward):
    assert choose("forward", "auto", *inputs, case).name == forward
    assert choose("backward", "auto", *inputs, case).name == backward


def test_cudnn_is_taken_once_a_shape_has_come_back(h100):
    names = [choose("forward", "auto", *tensors(), problem()).name for _ in range(backends.CUDNN_AFTER + 2)]
    assert names == ["hopper"] * backends.CUDNN_AFTER + ["cudnn"] * 2
    growing = {
        choose("forward", "auto", *tensors(queries=4096 + i, keys=4096 + i), problem()).name for i in range(1, 101)
    }
    assert growing == {"hopper"}


@pytest.mark.parametrize(
    ("name", "direction", "case", "inputs", "why"),
    [
        ("cudnn", "forward", problem(), tensors(queries=100), "first key"),
        ("cudnn", "forward", problem(packed=True), tensors(), "packed"),
        ("flash", "forward", problem(packed=True, same=False), tensors(), "other lengths"),
        ("flash", "forward", problem(), tensors(keys=100), "see nothing"),
        ("flash", "backward", problem(deterministic=True), tensors(), "atomics"),
        ("hopper", "backward", problem(), tensors(dim=64), "head_dim"),
        ("fa4", "forward", problem(), tensors(), "not installed"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(h100, name, direction, case, inputs, why):
    with pytest.raises(ValueError, match=why):
        choose(direction, name, *inputs, case)


def test_the_report_names_a_backend_for_every_shape_class(h100):
    lines = explain(torch.device("cpu"), torch.bfloat16)
    assert len(lines) == len(backends.CLASSES) + 2
    assert any("fa4: not installed" in line for line in lines)


def test_the_table_names_backends_that_exist():
    assert backends.table()
    for row in backends.table():
        assert set(row["forward"]) | set(row["backward"]) <= set(BACKENDS)
