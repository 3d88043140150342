"""Conversion between Hugging Face checkpoints and native ones, one tensor in memory at a time.

A native checkpoint is a folder of safetensors under transformers' runtime names with an index, which
torch.distributed.checkpoint reads at any sharding, and ``m3kernels.json``: how the source was laid out.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from m3kernels.models.ministral3._files import CODES, DTYPES, CheckpointError, Header, write, write_text
from m3kernels.models.ministral3.folders import (
    check_apart,
    check_new,
    check_space,
    clear,
    native_folder,
    new_folder,
    progress_bar,
)
from m3kernels.models.ministral3.layout import (
    FP8_SCALES,
    MANIFEST,
    PROGRESS,
    Layout,
    Stored,
    copy,
    files_beside,
    manifest,
    native_index,
    read_manifest,
)
from m3kernels.models.ministral3.requantise import requantise
from m3kernels.models.ministral3.weights import (
    EMBEDDING,
    HEAD,
    INDEX,
    WEIGHT_SCALE,
    Checkpoint,
    check_complete,
    check_shapes,
)

TARGETS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Report:
    """What a conversion wrote: folder, tensors, bytes; files found finished; names skipped, ignored and given a new scale."""

    folder: Path
    tensors: int
    bytes: int
    resumed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    rescaled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """Tensors compared; largest difference by name where there is one; names that only one side has; how many of the source's
    were cast to the native dtype first."""

    compared: int
    different: dict[str, float]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    cast: int

    @property
    def equal(self) -> bool:
        return not (self.different or self.missing or self.extra)


@dataclass(frozen=True)
class _InMemory:
    """A state dict under runtime names, read as a Checkpoint is."""

    state: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str) -> Tensor:
        return self.state[name].detach()


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; CheckpointError where finite values would become infinite."""
    out = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(out.isfinite(), tensor.isfinite()):
        raise CheckpointError(f"{name} has values beyond {dtype}'s range: use bfloat16 or float32")
    return out


