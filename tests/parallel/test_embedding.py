"""The vocabulary-parallel embedding equals ``F.embedding`` on one process, in fp64, forward and backward."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import run

from m3kernels.parallel import embedding, reduce_scatter_tokens, vocab_parallel_embedding

V, D, T = 20, 6, 16


def inputs():
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    # most ids lie in the first quarter: some ranks look up nothing at all
    ids = torch.randint(0, V // 4, (T,), generator=g)
    ids[3], ids[7] = V - 1, V // 2
    return ids, weight, torch.randn(T, D, generator=g, dtype=torch.float64)


def reference(padding_idx=None):
    ids, weight, dy = inputs()
    weight.requires_grad_()
    x = F.embedding(ids, weight, padding_idx)
    x.backward(dy)
    return x.detach(), weight.grad


def sharded(padding_idx=None, wrong_start=False):
    ids, weight, dy = inputs()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if wrong_start:
        embedding.rank_in = lambda group: (rank + 1) % ranks
    try:
        weight_vD = weight.chunk(ranks)[rank].clone().requires_grad_()
        x_TD = vocab_parallel_embedding(ids, weight_vD, dist.group.WORLD, padding_idx=padding_idx)
        x_tD = reduce_scatter_tokens(x_TD, dist.group.WORLD)
        x_tD.backward(dy.chunk(ranks)[rank])
    finally:
        embedding.rank_in = rank_in
    return x_tD.detach(), weight_vD.grad


rank_in = embedding.rank_in


def close(results, wanted):
    found = [torch.cat(parts) for parts in zip(*results)]
    return all(torch.allclose(f, w, rtol=0, atol=1e-12) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("padding_idx", [None, 1, V - 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_one_process(ranks, padding_idx):
    assert close(run(ranks, sharded, padding_idx), reference(padding_idx))


def test_a_wrong_start_row_shows():
    assert not close(run(2, sharded, None, True), reference())


def test_no_group_is_an_embedding():
    ids, weight, _ = inputs()
    assert torch.equal(vocab_parallel_embedding(ids.view(4, 4), weight, None), F.embedding(ids.view(4, 4), weight))


def other_ranks_rows():
    weight = torch.full((4, 2), float("nan") if dist.get_rank() else 1.0, requires_grad=True)
    x = vocab_parallel_embedding(torch.tensor([0, 3]), weight, dist.group.WORLD)
    x.backward(torch.ones_like(x))
    return x.detach(), weight.grad


def test_rows_of_other_ranks_are_exactly_zero():
    (x0, g0), (x1, g1) = run(2, other_ranks_rows)
    assert torch.equal(x0, torch.ones(2, 2)) and torch.equal(x1, torch.zeros(2, 2))
    assert torch.equal(g0.sum(1), torch.tensor([2.0, 0, 0, 2])) and not g1.any()


def with_id(value):
    vocab_parallel_embedding(torch.tensor([0, value]), torch.zeros(4, 2), dist.group.WORLD)


@pytest.mark.parametrize("value", [-1, 8])
def test_an_id_outside_is_refused(value):
    with pytest.raises(IndexError, match=r"outside \[0, 8\)"):
        run(2, with_id, value)
