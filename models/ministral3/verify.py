"""Comparison of a native checkpoint with a Hugging Face one."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from m3kernels.models.ministral3.files import bar
from m3kernels.models.ministral3.layout import find_native
from m3kernels.models.ministral3.weights import EMBEDDING, HEAD, Checkpoint


@dataclass(frozen=True)
class Verification:
    """Tensors compared, and for each that differs (by runtime name) how; ``str`` of it is the table."""

    compared: int
    differences: dict[str, str]
    largest: float
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"note: {notice}" for notice in self.notices]
        lines += [f"{name}: {how}" for name, how in sorted(self.differences.items())]
        verdict = f"{len(self.differences)} differ" if self.differences else "all equal, bit for bit"
        return "\n".join([*lines, f"{self.compared} tensors compared, {verdict}; max difference {self.largest:.3g}"])


def verify_checkpoint(
    hf_model: str | os.PathLike, checkpoint_path: str | os.PathLike, *, progress: bool = False
) -> Verification:
    """Compares a native checkpoint with a Hugging Face one, tensor by tensor, in the native one's dtypes.

    Bits are compared. Vocabulary padding of the native one is left out, with a notice.
    """
    folder, notices = find_native(Path(checkpoint_path).expanduser())
    native, other = Checkpoint.open(folder), Checkpoint.open(hf_model)
    differences = {name: "only in the native checkpoint" for name in native.names if name not in other.stored}
    differences |= {name: "only in the Hugging Face checkpoint" for name in other.names if name not in native.stored}
    both = [name for name in native.names if name in other.stored]
    largest = 0.0
    with bar("verify", sum(native.stored[name].entry.nbytes for name in both), progress) as advance:
        for name in both:
            ours, theirs = native.shape(name), other.shape(name)
            if name in (EMBEDDING, HEAD) and ours[0] > theirs[0] and ours[1:] == theirs[1:]:
                notices.append(f"{name}: rows from {theirs[0]} on are padding and were not compared")
            elif ours != theirs:
                differences[name] = f"is {list(ours)}, in the Hugging Face checkpoint {list(theirs)}"
                continue
            equal, off = _compare(native, other, name)
            if not equal:
                differences[name] = f"max difference {off:.3g}" if off else "zeros of another sign"
                largest = max(largest, off)
            advance(native.stored[name].entry.nbytes)
    return Verification(len(both), differences, largest, notices)


def _compare(native: Checkpoint, other: Checkpoint, name: str) -> tuple[bool, float]:
    """(bits are equal, largest difference) of a tensor, a few rows at a time; a NaN on one side counts as inf."""
    shape, dtype = other.shape(name), native.dtype(name)
    width = max(1, other.stored[name].entry.nbytes // max(1, shape[0]) if shape else 1)
    step = max(1, 2**26 // width)
    equal, largest = True, 0.0
    for start in range(0, shape[0], step) if shape else (None,):
        index = None if start is None else (slice(start, min(start + step, shape[0])),)
        a, b = native.read(name, index), other.read(name, index, dtype)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        if not torch.equal(a.reshape(-1).view(integer), b.reshape(-1).view(integer)):
            equal = False
            off = (a.double() - b.double()).abs()
            off[(a == b) | (a.isnan() & b.isnan())] = 0
            largest = max(largest, off.nan_to_num(nan=float("inf")).max().item())
    return equal, largest
