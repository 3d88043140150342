"""Safetensors files: headers held against the file's size, and files written one tensor at a time.

safetensors' own ``save_file`` wants every tensor of a file in memory; a file written here from the same tensors in the same
order has the same bytes.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # safetensors' own limit


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, converted or written as asked; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name there, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file says that it holds: ``entries`` by name in the order of their bytes, ``metadata`` or None."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] | None

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Raises CheckpointError naming a file whose header is damaged or does not fit its size."""
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(size - 8, LONGEST_HEADER):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                raw = json.loads(file.read(length))
            metadata = raw.pop("__metadata__", None)
            entries, end = {}, 0
            for name, field in sorted(raw.items(), key=lambda item: item[1]["data_offsets"]):
                entry = Entry(name, DTYPES[field["dtype"]], tuple(field["shape"]))
                begin, stop = field["data_offsets"]
                if begin != end or stop - begin != entry.bytes:
                    raise ValueError(f"{name} at bytes {begin} to {stop} does not fit its shape or its neighbour")
                entries[name], end = entry, stop
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise CheckpointError(
                f"{path} is corrupt or not a safetensors file ({type(error).__name__}: {error}): fetch it again"
            ) from error
        if 8 + length + end != size:
            state = "truncated" if size < 8 + length + end else "corrupt"
            raise CheckpointError(
                f"{path} is {state}: {size} bytes, and its header says {8 + length + end}: fetch it again"
            )
        return cls(path, entries, metadata)


def header_bytes(entries: Sequence[Entry], metadata: dict[str, str] | None) -> bytes:
    """The start of a file, laid out as safetensors does: compact JSON, padded with spaces to 8 bytes."""
    fields, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for entry in entries:
        fields[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def aligned(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which safetensors writes: wide dtypes first, so that every tensor is aligned."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None, tensors: Iterable[Tensor]) -> None:
    """Writes ``tensors``, one for each of ``entries``; the file gets its name only when it is complete."""
    with open(temporary(path), "wb") as file:
        file.write(header_bytes(entries, metadata))
        for entry, tensor in zip(entries, tensors, strict=True):
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {entry.shape}"
                )
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary(path), path)


def write_text(path: Path, text: str) -> None:
    """Written whole or not at all."""
    temporary(path).write_text(text, encoding="utf-8")
    os.replace(temporary(path), path)


def read_json(path: Path) -> dict:
    """Raises CheckpointError naming a file that is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object: fetch it again")
    return value
