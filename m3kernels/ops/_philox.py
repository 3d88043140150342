"""Philox4x32-10 in plain PyTorch: the bits of ``tl.philox``, by which references draw what kernels draw."""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC11) of 32-bit numbers in int64, as Triton's: counters and results."""
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32 & LOW) ^ c1 ^ k0, right & LOW, (left >> 32 & LOW) ^ c3 ^ k1, left & LOW
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0, c1, c2, c3


def laned_calls(start: int, count: int, lanes: int, device: torch.device) -> Tensor:
    """Numbers of the calls whose words :func:`laned_words` lays out for elements ``start`` (a multiple of 4 * lanes) on."""
    return torch.arange(start // 4, start // 4 + -(-count // (4 * lanes)) * lanes, device=device)


def laned_words(words: tuple[Tensor, ...], lanes: int, count: int) -> Tensor:
    """(..., count): one word an element. Of 4 * lanes neighbours, the first ``lanes`` have the first words of as many calls."""
    stacked = torch.stack(words, dim=-2).unflatten(-1, (-1, lanes))
    return stacked.transpose(-3, -2).flatten(-3)[..., :count]
