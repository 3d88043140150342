"""Many tensors in one launch: addresses and chunks in tables on the device, and pointers from them in a kernel."""

from functools import lru_cache

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv
from m3kernels.ops._triton import tl, triton

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def at(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@lru_cache(maxsize=16)
def chunks_of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """((tensors,) int64 sizes, (chunks, 2) int32 of a tensor and which of its chunks), on ``device``."""
    counts = torch.tensor([cdiv(size, chunk) for size in sizes])
    which = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    table = torch.stack([which, torch.arange(len(which)) - first[which]], dim=1)
    return torch.tensor(sizes, device=device), table.to(torch.int32).to(device)


def upload(numbers: list[int], floats: list[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """(int64 of ``numbers``, fp32 of ``floats``) on ``device`` by one copy, for which the host does not wait."""
    n = len(numbers)
    host = torch.empty(n + cdiv(len(floats), 2), dtype=torch.int64, pin_memory=device.type == "cuda")
    host[:n] = torch.tensor(numbers, dtype=torch.int64)
    host[n:].view(torch.float32)[: len(floats)] = torch.tensor(floats, dtype=torch.float32)
    # the allocator of pinned memory gives this block out again only when the copy is over
    table = host.to(device, non_blocking=True)
    return table[:n], table[n:].view(torch.float32)
