"""Layout of a Hugging Face checkpoint as kept beside a native one, and the folders that conversions write into."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from m3kernels.models.ministral3.files import (
    CODES,
    DTYPES,
    CheckpointError,
    Entry,
    Header,
    file_order,
    listing,
    read_json,
    write_text,
)
from m3kernels.models.ministral3.state import StateDict
from m3kernels.models.ministral3.weights import (
    HEAD,
    INDEX,
    SINGLE,
    UNFINISHED,
    Checkpoint,
    disk_name,
    is_scale,
    may_be_tied,
)

RECORD = "m3kernels.json"
VERSION = 1
# FP8 scales of the source; in a folder of its own, so that readers of the weights do not take them for weights
SCALES_FILE = "quantization/scales.safetensors"
COPIED = (".json", ".txt", ".model", ".jinja")
# these describe weights, or Mistral's own second copy of them
NOT_COPIED = ("config.json", "params.json", RECORD, UNFINISHED)
# what a file of a new layout holds at most, as Hugging Face counts
SHARD_BYTES = 5 * 10**9
ARCHITECTURES = {"mistral3": "Mistral3ForConditionalGeneration", "ministral3": "Ministral3ForCausalLM"}
STEP = re.compile(r"(?:iter_|step-)(\d+)")


@dataclass(frozen=True)
class Layout:
    """How a Hugging Face checkpoint lays its tensors out, enough to write it again byte by byte.

    Attributes:
        files: header of each file, with the names, dtypes and order in the file.
        index: text of ``model.safetensors.index.json``; None for a single file.
        config: text of ``config.json``.
        float_dtype: dtype (as safetensors spells it) of what is not quantised.
    """

    files: dict[str, Header]
    index: str | None
    config: str
    float_dtype: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Layout":
        """The layout of an open checkpoint."""
        index = checkpoint.folder / INDEX
        return cls(
            checkpoint.files,
            index.read_text(encoding="utf-8") if index.exists() else None,
            (checkpoint.folder / "config.json").read_text(encoding="utf-8"),
            CODES[checkpoint.float_dtype],
        )

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is FP8."""
        return any(entry.dtype == "F8_E4M3" for header in self.files.values() for entry in header.entries.values())

    def cast(self, dtype: torch.dtype) -> "Layout":
        """With everything in ``dtype`` that is neither quantised nor a scale."""
        code, files = CODES[dtype], {}
        for file, header in self.files.items():
            kept = {n: e.dtype if is_scale(n) or e.dtype == "F8_E4M3" else code for n, e in header.entries.items()}
            if all(kept[name] == entry.dtype for name, entry in header.entries.items()):
                files[file] = header
            else:
                files[file] = Header(
                    {n: Entry(kept[n], header.entries[n].shape) for n in file_order(kept, kept)}, header.metadata
                )
        config, said = json.loads(self.config), str(dtype).removeprefix("torch.")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        text = self.config if config.get(key) == said else config_text({**config, key: said})
        return replace(self, files=files, config=text, float_dtype=code)

    def to_json(self) -> dict:
        files = {name: header.to_json() for name, header in self.files.items()}
        return {"files": files, "index": self.index, "config": self.config, "float_dtype": self.float_dtype}

    @classmethod
    def from_json(cls, data: Mapping) -> "Layout":
        files = {name: Header.from_json(header) for name, header in data["files"].items()}
        return cls(files, data["index"], data["config"], data["float_dtype"])


