"""The named collectives of a tensor-parallel forward: plain functions over a process group, differentiable.

    all_gather_tokens      x_tD -> x_TD    backward: reduce-scatter (sum)
    reduce_scatter_tokens  x_TD -> x_tD    backward: all-gather
    all_reduce_sum         x    -> sum     backward: identity
    copy_to_ranks          x    -> x       backward: all-reduce (sum)
    all_reduce_max         x    -> max     no gradient

Shapes are named by suffixes: T all tokens, t tokens of this rank (T = t * ranks, rank r holds rows r * t to r * t + t),
D hidden, V vocabulary, v vocabulary of this rank. A group of None or of one rank makes each of them the identity: they
return their input itself (``all_reduce_max`` detached). Every rank of a group calls the same functions in the same order
with the same shapes and dtypes, in the backward too. All of them run over NCCL and gloo, and none writes its input.

Which pair belongs together: what is computed from ``all_gather_tokens`` or ``copy_to_ranks`` on each rank (with its own
shard of a weight) is a part of a sum, and leaves through ``reduce_scatter_tokens`` or ``all_reduce_sum``.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# their names since torch 2.13, and before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size_of(group: ProcessGroup | None) -> int:
    """Ranks in ``group``; 1 for None."""
    return 1 if group is None else group.size()


def rank_in(group: ProcessGroup | None) -> int:
    """This process's place in ``group``; 0 for None."""
    return 0 if group is None else group.rank()


def all_gather_tokens(x_tD: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in the order of the ranks.

    Args:
        x_tD: (t, ...) of any dtype that the backend carries; t the same on every rank.
        group: the ranks that hold parts of the tokens; None for this process alone.

    Returns:
        (t * ranks, ...), contiguous. Its gradient is taken as this rank's part of a sum: it is reduce-scattered.

    Raises:
        ValueError: a tensor without a first dimension.
    """
    if size_of(group) == 1:
        return x_tD
    _check_rows("all_gather_tokens", x_tD, 1)
    return _AllGatherTokens.apply(x_tD, group)


def reduce_scatter_tokens(x_TD: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, of which each rank keeps its own rows.

    Args:
        x_TD: (T, ...), this rank's part of the sum; T divisible by the number of ranks.
        group: the ranks to sum over; None for this process alone.

    Returns:
        (T / ranks, ...), contiguous. Its gradient is all-gathered.

    Raises:
        ValueError: T is not divisible by the number of ranks.
    """
    if size_of(group) == 1:
        return x_TD
    _check_rows("reduce_scatter_tokens", x_TD, size_of(group))
    return _ReduceScatterTokens.apply(x_TD, group)


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, on every rank; ``x`` of any shape.

    The gradient passes unchanged: what follows is computed alike on every rank, so each holds the whole gradient already.
    """
    return x if size_of(group) == 1 else _AllReduceSum.apply(x, group)


def copy_to_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """``x`` itself, the same on every rank; its gradient is summed over ranks, each of which uses it with its own shard."""
    return x if size_of(group) == 1 else _CopyToRanks.apply(x, group)


def all_reduce_max(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest value over ranks, on every rank, detached; ``x`` of any shape."""
    return x.detach() if size_of(group) == 1 else _reduced(x.detach(), group, dist.ReduceOp.MAX)


def _check_rows(name: str, x: Tensor, ranks: int) -> None:
    if x.dim() == 0 or x.shape[0] % ranks:
        raise ValueError(
            f"{name}: needs (tokens, ...) with tokens divisible by the group's {ranks} ranks, got {tuple(x.shape)}; "
            "pad the tokens to a multiple"
        )


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    _all_gather(out, x, group=group)
    return out


def _scattered(x: Tensor, group: ProcessGroup) -> Tensor:
    rows = x.shape[0] // group.size()
    if f"{x.device.type}:gloo" in dist.get_backend_config(group):
        # gloo has no reduce-scatter of its own: torch's stand-in is this, where the release has one at all
        return _reduced(x, group, dist.ReduceOp.SUM)[group.rank() * rows :][:rows].clone()
    out = x.new_empty((rows, *x.shape[1:]))
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def _reduced(x: Tensor, group: ProcessGroup, op: dist.ReduceOp) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op, group=group)
    return out


class _AllGatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x_tD, group)

    @staticmethod
    def backward(ctx, dy_TD: Tensor):
        return reduce_scatter_tokens(dy_TD, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x_TD, group)

    @staticmethod
    def backward(ctx, dy_tD: Tensor):
        return all_gather_tokens(dy_tD, ctx.group), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduced(x, group, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return copy_to_ranks(dy, ctx.group), None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return all_reduce_sum(dy, ctx.group), None
