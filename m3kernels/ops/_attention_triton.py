"""Launchers of the Triton attention kernels: tile sizes, strides, grids. Runs wherever Triton does."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._attention_bwd_kernels import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    attention_delta_kernel,
    attention_seen_by_kernel,
)
from m3kernels.ops._attention_kernels import attention_fwd_kernel
from m3kernels.ops._common import cdiv, launch, next_power_of_2
from m3kernels.ops._triton import INTERPRET

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys of one tile, warps, and load stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    def meta(self) -> dict:
        return {"BLOCK_Q": self.queries, "BLOCK_K": self.keys, "num_warps": self.warps, "num_stages": self.stages}


# measured on an H100 (docs/attention.md)
FORWARD = {64: TileConfig(128, 64, 4, 3), 128: TileConfig(128, 128, 8, 3), 256: TileConfig(64, 64, 8, 2)}
DKDV = {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(32, 32, 8, 1)}
DQ = {64: TileConfig(64, 64, 4, 2), 128: TileConfig(128, 64, 8, 3), 256: TileConfig(32, 32, 8, 1)}
# fp32 tiles are twice the bytes, and the interpreter wants few programs of any size
WIDE = TileConfig(32, 32, 4, 1)


def tile_config(table: dict[int, TileConfig], head_dim: int, dtype: torch.dtype) -> TileConfig:
    if dtype == torch.float32 or INTERPRET:
        return WIDE
    return table[max(64, next_power_of_2(head_dim))]


@dataclass(frozen=True)
class Problem:
    """What a call asks for, besides its tensors.

    Attributes:
        cu_q, cu_k: (sequences + 1,) int32, rows of packed sequences; None: a batch of full rows.
        ranges: (B, S, 2) int32, the keys [lo, hi) that each query sees, in place of ``causal`` and ``window``.
        longest_q, longest_k: rows of the longest sequence.
        window: newest keys that a query sees; 0: all.
    """

    cu_q: Tensor | None
    cu_k: Tensor | None
    ranges: Tensor | None
    longest_q: int
    longest_k: int
    causal: bool
    window: int
    scale: float
    deterministic: bool

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    def sequences(self, q: Tensor) -> int:
        return self.cu_q.numel() - 1 if self.packed else q.shape[0]


def _meta(problem: Problem, q: Tensor, k: Tensor) -> dict:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "DIM": q.shape[3],
        "BLOCK_DIM": max(16, next_power_of_2(q.shape[3])),
        "CAUSAL": problem.causal,
        "WINDOW": problem.window > 0,
        "RANGES": problem.ranges is not None,
        "PACKED": problem.packed,
        # TF32 would round fp32 inputs to 10 bits
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _strides(problem: Problem, *tensors: Tensor) -> list[int]:
    """(batch, head, seq) strides of each; a packed batch is one row, whose sequences cu_seqlens finds."""
    found = []
    for t in tensors:
        found.append(0 if problem.packed else t.stride(0))
        found += t.stride()[1:-1] if t.dim() == 4 else t.stride()[1:2]
    return found


def dense(x: Tensor) -> Tensor:
    """Unit stride in the last dimension, by a copy where it must be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def addressable(x: Tensor) -> Tensor:
    """``x``, copied where the copy engine could not read it: it wants dense rows, and 16-byte strides and addresses."""
    fits = x.stride(3) == 1 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()


def like(x: Tensor) -> Tensor:
    """(B, H, S, D) seen through (B, S, H, D) memory, as projections take it."""
    batch, heads, seq, dim = x.shape
    return x.new_empty((batch, seq, heads, dim)).transpose(1, 2)


def _pointers(problem: Problem, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(cu_q, cu_k, ranges); a kernel that reads none of one gets ``spare``."""
    return tuple(spare if t is None else t for t in (problem.cu_q, problem.cu_k, problem.ranges))


def forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out like q, log-sum-exp (B, H, S) in fp32)."""
    q, k, v = dense(q), dense(k), dense(v)
    out, lse = like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    config = tile_config(FORWARD, q.shape[3], q.dtype)
    launch(
        "attention",
        attention_fwd_kernel,
        (cdiv(problem.longest_q, config.queries), q.shape[1], problem.sequences(q)),
        *(q, k, v, out, lse, *_pointers(problem, lse)),
        *_strides(problem, q, k, v, out, lse),
        *(problem.longest_q, problem.longest_k, problem.scale, problem.window),
        **_meta(problem, q, k),
        **config.meta(),
    )
    return out, lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem):
    """(dq, dk, dv), each like its tensor; the same bits on every run."""
    dq, dk, dv = like(q), like(k), like(v)
    dout, q, k, v = dense(dout), dense(q), dense(k), dense(v)
    (batch, heads, seq, dim), kv_heads = q.shape, k.shape[1]
    meta = _meta(problem, q, k)
    delta = torch.empty_like(lse)
    launch(
        "attention backward (delta)",
        attention_delta_kernel,
        (cdiv(seq, 64), heads, batch),
        *(out, dout, delta),
        *(*out.stride()[:3], *dout.stride()[:3], *delta.stride()[:2], seq),
        DIM=dim,
        BLOCK_DIM=meta["BLOCK_DIM"],
        BLOCK=64,
    )
    pointers = _pointers(problem, lse)
    scalars = (problem.longest_q, problem.longest_k, problem.scale, problem.window)
    config = tile_config(DKDV, dim, q.dtype)
    tiles = cdiv(problem.longest_k, config.keys)
    seen_by = lse
    if problem.ranges is not None:
        seen_by = torch.empty((batch, tiles, 2), dtype=torch.int32, device=q.device)
        lengths = (problem.longest_q, problem.longest_k)
        sizes = {"BLOCK_Q": 32 if INTERPRET else 1024, "BLOCK_K": config.keys}
        launch(
            "attention backward", attention_seen_by_kernel, (tiles, batch), problem.ranges, seen_by, *lengths, **sizes
        )
    launch(
        "attention backward (dk, dv)",
        attention_bwd_dkdv_kernel,
        (tiles, kv_heads, problem.sequences(q)),
        *(q, k, v, dout, lse, delta, dk, dv, *pointers, seen_by),
        *_strides(problem, q, k, v, dout, dk, lse),
        *scalars,
        **meta,
        **config.meta(),
    )
    config = tile_config(DQ, dim, q.dtype)
    launch(
        "attention backward (dq)",
        attention_bwd_dq_kernel,
        (cdiv(problem.longest_q, config.queries), heads, problem.sequences(q)),
        *(q, k, v, dout, lse, delta, dq, *pointers),
        *_strides(problem, q, k, v, dout, dq, lse),
        *scalars,
        **meta,
        **config.meta(),
    )
    return dq, dk, dv