def new_layout(weights: StateDict) -> Layout:
    """The layout in which transformers saves a native model in memory: names and files, and ``config.json`` for it.

    Raises:
        CheckpointError: a parameter of a dtype that no checkpoint has.
    """
    if odd := [f"{n} ({weights.dtype(n)})" for n in weights.names if weights.dtype(n) not in CODES]:
        raise CheckpointError(f"dtypes other than {', '.join(DTYPES)} are not saved: {listing(odd)}")
    text_only = weights.config["model_type"] == "ministral3"
    shards: list[dict[str, Entry]] = [{}]
    for name in weights.names:
        entry = Entry(CODES[weights.dtype(name)], weights.shape(name))
        if shards[-1] and sum(e.nbytes for e in shards[-1].values()) + entry.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][disk_name(name, text_only)] = entry
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = {}
    for file, shard in zip(names if len(shards) > 1 else [SINGLE], shards):
        order = file_order(shard, {name: entry.dtype for name, entry in shard.items()})
        files[file] = Header({name: shard[name] for name in order})

    sizes: Counter = Counter()
    for header in files.values():
        for entry in header.entries.values():
            sizes[entry.dtype] += entry.nbytes
    code = sizes.most_common(1)[0][0]
    config = {key: value for key, value in weights.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(DTYPES[code]).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [ARCHITECTURES[config["model_type"]]]
    tied = HEAD not in weights.names
    if tied != may_be_tied(config):
        config["tie_word_embeddings"] = tied
        if "text_config" in config:
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    return Layout(files, index_text(files) if len(files) > 1 else None, config_text(config), code)


def write_record(folder: Path, layout: Layout, source: str, dtype: torch.dtype | None) -> None:
    """Writes ``m3kernels.json``, whose presence says that a native checkpoint is complete."""
    record = {
        "format": VERSION,
        "source": source,
        "torch_dtype": dtype and str(dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("m3kernels", "torch", "safetensors", "transformers")},
        "layout": layout.to_json(),
    }
    write_text(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_layout(folder: Path) -> Layout | None:
    """The source's layout from ``m3kernels.json``; None where there is no such file."""
    if not (folder / RECORD).exists():
        return None
    record = read_json(folder / RECORD)
    if record.get("format") != VERSION:
        raise CheckpointError(
            f"{folder / RECORD} is of format {record.get('format')}, this m3kernels reads {VERSION}: use the release "
            "that wrote it, or give the source with --hf-model after removing that file"
        )
    try:
        return Layout.from_json(record["layout"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / RECORD} is damaged ({error!r}): remove it and give --hf-model") from error


def find_native(path: Path) -> tuple[Path, list[str]]:
    """A native checkpoint: ``path`` itself, or its latest complete ``iter_N`` or ``step-N``; and what was passed over.

    Raises:
        CheckpointError: there is neither.
    """
    if not path.is_dir():
        raise CheckpointError(f"folder {path} does not exist")
    if (path / INDEX).exists() or (path / SINGLE).exists() or (path / UNFINISHED).exists():
        return path, []
    steps = [(int(match[1]), child) for child in path.iterdir() if (match := STEP.fullmatch(child.name))]
    notices = []
    for _, child in sorted(steps, reverse=True):
        complete = (child / INDEX).exists() or (child / SINGLE).exists()
        if complete and (child / "config.json").exists() and not (child / UNFINISHED).exists():
            return child, notices + [f"taking {child}"]
        notices.append(f"{child} is not complete and was passed over")
    raise CheckpointError(f"{path} holds no checkpoint, nor a complete iter_N or step-N folder of one")


def config_text(config: Mapping) -> str:
    """A ``config.json`` as transformers writes it."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def index_text(files: Mapping[str, Header]) -> str:
    """A ``model.safetensors.index.json`` as transformers writes it."""
    weight_map = {name: file for file, header in files.items() for name in header.entries}
    elements = sum(e.nbytes // DTYPES[e.dtype].itemsize for header in files.values() for e in header.entries.values())
    total = {"total_parameters": elements, "total_size": sum(header.nbytes for header in files.values())}
    return json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def copy_others(source: Path, target: Path) -> None:
    """Copies what is neither weights nor ``config.json``: generation config, tokenizer, processor, chat template."""
    for path in sorted(source.iterdir()):
        named = path.suffix in COPIED and path.name not in NOT_COPIED and not path.name.endswith(".index.json")
        if named and path.is_file():
            shutil.copyfile(path, target / path.name)


def check_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError unless the disk of ``folder`` (which need not exist yet) has ``needed`` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder}: {needed} bytes are needed, {free} are free: make room or choose another disk")


def check_target(folder: Path, overwrite: bool, option: str) -> None:
    """Makes sure that a conversion may write to ``folder``: new, empty, or a checkpoint that may be overwritten.

    Raises:
        CheckpointError: it is a file; it is not empty and ``overwrite`` is false; it holds more than a checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{option} {folder} is a file: name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{option} {folder} is not empty: choose another folder, or pass --overwrite")
    known = (*COPIED, ".safetensors", ".tmp", ".md")
    foreign = [p.name for p in folder.iterdir() if p.name != "quantization" and (p.is_dir() or p.suffix not in known)]
    if foreign or not (folder / "config.json").exists() and not (folder / UNFINISHED).exists():
        raise CheckpointError(
            f"{option} {folder} is no checkpoint or holds other things ({listing(foreign) or 'no config.json'}): "
            "--overwrite would delete them; choose another folder"
        )


def empty(folder: Path) -> None:
    """Deletes a folder that ``check_target`` let pass; it is renamed first: half of it never stands under its name."""
    if folder.exists() and any(folder.iterdir()):
        doomed = folder.with_name(f"{folder.name}.deleted-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed)
