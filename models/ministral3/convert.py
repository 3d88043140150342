"""Conversion between Hugging Face checkpoints and native ones, which keep transformers' runtime names."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3.export import plan_export, read_as
from m3kernels.models.ministral3.files import (
    CODES,
    DTYPES,
    CheckpointError,
    Entry,
    Header,
    bar,
    file_order,
    read_header,
    write_safetensors,
    write_text,
)
from m3kernels.models.ministral3.layout import (
    RECORD,
    SCALES_FILE,
    Layout,
    check_space,
    check_target,
    config_text,
    copy_others,
    empty,
    index_text,
    write_record,
)
from m3kernels.models.ministral3.state import StateDict
from m3kernels.models.ministral3.verify import Verification, verify_checkpoint
from m3kernels.models.ministral3.weights import (
    INDEX,
    UNFINISHED,
    Checkpoint,
)

__all__ = [
    "CheckpointError",
    "Report",
    "Verification",
    "export_checkpoint",
    "from_hf",
    "import_checkpoint",
    "stream_hf_weights",
    "to_hf",
    "verify_checkpoint",
]


@dataclass(frozen=True)
class Report:
    """What a conversion wrote: the folder, how many tensors and bytes, shards found finished, and notices."""

    folder: Path
    tensors: int
    nbytes: int
    reused: int = 0
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"note: {notice}" for notice in self.notices]
        if self.reused:
            lines.append(f"{self.reused} shards were finished before and were kept")
        return "\n".join([*lines, f"{self.tensors} tensors, {self.nbytes / 2**20:,.1f} MiB in {self.folder}"])


def import_checkpoint(
    hf_model: str | os.PathLike,
    checkpoint_path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes a Hugging Face checkpoint as a native one: runtime names, nothing quantised, one tensor in memory.

    An interrupted import goes on when it is called again with the same arguments.

    Args:
        hf_model: local folder or Hub id.
        checkpoint_path: the folder to write.
        dtype: of all tensors; by default each keeps its own, and FP8 weights take that of the unquantised ones.
        overwrite: replace a checkpoint that stands there.

    Raises:
        CheckpointError: the source is not complete and sound, or the target is not free or its disk too small; all
            of it is found before anything is written.
    """
    source = Checkpoint.open(hf_model, revision=revision, token=token)
    target = Path(checkpoint_path).expanduser().resolve()
    if (source.folder / RECORD).exists():
        raise CheckpointError(f"{source.folder} is a native checkpoint already: nothing to import")
    _apart(target, "--checkpoint-path", source.folder, "--hf-model")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"torch dtype {dtype} is not one of float32, float16, bfloat16")
    source.check()
    shards = _native_shards(source, dtype)
    fingerprint = _fingerprint(source, dtype)
    if not _resumes(target, fingerprint, overwrite):
        check_target(target, overwrite, "--checkpoint-path")
        empty(target)
    done = {name for name, header in shards.items() if _finished(target / name, header)}
    check_space(target, sum(header.nbytes for name, header in shards.items() if name not in done))
    target.mkdir(parents=True, exist_ok=True)
    with _claimed(target / UNFINISHED, fingerprint):
        total = sum(header.nbytes for header in shards.values())
        with bar("import", total, progress) as advance:
            for name, header in shards.items():
                if name in done:
                    advance(header.nbytes)
                else:
                    _write(target / name, header, _read_native(source, header), advance)
        if source.scales:
            (target / SCALES_FILE).parent.mkdir(exist_ok=True)
            entries = {name: stored.entry for name, stored in source.scales.items()}
            order = file_order(entries, {name: entry.dtype for name, entry in entries.items()})
            scales = ((name, source.read_scale(name)) for name in order)
            write_safetensors(target / SCALES_FILE, Header({name: entries[name] for name in order}), scales)
        copy_others(source.folder, target)
        write_text(target / "config.json", _native_config(source, dtype))
        write_text(target / INDEX, index_text(shards))
        write_record(target, Layout.of(source), os.fspath(hf_model), dtype)
        (target / UNFINISHED).unlink()
    return Report(target, len(source.names), total, len(done), _import_notices(source, dtype))


