"""The L2 norm of many tensors together, as of all gradients: ``sqrt(sum of squares)``.

Matches ``torch.nn.utils.get_total_norm`` but for the result's dtype, which is fp32 for 16-bit gradients. One program adds up
a chunk of a tensor in fp32, another all of these sums in fp64: no atomics, one order, the same bits in every run.
Everything is read once: 2.3 ms for 3.43e9 bf16 gradients at 3.0 TB/s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import launch, use_triton
from m3kernels.ops._tensor_lists import TYPES, at, chunks_of, upload
from m3kernels.ops._triton import tl, triton


@dataclass(frozen=True)
class ChunkConfig:
    """Elements one program handles, a multiple of four times the lanes it adds up at once; its warps."""

    chunk: int = 32_768
    lanes: int = 1024
    warps: int = 4


CONFIG = ChunkConfig()


@triton.jit
def _squares(address, start, size, DTYPE: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr):
    pointer = at(address, start, DTYPE, WHOLE)
    total = tl.zeros([LANES], dtype=tl.float32)
    for first in range(0, CHUNK if WHOLE else tl.minimum(CHUNK, size - start).to(tl.int32), 4 * LANES):
        for j in tl.static_range(4):
            o = first + j * LANES + tl.arange(0, LANES)
            if WHOLE:
                g = tl.load(pointer + o).to(tl.float32)
            else:
                g = tl.load(pointer + o, mask=start + o < size, other=0.0).to(tl.float32)
            total += g * g
    return tl.sum(total, axis=0)


@triton.jit
def square_sum_kernel(
    p_gradients, p_sizes, p_chunks, p_partial, GRADIENT: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    which, start = tl.load(p_chunks + pid * 2), tl.load(p_chunks + pid * 2 + 1).to(tl.int64) * CHUNK
    address, size = tl.load(p_gradients + which), tl.load(p_sizes + which)
    if (address % 16 == 0) & (start + CHUNK <= size):
        tl.store(p_partial + pid, _squares(address, start, size, GRADIENT, CHUNK, LANES, WHOLE=True))
    else:
        tl.store(p_partial + pid, _squares(address, start, size, GRADIENT, CHUNK, LANES, WHOLE=False))


@triton.jit
def norm_kernel(p_partial, p_norm, n_partial, BLOCK: tl.constexpr):
    # one program, one order; in fp64, for chunks can be a hundred thousand
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, n_partial, BLOCK):
        o = start + tl.arange(0, BLOCK)
        total += tl.load(p_partial + o, mask=o < n_partial, other=0.0).to(tl.float64)
    tl.store(p_norm, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


def global_norm_reference(gradients: Sequence[Tensor]) -> Tensor:
    """Plain PyTorch, in fp32 (fp64 where a gradient is)."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in gradients]))


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """The L2 norm of all gradients together, by two launches (one more for each further dtype).

    Squares are added in fp32 by chunk and in fp64 over chunks, in one order: the same bits in every run.

    Args:
        gradients: at least one; fp32, bf16 or fp16, on one device (fp64 by the reference).
        backend: "auto", "triton" or "reference".

    Returns:
        0-dim fp32 (fp64 where a gradient is), on their device.

    Raises:
        ValueError: no gradients, or mixed devices.
        TypeError: DTensors (the norm of local parts is not that of the whole).
    """
    if not gradients:
        raise ValueError("global_norm: got no gradients")
    if not use_triton("global_norm", backend, *gradients):
        return global_norm_reference(gradients)
    device, kinds = gradients[0].device, {}
    for g in gradients:
        if g.numel():
            kinds.setdefault(g.dtype, []).append(g.contiguous())
    tables = [chunks_of(tuple(g.numel() for g in alike), CONFIG.chunk, device) for alike in kinds.values()]
    partial = torch.empty(sum(len(chunks) for _, chunks in tables), dtype=torch.float32, device=device)
    parts = partial.split([len(chunks) for _, chunks in tables])
    for (dtype, alike), (sizes, chunks), part in zip(kinds.items(), tables, parts):
        addresses, _ = upload([g.data_ptr() for g in alike], [], device)
        options = {"GRADIENT": TYPES[dtype], "CHUNK": CONFIG.chunk, "LANES": CONFIG.lanes}
        options["num_warps"] = CONFIG.warps
        launch("global_norm", square_sum_kernel, (len(chunks),), addresses, sizes, chunks, part, **options)
    norm = torch.empty((), dtype=torch.float32, device=device)
    launch("global_norm", norm_kernel, (1,), partial, norm, len(partial), BLOCK=4096, num_warps=8)
    return norm
