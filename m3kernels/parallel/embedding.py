"""Embedding whose table is split over the vocabulary.

    x[t] = weight[ids[t] - start] where start <= ids[t] < start + v, else 0        start = rank * v

Each rank looks up what it holds; the sum over ranks (``reduce_scatter_tokens`` or ``all_reduce_sum``) is the embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from m3kernels.parallel.collectives import rank_in, size_of


def vocab_parallel_embedding(
    ids_T: Tensor,
    weight_vD: Tensor,
    group: ProcessGroup | None,
    *,
    padding_idx: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """This rank's part of the embedding of ``ids_T``.

    Args:
        ids_T: (...) integers in [0, vocab_size); the same on every rank.
        weight_vD: (v, D), this rank's rows: those from rank * v on. Every rank has as many.
        group: the ranks that hold the table; None for a whole table.
        padding_idx: an id of the whole vocabulary whose row gets no gradient, as in ``nn.Embedding``.
        vocab_size: rows from this one on are padding, which no id may name; None: all v * ranks rows have ids.

    Returns:
        (..., D) in the weight's dtype, zeros for ids of other ranks. Differentiable in ``weight_vD``, whose gradient is
        this rank's alone and whole when the gradient that arrives is that of all tokens.

    Raises:
        IndexError: an id outside [0, vocab_size) (on CUDA a device-side assertion).
    """
    v, start = weight_vD.shape[0], rank_in(group) * weight_vD.shape[0]
    _check_ids(ids_T, v * size_of(group) if vocab_size is None else vocab_size)
    if padding_idx is not None:
        padding_idx = padding_idx - start if start <= padding_idx < start + v else None
    if size_of(group) == 1:
        return F.embedding(ids_T, weight_vD, padding_idx)
    row_T = ids_T - start
    outside_T = (row_T < 0) | (row_T >= v)
    # ids of other ranks go to rows all over the table: in one row they would be a long serial sum of the backward
    x_TD = F.embedding(row_T.remainder(v), weight_vD, padding_idx)
    return x_TD.masked_fill(outside_T[..., None], 0)


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.device.type == "meta":
        return
    inside = ((ids >= 0) & (ids < vocab)).all()
    message = f"vocab_parallel_embedding: an id lies outside [0, {vocab})"
    if ids.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(inside, message)
    elif not inside:
        raise IndexError(f"{message}: found {int(ids.min())} to {int(ids.max())}; check the tokenizer's vocabulary")