def _imported(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """FP8 products stay in fp32 until their one cast."""
    fp8 = checkpoint.stored_dtype(name) != checkpoint.dtype(name)
    return cast(name, checkpoint.read(name, dtype=torch.float32 if fp8 else None), dtype)


def _source(hf_model: str | Path, revision: str | None) -> Checkpoint:
    checkpoint = Checkpoint.open(hf_model, revision)
    if (checkpoint.folder / MANIFEST).is_file():
        raise CheckpointError(f"{checkpoint.folder} is a native checkpoint: give the Hugging Face one")
    return checkpoint


def import_checkpoint(
    hf_model: str | Path,
    checkpoint_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes the native checkpoint of ``hf_model`` (folder or Hub id) to the folder ``checkpoint_path``.

    ``dtype``: float32, float16 or bfloat16 for all tensors; None keeps each tensor's, FP8 becomes the config's. The same call
    goes on with an import that was interrupted. Raises CheckpointError before anything is written where the source is not
    exactly the model that its config describes, the folder holds something else, or the disk is too full.
    """
    if dtype not in (None, *TARGETS):
        raise CheckpointError(f"dtype {dtype}: one of {', '.join(map(str, TARGETS))}")
    source, folder = _source(hf_model, revision), Path(checkpoint_path).expanduser()
    check_complete(source)
    check_apart(folder, source.folder)
    layout = Layout.of(source)
    native = layout.without_fp8(dtype)
    mark = json.dumps(_fingerprint(source, dtype), indent=1) + "\n"
    resuming = (folder / PROGRESS).is_file() and (folder / PROGRESS).read_text(encoding="utf-8") == mark
    if not resuming:
        check_new(folder, overwrite)
    plans = {
        file: ([t.entry(runtime=True) for t in kept.tensors], kept.metadata) for file, kept in native.files.items()
    }
    if layout.scales:
        plans[FP8_SCALES] = ([tensor.entry(runtime=True) for tensor in layout.scales], None)
    done = [file for file, (entries, _) in plans.items() if resuming and _is_written(folder / file, entries)]
    left = {file: plan for file, plan in plans.items() if file not in done}
    total = sum(entry.bytes for entries, _ in plans.values() for entry in entries)
    missing = sum(entry.bytes for entries, _ in left.values() for entry in entries)
    check_space(folder, missing)
    folder.mkdir(parents=True, exist_ok=True)
    if not resuming:
        clear(folder)
        write_text(folder / PROGRESS, mark)
    with progress_bar("import", total, progress) as advance:
        advance(total - missing)
        for file, (entries, metadata) in left.items():
            write(folder / file, entries, metadata, _native_tensors(source, entries, file == FP8_SCALES, advance))
    beside = files_beside(source.folder)
    for name in beside:
        copy(source.folder / name, folder / name)
    write_text(folder / INDEX, native_index(native))
    write_text(
        folder / MANIFEST, manifest(layout, {"model": str(hf_model), "folder": str(source.folder.resolve())}, beside)
    )
    (folder / PROGRESS).unlink()
    return Report(folder, len(native.tensors), total, tuple(done))


def _native_tensors(source: Checkpoint, entries, scales: bool, advance) -> Iterator[Tensor]:
    for entry in entries:
        yield source.read_stored(entry.name) if scales else _imported(source, entry.name, entry.dtype)
        advance(entry.bytes)


def _fingerprint(source: Checkpoint, dtype: torch.dtype | None) -> dict:
    """What an interrupted import must have in common with the one that goes on with it."""
    stats = {file: (source.folder / file).stat() for file in source.headers}
    files = {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
    return {"source": str(source.folder.resolve()), "files": files, "dtype": CODES.get(dtype)}


def _is_written(path: Path, entries) -> bool:
    return path.is_file() and list(Header.read(path).entries.values()) == entries


@dataclass(frozen=True)
class _Export:
    """Weights and the layout to give them."""

    weights: Checkpoint | _InMemory
    layout: Layout
    config: dict
    folder: Path  # of the files that go along
    copied: list[str]
    read_scale: Callable[[str], Tensor]
    skipped: tuple[str, ...]
    ignored: tuple[str, ...]
    new_scales: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, stored: tuple[Stored, ...]) -> Iterator[Tensor]:
        for tensor in stored:
            if tensor.is_scale:
                yield self._scale(tensor.runtime)
            elif tensor.is_fp8:
                value = self.weights.read(tensor.runtime)
                yield requantise(tensor.runtime, value, self._scale(tensor.runtime + WEIGHT_SCALE), self.config)[0]
            else:
                yield cast(tensor.runtime, self.weights.read(tensor.runtime), DTYPES[tensor.dtype])

    def _scale(self, name: str) -> Tensor:
        """The kept scale, or the one that replaces it: the same whether asked for before its weight or after."""
        kept = self.read_scale(name)
        if not name.endswith(WEIGHT_SCALE):
            return kept
        if name not in self.new_scales:
            weight = name.removesuffix(WEIGHT_SCALE)
            _, scale, recomputed = requantise(weight, self.weights.read(weight), kept, self.config)
            self.new_scales[name] = scale if recomputed else kept
        return self.new_scales[name]

    @property
    def rescaled(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, scale in self.new_scales.items()
            if not torch.equal(scale.float(), self.read_scale(name).float())
        )


def _export(weights, hf_model, revision, strict: bool, fp8: bool) -> _Export:
    if isinstance(weights, Mapping):
        if hf_model is None:
            raise CheckpointError("a state dict has no layout: name the checkpoint to write it like (hf_model)")
        found = _InMemory(weights)
    else:
        found = Checkpoint.open(native_folder(weights))
    if hf_model is None:
        layout, copied = read_manifest(found.folder)
        folder, config = found.folder, found.config
        read_scale = _scale_reader(found.folder / FP8_SCALES)
    else:
        reference = _source(hf_model, revision)
        layout, folder, config = Layout.of(reference), reference.folder, reference.config
        copied, read_scale = files_beside(folder), reference.read_stored
    if fp8 and not layout.is_fp8:
        raise CheckpointError(
            "the source has no FP8 weights, and so no scales to quantise with: export without --fp8 (fp8)"
        )
    if not fp8 and layout.is_fp8:
        layout = layout.without_fp8()
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    shapes = {name: found.shape(name) for name in found.names}
    expected = {tensor.runtime: tensor.shape for tensor in layout.weights}
    if isinstance(found, _InMemory) and HEAD in shapes and HEAD not in expected and EMBEDDING in shapes:
        if torch.equal(weights[HEAD], weights[EMBEDDING]):
            del shapes[HEAD]  # a tied model's state dict has its embedding twice
    skipped, ignored = (), ()
    if not strict:
        skipped = tuple(sorted(expected.keys() - shapes.keys()))
        ignored = tuple(sorted(shapes.keys() - expected.keys()))
        layout = layout.without(skipped)
        shapes = {name: shape for name, shape in shapes.items() if name in expected}
        expected = {name: shape for name, shape in expected.items() if name in shapes}
    what = "the state dict" if isinstance(found, _InMemory) else str(found.folder)
    check_shapes(
        shapes, expected, what, "export what the source describes, or what there is with --not-strict (strict=False)"
    )
    return _Export(found, layout, config, folder, copied, read_scale, skipped, ignored)


def _scale_reader(path: Path):
    def read(name: str) -> Tensor:
        from safetensors import safe_open

        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, and FP8 needs its scales: import again, or export without --fp8 (fp8)"
            )
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def export_checkpoint(
    checkpoint_path: str | Path | Mapping[str, Tensor],
    hf_path: str | Path,
    *,
    hf_model: str | Path | None = None,
    revision: str | None = None,
    strict: bool = True,
    fp8: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes a native checkpoint (or the latest complete step in a folder of them) as its source was: names, files, dtypes.

    ``hf_model``: another checkpoint to write it like. FP8 sources come back dequantised, or with ``fp8`` in E4M3 under the
    kept scales. ``strict=False`` skips what is missing. The folder ``hf_path`` appears when it is complete. Raises
    CheckpointError before anything is written where tensors are missing, extra or misshapen, or the disk is too full.
    """
    export, target = _export(checkpoint_path, hf_model, revision, strict, fp8), Path(hf_path).expanduser()
    read = [export.folder] if isinstance(export.weights, _InMemory) else [export.folder, export.weights.folder]
    check_apart(target, *read)
    check_new(target, overwrite)
    total = sum(tensor.entry().bytes for tensor in export.layout.tensors)
    check_space(target.parent, total)
    with new_folder(target) as folder, progress_bar("export", total, progress) as advance:
        for file, kept in export.layout.files.items():
            write(folder / file, [t.entry() for t in kept.tensors], kept.metadata, export.tensors(kept.tensors))
            advance(sum(tensor.entry().bytes for tensor in kept.tensors))
        if export.layout.index_text is not None:
            write_text(folder / INDEX, export.layout.index_text)
        for name in export.copied:
            copy(export.folder / name, folder / name)
        if export.config != json.loads((folder / "config.json").read_text(encoding="utf-8")):
            write_text(folder / "config.json", json.dumps(export.config, indent=2, ensure_ascii=False) + "\n")
    count = len(export.layout.tensors)
    return Report(target, count, total, (), export.skipped, export.ignored, export.rescaled)


def stream_hf_weights(
    weights: str | Path | Mapping[str, Tensor],
    hf_model: str | Path | None = None,
    *,
    revision: str | None = None,
    strict: bool = True,
    fp8: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, tensor on the CPU) of everything that an export would write, one at a time.

    ``weights``: a native checkpoint, or a state dict under runtime names, for which ``hf_model`` gives the layout. Raises as
    ``export_checkpoint`` does.
    """
    export = _export(weights, hf_model, revision, strict, fp8)
    for kept in export.layout.files.values():
        for stored, tensor in zip(kept.tensors, export.tensors(kept.tensors)):
            yield stored.name, tensor.cpu()


def from_hf(
    hf_model: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> dict[str, Tensor]:
    """The whole checkpoint in memory by runtime name, as an import would write it; a tied head is left out."""
    source = _source(hf_model, revision)
    check_complete(source)
    return {name: _imported(source, name, dtype or source.dtype(name)) for name in source.names}


def to_hf(weights: str | Path | Mapping[str, Tensor], hf_path: str | Path, hf_model: str | Path, **options) -> Report:
    """Writes ``weights`` (a state dict under runtime names, or a native checkpoint) like ``hf_model``; ``options`` are
    ``export_checkpoint``'s."""
    return export_checkpoint(weights, hf_path, hf_model=hf_model, **options)


def verify_checkpoint(
    hf_model: str | Path, checkpoint_path: str | Path, *, revision: str | None = None, progress: bool = False
) -> Verification:
    """Compares a native checkpoint with a Hugging Face one bit by bit, the latter cast as an import would cast it."""
    source, native = _source(hf_model, revision), Checkpoint.open(native_folder(checkpoint_path))
    common = [name for name in source.names if name in native.source]
    differences, casts = {}, 0
    with progress_bar("verify", sum(native.bytes(name) for name in common), progress) as advance:
        for name in common:
            dtype = native.dtype(name)
            casts += source.dtype(name) != dtype
            off = _difference(native.read(name), _imported(source, name, dtype))
            if off is not None:
                differences[name] = off
            advance(native.bytes(name))
    missing = tuple(sorted(set(source.names) - set(native.names)))
    extra = tuple(sorted(set(native.names) - set(source.names)))
    return Verification(len(common), differences, missing, extra, casts)


def _difference(a: Tensor, b: Tensor) -> float | None:
    """None for equal bits, else the largest difference; infinite for other shapes and where only one is a number."""
    if a.shape != b.shape:
        return float("inf")
    if torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
        return None
    off = (a.double() - b.double()).abs()
    return float("inf") if off.isnan().any() else off.max().item()
