"""Every collective equals the same arithmetic in one process, forward and backward, in fp64; what must not pass does not."""

import pytest
import torch
import torch.distributed as dist
from pool import run

from m3kernels.parallel import (
    all_gather_tokens,
    all_reduce_max,
    all_reduce_sum,
    copy_to_ranks,
    rank_in,
    reduce_scatter_tokens,
    size_of,
)

RANKS = [1, 2, 4]
T, D, F = 12, 6, 8
EXACT = {"rtol": 0, "atol": 1e-12}


def inputs():
    g = torch.Generator().manual_seed(1)
    shapes = ((T, D), (F, D), (D, F), (T, D), (D,))
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]


def mine(x, dim=0):
    """This rank's part, a leaf that wants a gradient."""
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone().requires_grad_()


def whole(x):
    return x.clone().requires_grad_()


def block(x_TD, up_FD, down_DF, norm_D):
    return torch.tanh(x_TD * norm_D @ up_FD.T) @ down_DF.T


def reference():
    x, up, down, dy, norm = inputs()
    leaves = [whole(t) for t in (x, up, down, norm)]
    y = block(*leaves)
    y.backward(dy)
    return y.detach(), *(leaf.grad for leaf in leaves)


def sequence_parallel(leave_out=()):
    """The block with its tokens sharded outside and its width sharded inside; (y, dx, dup, ddown) of this rank, dnorm Partial."""
    x, up, down, dy, norm = inputs()
    group = dist.group.WORLD
    x_tD, up_fD, down_Df, norm_D = mine(x), mine(up), mine(down, 1), whole(norm)
    gathered_TD = all_gather_tokens(x_tD * norm_D, group)
    hidden_Tf = torch.tanh(gathered_TD @ up_fD.T)
    y_tD = reduce_scatter_tokens(hidden_Tf @ down_Df.T, group)
    y_tD.backward(mine(dy).detach())
    dnorm_D = norm_D.grad if "dnorm" in leave_out else all_reduce_sum(norm_D.grad, group)
    return y_tD.detach(), x_tD.grad, up_fD.grad, down_Df.grad, dnorm_D


def replicated(leave_out=()):
    """The block with all tokens on every rank and its width sharded."""
    x, up, down, dy, norm = inputs()
    group = dist.group.WORLD
    x_TD, up_fD, down_Df, norm_D = whole(x), mine(up), mine(down, 1), whole(norm)
    copied_TD = x_TD * norm_D if "copy" in leave_out else copy_to_ranks(x_TD * norm_D, group)
    y_TD = all_reduce_sum(torch.tanh(copied_TD @ up_fD.T) @ down_Df.T, group)
    y_TD.backward(dy)
    return y_TD.detach(), x_TD.grad, up_fD.grad, down_Df.grad, norm_D.grad


def close(found, wanted) -> bool:
    return all(torch.allclose(f, w, **EXACT) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("ranks", RANKS)
def test_sequence_parallel_equals_one_process(ranks):
    results = run(ranks, sequence_parallel)
    y, dx, dup = (torch.cat(parts) for parts in list(zip(*results))[:3])
    assert close((y, dx, dup, torch.cat([r[3] for r in results], 1)), reference()[:4])
    assert all(close([r[4]], reference()[4:]) for r in results)


@pytest.mark.parametrize("ranks", RANKS)
def test_replicated_tokens_equal_one_process(ranks):
    y, dx, dup, ddown, dnorm = reference()
    results = run(ranks, replicated)
    for found in results:
        assert close((found[0], found[1], found[4]), (y, dx, dnorm))
    assert close((torch.cat([r[2] for r in results]), torch.cat([r[3] for r in results], 1)), (dup, ddown))


def test_a_missing_collective_shows():
    y, dx, _, _, dnorm = reference()
    partial = run(2, sequence_parallel, ("dnorm",))[0]
    assert not close([partial[4]], [dnorm])
    alone = run(2, replicated, ("copy",))[0]
    assert close([alone[0]], [y]) and not close([alone[1]], [dx])


def second_derivatives():
    group = dist.group.WORLD
    x = mine(inputs()[0])

    def f(x_tD):
        return reduce_scatter_tokens(torch.tanh(all_gather_tokens(x_tD, group)) ** 3, group)

    found = torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(found.sum(), x)[0]
    t = x.detach().requires_grad_()
    n = dist.get_world_size()
    wanted = torch.autograd.grad(n * (torch.tanh(t) ** 3).sum(), t, create_graph=True)[0]
    return close((found, second), (wanted, torch.autograd.grad(wanted.sum(), t)[0]))


def test_differentiable_twice():
    assert run(2, second_derivatives) == [True, True]


def values(dtype, device):
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.arange(8).view(4, 2).add(rank).to(device, dtype)
    before = x.clone()
    found = (all_gather_tokens(x, group), reduce_scatter_tokens(x, group), all_reduce_sum(x, group),
             all_reduce_max(x, group), copy_to_ranks(x, group))  # fmt: skip
    strided = all_gather_tokens(x.t(), group), reduce_scatter_tokens(x.t(), group)
    assert torch.equal(x, before)
    found, strided = ([t.cpu() for t in tensors] for tensors in (found, strided))
    return found, strided, (rank_in(group), size_of(group))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_values_and_dtypes(dtype, device):
    x = torch.arange(8).view(4, 2)
    for rank, (found, strided, place) in enumerate(run(2, values, dtype, device)):
        both, total = torch.cat([x, x + 1]), 2 * x + 1
        wanted = both, total[2 * rank :][:2], total, x + 1, x + rank
        for f, w in zip(found, wanted, strict=True):
            assert f.dtype == dtype and f.is_contiguous() and torch.equal(f, w.to(dtype))
        assert torch.equal(strided[0], torch.cat([x.t(), x.t() + 1]).to(dtype))
        assert torch.equal(strided[1], total.t()[rank : rank + 1].to(dtype))
        assert place == (rank, 2)


def mixed_backends():
    """As ``init_process_group()`` makes its groups: a backend for each type of device."""
    group = dist.new_group(backend="cpu:gloo")
    return reduce_scatter_tokens(torch.arange(4), group).tolist()


def test_a_group_of_several_backends():
    assert run(2, mixed_backends) == [[0, 2], [4, 6]]


def no_gradient_of_max():
    x = torch.ones(2, requires_grad=True)
    return all_reduce_max(x, dist.group.WORLD).requires_grad or all_reduce_max(x, None).requires_grad


def test_max_has_no_gradient():
    assert run(2, no_gradient_of_max) == [False, False]


def refused(shape):
    reduce_scatter_tokens(torch.zeros(shape), dist.group.WORLD)


@pytest.mark.parametrize(("shape", "said"), [((5, 3), r"\(5, 3\)"), ((), r"\(\)")])
def test_tokens_that_do_not_divide_are_refused(shape, said):
    with pytest.raises(ValueError, match=f"2 ranks, got {said}"):
        run(2, refused, shape)


def one_rank():
    x = torch.randn(5, 3)
    functions = (all_gather_tokens, reduce_scatter_tokens, all_reduce_sum, copy_to_ranks)
    return all(f(x, g) is x for f in functions for g in (None, dist.group.WORLD)), size_of(None), rank_in(None)


def test_no_group_and_a_group_of_one_are_the_identity():
    assert run(1, one_rank) == [(True, 1, 0)]
