"""Where a checkpoint is, and the safetensors files that it is made of: headers, checks, a writer that streams."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# in the order in which safetensors lays them out in a file
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp")
# what a Hub id brings: never pickles, code, or Mistral's own second copy of the weights
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["consolidated*", "params.json"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, converted or written as asked; the message says why and what to do."""


def listing(names: Iterable[str], most: int = 10) -> str:
    """Names for a message: at most ``most`` of them, then a count."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: its dtype as the format spells it ("BF16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = DTYPES[self.dtype].itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: entries in the order of their data, and the file's metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(entry.nbytes for entry in self.entries.values())

    def to_json(self) -> dict:
        return {"metadata": self.metadata, "tensors": {k: [e.dtype, list(e.shape)] for k, e in self.entries.items()}}

    @classmethod
    def from_json(cls, data: dict) -> "Header":
        return cls({k: Entry(dtype, tuple(shape)) for k, (dtype, shape) in data["tensors"].items()}, data["metadata"])


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is truncated, corrupt, a Git LFS pointer, or holds a dtype that no Ministral 3 has.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or corrupt: its header does not fit into {size} bytes; get it again"
            )
        raw = file.read(length)
    try:
        items = json.loads(raw)
        metadata = items.pop("__metadata__", None)
        ordered = sorted(items.items(), key=lambda item: item[1]["data_offsets"])
        end = max((item["data_offsets"][1] for item in items.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt: its header cannot be read ({error}); get it again") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is truncated or corrupt: {size} bytes, its header promises {8 + length + end}; get it again"
        )
    try:
        # safetensors checks what is left: offsets against shapes, holes, overlaps
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt: {error}; get it again") from error
    odd = {f"{name} ({item['dtype']})" for name, item in ordered if item["dtype"] not in DTYPES}
    if odd:
        raise CheckpointError(f"{path} holds dtypes other than {', '.join(DTYPES)}: {listing(odd)}")
    return Header({name: Entry(item["dtype"], tuple(item["shape"])) for name, item in ordered}, metadata)


def file_order(names: Iterable[str], dtypes: dict[str, str]) -> list[str]:
    """The order in which safetensors itself lays tensors out: by dtype, then by name."""
    ranks = {code: rank for rank, code in enumerate(DTYPES)}
    return sorted(names, key=lambda name: (ranks[dtypes[name]], name))


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name, which gets its own when it is complete and on the disk."""
    half = path.with_name(path.name + ".tmp")
    with open(half, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def write_safetensors(path: Path, header: Header, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes ``tensors``, which come in the order of ``header``, one at a time; the file appears when it is complete.

    safetensors' own ``save_file`` needs every tensor of a file at once. The bytes are the same.

    Raises:
        CheckpointError: a tensor differs from its header entry in name, dtype or shape.
        OSError: the file cannot be written; nothing stands under its name then.
    """
    described, offset = {}, 0
    if header.metadata is not None:
        described["__metadata__"] = header.metadata
    for name, entry in header.entries.items():
        described[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    raw = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    expected = iter(header.entries.items())
    with _renamed(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors:
            wanted, entry = next(expected, (None, None))
            if (name, CODES.get(tensor.dtype), tuple(tensor.shape)) != (
                wanted,
                entry and entry.dtype,
                entry and entry.shape,
            ):
                raise CheckpointError(
                    f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, planned: {wanted} {entry}"
                )
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            # or the next one would be made beside it
            del tensor
        left = [name for name, _ in expected]
        if left:
            raise CheckpointError(f"{path}: no tensor came for {listing(left)}")


def write_text(path: Path, text: str) -> None:
    """Writes a small file under a temporary name and renames it."""
    with _renamed(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError names the file when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}; get it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is no JSON object; get it again")
    return data


def locate(source: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder of a checkpoint: ``source`` itself, or the snapshot of a Hub id, downloaded where needed.

    ``token`` and the cache default to what huggingface_hub takes from HF_TOKEN and HF_HOME.

    Raises:
        CheckpointError: no such folder; or the Hub is not reached, or has no such id, or not for this token.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision:
            raise CheckpointError(f"revision {revision!r} was given, but {path} is a local folder: leave it out")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the folder that it is in")
    name = os.fspath(source)
    if name.startswith((".", "~", "/")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"folder {path} does not exist (and it is no Hub id, which has the form OWNER/NAME)")
    return _download(name, revision, token)


def _download(name: str, revision: str | None, token: str | bool | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    nowhere = f"no local folder {name}, and as a Hub id"
    has_token = token if isinstance(token, str) else token is not False and huggingface_hub.get_token()
    access = (
        f"the token in use has no access: accept the licence on https://huggingface.co/{name}, or use another HF_TOKEN"
        if has_token
        else "no token is set: export HF_TOKEN=... (https://huggingface.co/settings/tokens) if it is private or gated"
    )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{nowhere} it is gated; {access}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{nowhere} it has no revision {revision!r}: see its page for branches") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{nowhere} it does not exist, or is not visible; {access}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it"
        else:
            why = f"the Hub was not reached ({type(error).__name__}): go online"
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise CheckpointError(
            f"{nowhere} it is not in the cache {cache} (HF_HOME), and {why}, or give a local folder"
        ) from error


@contextlib.contextmanager
def bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A rich progress bar over bytes; yields what moves it on."""
    if not shown:
        yield lambda nbytes: None
        return
    from rich import progress

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(*columns, progress.TransferSpeedColumn(), progress.TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
