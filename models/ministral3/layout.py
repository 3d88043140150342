"""How a Hugging Face folder lays its tensors out: names, files, order, dtypes; kept by a native checkpoint, and written back."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from m3kernels.models.ministral3._files import CODES, DTYPES, CheckpointError, Entry, aligned, read_json, temporary
from m3kernels.models.ministral3.weights import FP8, INDEX, SCALES, Checkpoint, config_dtype

FORMAT = 1
MANIFEST, PROGRESS, FP8_SCALES = "m3kernels.json", "m3kernels.import.json", "fp8_scales.safetensors"
LIBRARIES = ("m3kernels", "torch", "transformers", "safetensors")
COPIED = (".json", ".txt", ".model", ".jinja", ".md")


@dataclass(frozen=True)
class Stored:
    """A tensor of a Hugging Face file: its name there, transformers' runtime name, dtype as safetensors spells it, shape."""

    name: str
    runtime: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_scale(self) -> bool:
        return self.runtime.endswith(SCALES)

    @property
    def is_fp8(self) -> bool:
        return DTYPES[self.dtype] == FP8

    def entry(self, runtime: bool = False) -> Entry:
        return Entry(self.runtime if runtime else self.name, DTYPES[self.dtype], self.shape)


@dataclass(frozen=True)
class FileLayout:
    """A file's tensors in the order of their bytes, and its safetensors metadata (None: it has none)."""

    tensors: tuple[Stored, ...]
    metadata: dict[str, str] | None


@dataclass(frozen=True)
class Layout:
    """A folder's files by name, the text of its index (None: it has one file and no index), the dtype of FP8 weights when
    dequantised, as safetensors spells it."""

    files: dict[str, FileLayout]
    index_text: str | None
    dequantised: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Layout":
        runtime = {where: name for name, where in checkpoint.source.items()}
        files = {}
        for file, header in checkpoint.headers.items():
            tensors = (Stored(e.name, runtime[file, e.name], CODES[e.dtype], e.shape) for e in header.entries.values())
            files[file] = FileLayout(tuple(tensors), header.metadata)
        return cls(files, checkpoint.index_text, CODES[config_dtype(checkpoint.config)])

    @classmethod
    def from_json(cls, value: dict) -> "Layout":
        files = {
            file: FileLayout(tuple(Stored(n, r, d, tuple(s)) for n, r, d, s in kept["tensors"]), kept["metadata"])
            for file, kept in value["files"].items()
        }
        return cls(files, value["index_text"], value["dequantised"])

    def to_json(self) -> dict:
        files = {
            file: {"metadata": kept.metadata, "tensors": [list(asdict(tensor).values()) for tensor in kept.tensors]}
            for file, kept in self.files.items()
        }
        return {"files": files, "index_text": self.index_text, "dequantised": self.dequantised}

    @property
    def tensors(self) -> list[Stored]:
        return [tensor for kept in self.files.values() for tensor in kept.tensors]

    @property
    def weights(self) -> list[Stored]:
        return [tensor for tensor in self.tensors if not tensor.is_scale]

    @property
    def scales(self) -> list[Stored]:
        return [tensor for tensor in self.tensors if tensor.is_scale]

    @property
    def is_fp8(self) -> bool:
        return any(tensor.is_fp8 for tensor in self.tensors)

    def without_fp8(self, dtype: torch.dtype | None = None) -> "Layout":
        """Dequantised, without scales; all weights in ``dtype`` where one is given."""
        return self._changed(
            lambda t: (
                None
                if t.is_scale
                else replace(t, dtype=CODES[dtype] if dtype else self.dequantised if t.is_fp8 else t.dtype)
            )
        )

    def without(self, skipped: Iterable[str]) -> "Layout":
        """Without the weights of these runtime names, and without their scales."""
        modules = {name.rpartition(".")[0] for name in skipped}
        return self._changed(
            lambda t: None if t.runtime in skipped or t.is_scale and t.runtime.rpartition(".")[0] in modules else t
        )

    def _changed(self, change) -> "Layout":
        files = {}
        for file, kept in self.files.items():
            tensors = tuple(new for tensor in kept.tensors if (new := change(tensor)) is not None)
            if tensors != kept.tensors:
                order = {entry.name: i for i, entry in enumerate(aligned(tensor.entry() for tensor in tensors))}
                tensors = tuple(sorted(tensors, key=lambda tensor: order[tensor.name]))
            if tensors:
                files[file] = FileLayout(tensors, kept.metadata)
        if files == self.files:
            return self
        changed = replace(self, files=files)
        return changed if self.index_text is None else replace(changed, index_text=changed._index())

    def _index(self) -> str:
        index = json.loads(self.index_text)
        index["weight_map"] = {tensor.name: file for file, kept in self.files.items() for tensor in kept.tensors}
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(t.entry().bytes for t in self.tensors)}
        if "total_parameters" in index["metadata"]:
            sizes = [torch.Size(tensor.shape).numel() for tensor in self.tensors]
            index["metadata"]["total_parameters"] = sum(sizes)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def native_index(layout: Layout) -> str:
    """The index of a native folder: runtime names, in the files that the source has them in."""
    weight_map = {tensor.runtime: file for file, kept in layout.files.items() for tensor in kept.tensors}
    size = sum(tensor.entry().bytes for tensor in layout.tensors)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def manifest(layout: Layout, source: dict[str, str], copied: list[str]) -> str:
    """The text of m3kernels.json, written when all else is complete."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    value = {"format": FORMAT, "versions": versions, "source": source, "copied": copied, "layout": layout.to_json()}
    return json.dumps(value, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[Layout, list[str]]:
    """(layout of the source, files copied from it). Raises CheckpointError where another version wrote it."""
    value = read_json(folder / MANIFEST)
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {value.get('format')!r}, and this m3kernels reads {FORMAT}: "
            "import again, or use the m3kernels that wrote it"
        )
    try:
        return Layout.from_json(value["layout"]), list(value["copied"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}): import again"
        ) from error


def files_beside(folder: Path) -> list[str]:
    """Config, tokenizer, processor and text files, which go along as they are."""
    ours = (INDEX, MANIFEST, PROGRESS)
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.suffix in COPIED and p.name not in ours)


def copy(source: Path, target: Path) -> None:
    """Copied whole or not at all."""
    shutil.copyfile(source, temporary(target))
    temporary(target).replace(target)
