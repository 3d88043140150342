"""Meshes: which ranks are together, and what is said when the processes do not fit."""

import pytest
import torch.distributed as dist
from pool import run

from m3kernels.parallel import ParallelError, group_of, make_mesh


def layout(options, names):
    mesh = make_mesh(**options, device_type="cpu")
    groups = [group_of(mesh, name) for name in names]
    members = [None if g is None else dist.get_process_group_ranks(g) for g in groups]
    return mesh.mesh_dim_names, tuple(mesh.shape), members


@pytest.mark.parametrize(
    ("ranks", "options", "shape", "of_last"),
    [
        (1, {}, (1, 1), [None, None]),
        (4, {}, (4, 1), [[0, 1, 2, 3], None]),
        (4, {"tp": 2}, (2, 2), [[1, 3], [2, 3]]),
        (4, {"tp": 4, "dp": 1}, (1, 4), [None, [0, 1, 2, 3]]),
    ],
)
def test_fsdp_meshes(ranks, options, shape, of_last):
    names, found, members = run(ranks, layout, options, ("dp", "tp"))[-1]
    assert names == ("dp", "tp") and found == shape and members == of_last


def test_hsdp_mesh():
    results = run(4, layout, {"tp": 2, "replicate": 2}, ("dp_replicate", "dp", "tp", "cp"))
    assert results[1] == (("dp_replicate", "dp", "tp"), (2, 1, 2), [[1, 3], None, [0, 1], None])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp": 8}, r"2 processes do not make replicate 1 x dp 1 x tp 8 = 8; start with --nproc-per-node=8, or tp=2$"),
        ({"tp": 4, "dp": 2}, r"replicate 1 x dp 2 x tp 4 = 8; start with --nproc-per-node=8, or tp=1$"),
        ({"tp": 1, "dp": 3}, r"dp 3 x tp 1 = 3; start with --nproc-per-node=3$"),
        ({"tp": 0}, r"tp must be at least 1, got 0"),
        ({"dp": -1}, r"dp must be at least 1, got -1"),
    ],
)
def test_what_does_not_fit_is_said_with_a_fix(options, said):
    with pytest.raises(ParallelError, match=said):
        run(2, layout, options, ())


def test_no_process_group():
    with pytest.raises(ParallelError, match="torchrun"):
        make_mesh()
    assert group_of(None, "tp") is None