def export_checkpoint(
    checkpoint_path: str | os.PathLike,
    hf_path: str | os.PathLike,
    hf_model: str | os.PathLike | None = None,
    *,
    fp8: bool = False,
    strict: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes a native checkpoint as the Hugging Face checkpoint that it came from: names, files, dtypes, config.

    Args: as of ``plan_export``; ``checkpoint_path`` may be the parent of ``iter_N`` or ``step-N`` folders.

    Raises:
        CheckpointError: see ``plan_export``; or the target is not free or its disk too small.
    """
    return to_hf(checkpoint_path, hf_path, hf_model, fp8=fp8, strict=strict, overwrite=overwrite, progress=progress)


def to_hf(
    source: str | os.PathLike | Mapping[str, Tensor] | nn.Module,
    hf_path: str | os.PathLike,
    hf_model: str | os.PathLike | None = None,
    *,
    fp8: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """``export_checkpoint`` for a model or a state dict in memory, too; a state dict needs ``hf_model`` for the layout.

    The folder appears when it is complete. Where tensors are sharded (DTensor) call it on every rank: the first one
    writes, the others take part in gathering one tensor at a time and return, or fail, with it. Plain tensors in a job
    of several ranks are written by the rank that calls.
    """
    options = {"fp8": fp8, "strict": strict, "dtype": dtype, "overwrite": overwrite, "progress": progress}
    if not isinstance(source, Mapping | nn.Module):
        return _write_hf(source, hf_path, hf_model, **options)
    weights = StateDict(source)
    write = partial(_write_hf, weights, hf_path, hf_model, **options)
    return weights.led(write) if weights.sharded else write()


def _write_hf(
    source: str | os.PathLike | StateDict,
    hf_path: str | os.PathLike,
    hf_model: str | os.PathLike | None,
    *,
    fp8: bool,
    strict: bool,
    dtype: torch.dtype | None,
    overwrite: bool,
    progress: bool,
) -> Report:
    target = Path(hf_path).expanduser().resolve()
    if not isinstance(source, StateDict):
        _apart(target, "--hf-path", Path(source).expanduser(), "--checkpoint-path")
    if hf_model is not None and Path(hf_model).expanduser().exists():
        _apart(target, "--hf-path", Path(hf_model).expanduser(), "--hf-model")
    plan = plan_export(source, hf_model, to_fp8=fp8, strict=strict, dtype=dtype)
    check_target(target, overwrite, "--hf-path")
    total = sum(header.nbytes for header in plan.files.values())
    check_space(target, total)
    half = target.with_name(target.name + ".tmp")
    if half.exists() and not (half / UNFINISHED).exists():
        raise CheckpointError(f"{half} is in the way and is no interrupted export: move it")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        (half / UNFINISHED).touch()
        with bar("export", total, progress) as advance:
            for name, header in plan.files.items():
                _write(half / name, header, plan.tensors(name), advance)
        for other in plan.others:
            copy_others(other, half)
        write_text(half / "config.json", plan.config)
        if plan.index is not None:
            write_text(half / INDEX, plan.index)
        (half / UNFINISHED).unlink()
        empty(target)
        half.rename(target)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return Report(target, sum(len(h.entries) for h in plan.files.values()), total, notices=plan.notices)


def stream_hf_weights(
    source: str | os.PathLike | Mapping[str, Tensor] | nn.Module,
    hf_model: str | os.PathLike | None = None,
    *,
    fp8: bool = False,
    strict: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, CPU tensor) of an export, file by file, without writing it; see ``to_hf``.

    Of a sharded model it gathers one parameter at a time: call it on every rank.
    """
    plan = plan_export(source, hf_model, to_fp8=fp8, strict=strict)
    for name in plan.files:
        yield from plan.tensors(name)


def from_hf(
    hf_model: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Tensor]:
    """A whole Hugging Face checkpoint in memory by runtime name, checked; FP8 weights dequantised."""
    source = Checkpoint.open(hf_model, revision=revision, token=token)
    source.check()
    return {name: read_as(source, name, dtype or source.dtype(name)) for name in source.names}


def _apart(target: Path, option: str, source: Path, other: str) -> None:
    """Raises CheckpointError where writing ``target`` would touch what is read."""
    target, source = target.resolve(), source.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise CheckpointError(f"{option} {target} and {other} {source} are the same or inside one another: keep apart")


def _native_shards(source: Checkpoint, dtype: torch.dtype | None) -> dict[str, Header]:
    """Headers of the native files: one for each file of the source that holds weights."""
    shards = []
    for file in source.files:
        names = [name for name, stored in source.stored.items() if stored.file == file]
        codes = {name: CODES[dtype or source.dtype(name)] for name in names}
        if names:
            shards.append({n: Entry(codes[n], source.shape(n)) for n in file_order(names, codes)})
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": Header(shard) for i, shard in enumerate(shards, 1)}


def _read_native(source: Checkpoint, header: Header) -> Iterator[tuple[str, Tensor]]:
    for name, entry in header.entries.items():
        yield name, read_as(source, name, DTYPES[entry.dtype])


def _native_config(source: Checkpoint, dtype: torch.dtype | None) -> str:
    """The source's ``config.json``; changed where it would be untrue of the native weights."""
    config = dict(source.config)
    config.pop("quantization_config", None)
    if dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if config == source.config:
        return (source.folder / "config.json").read_text(encoding="utf-8")
    return config_text(config)


def _import_notices(source: Checkpoint, dtype: torch.dtype | None) -> list[str]:
    notices = []
    if source.is_fp8:
        notices.append("FP8 weights were dequantised; their scales are kept for an export with --fp8")
    exact = {torch.float32: (torch.float16, torch.bfloat16, torch.float32)}.get(dtype, (dtype,))
    rounded = [name for name in source.names if dtype and source.dtype(name) not in exact]
    if rounded:
        notices.append(
            f"{len(rounded)} tensors were rounded to {dtype}: an export does not give the source's bits back"
        )
    return notices


def _fingerprint(source: Checkpoint, dtype: torch.dtype | None) -> str:
    """What an import depends on: an interrupted one goes on only where this is the same."""
    files = {}
    for name in source.files:
        stat = (source.folder / name).stat()
        with open(source.folder / name, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
        files[name] = [stat.st_size, stat.st_mtime_ns, hashlib.sha256(header).hexdigest()]
    return json.dumps({"torch_dtype": str(dtype), "config": source.config, "files": files}, sort_keys=True)


def _resumes(target: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether ``target`` is an interrupted run of this very import."""
    marker = target / UNFINISHED
    if not marker.exists():
        return False
    if marker.read_text(encoding="utf-8") in ("", fingerprint):
        return True
    if overwrite:
        return False
    raise CheckpointError(
        f"--checkpoint-path {target} is the interrupted import of another source, or with another --torch-dtype: "
        "choose another folder, or pass --overwrite"
    )


def _finished(path: Path, header: Header) -> bool:
    """Whether a native shard is complete: it is renamed only then; its header and size are checked nevertheless."""
    if not path.exists():
        return False
    try:
        found = read_header(path)
    except CheckpointError:
        return False
    return list(found.entries.items()) == list(header.entries.items())


@contextlib.contextmanager
def _claimed(marker: Path, fingerprint: str) -> Iterator[None]:
    """Marks the folder as unfinished and locks it; a killed process leaves the mark and frees the lock."""
    with open(marker, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another import is writing to {marker.parent}: wait for it") from None
        file.seek(0)
        if not file.read():
            file.write(fingerprint)
            file.flush()
            os.fsync(file.fileno())
        yield


def _write(path: Path, header: Header, tensors: Iterator[tuple[str, Tensor]], advance: Callable[[int], None]) -> None:
    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            nbytes = tensor.nbytes
            yield name, tensor
            # or the next one would be made beside it
            del tensor
            advance(nbytes)

    write_safetensors(path, header, counted())
