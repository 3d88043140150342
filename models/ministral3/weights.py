"""Checkpoints of Ministral 3 as they are in the wild, read under transformers' runtime names, only the parts asked for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from m3kernels.models.ministral3._files import CODES, CheckpointError, Header, read_json
from m3kernels.models.ministral3.hub import locate

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FP8 = torch.float8_e4m3fn
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
WEIGHT_SCALE = "_scale_inv"  # after the name of the weight
SCALES = (".weight_scale_inv", ".activation_scale")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
# what a name begins with on disk, and what transformers' module has there; the first that fits counts
PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "model.language_model.": "model.language_model.",
    "model.vision_tower.": "model.vision_tower.",
    "model.multi_modal_projector.": "model.multi_modal_projector.",
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
Index = tuple[slice, ...]


def shorten(names, most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def runtime_name(name: str) -> str:
    """transformers' name in memory of a tensor that a file calls ``name``; CheckpointError where it has none."""
    for prefix, target in PREFIXES.items():
        if name.startswith(prefix):
            return target + name.removeprefix(prefix)
    raise CheckpointError(f"tensor {name} is none of Ministral 3's: names begin with {', '.join(PREFIXES)}")


def config_dtype(config: dict) -> torch.dtype:
    """The dtype that transformers loads an FP8 weight in: the config's, bfloat16 where it has none."""
    text = config.get("text_config") or {}
    for level in (config, text):
        name = level.get("dtype") or level.get("torch_dtype")
        if name and name != "auto":
            dtype = getattr(torch, str(name).removeprefix("torch."), None)
            if not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"config.json: dtype {name!r} is not one of torch's")
            return dtype
    return torch.bfloat16


def dequantise(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, index: Index, dtype: torch.dtype
) -> Tensor:
    """``weight`` [rows, columns] in E4M3, which stands at ``index`` of its matrix, times ``scale`` (the whole matrix's),
    one for all (``block`` None) or one a block; the product is fp32, then cast to ``dtype``."""
    return (weight.float() * spread(scale, block, index)).to(dtype)


def spread(scale: Tensor, block: tuple[int, int] | None, index: Index) -> Tensor:
    """fp32 scales [rows, columns] of the elements at ``index``, or one scalar."""
    if block is None:
        return scale.float().reshape(())
    rows, columns = (torch.arange(part.start, part.stop) // size for part, size in zip(index, block))
    return scale.float()[rows][:, columns]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors under transformers' runtime names; nothing but headers is read before ``read``.

    ``headers`` by file, ``source`` (runtime name: file and name there) with scales under their weight's runtime name plus
    what the file has after it, ``index_text`` the index as it is (None: one file).
    """

    folder: Path
    config: dict
    headers: dict[str, Header]
    source: dict[str, tuple[str, str]]
    index_text: str | None

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> "Checkpoint":
        """``model``: a folder or a Hub id. Raises CheckpointError naming what is missing, damaged or unknown."""
        folder = locate(model, revision)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
        index_text, files = _files(folder)
        headers = {file: Header.read(folder / file) for file in files}
        if index_text is not None:
            _check_index(folder, json.loads(index_text)["weight_map"], headers)
        source: dict[str, tuple[str, str]] = {}
        for file, header in headers.items():
            for name in header.entries:
                runtime = runtime_name(name)
                if runtime in source:
                    raise CheckpointError(
                        f"{folder}: {source[runtime][1]} and {name} are one tensor, {runtime}: drop one"
                    )
                source[runtime] = (file, name)
        checkpoint = cls(folder, read_json(folder / "config.json"), headers, source, index_text)
        checkpoint._check_scales()
        return checkpoint

    @property
    def names(self) -> list[str]:
        """Runtime names of the weights, without FP8 scales."""
        return [name for name in self.source if not name.endswith(SCALES)]

    @property
    def scales(self) -> list[str]:
        """Runtime names of FP8's weight and activation scales."""
        return [name for name in self.source if name.endswith(SCALES)]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: true exactly where the files hold no head."""
        return HEAD not in self.source

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in the file."""
        return self._entry(name).dtype

    def bytes(self, name: str) -> int:
        """Its size in the file."""
        return self._entry(name).bytes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that ``read`` gives: the file's, for FP8 weights the config's."""
        stored = self.stored_dtype(name)
        return config_dtype(self.config) if stored == FP8 else stored

    def read(self, name: str, index: Index | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """``name``'s elements at ``index`` (a slice with step 1 for each leading dimension; None: all), in ``dtype``.

        FP8 weights are dequantised. Raises CheckpointError for unknown names and for an index out of the tensor's shape.
        """
        dtype = dtype or self.dtype(name)
        full = self._index(name, index)
        value = self.read_stored(name, None if index is None else full)
        if value.dtype == FP8:
            return dequantise(value, self.read_stored(name + WEIGHT_SCALE), self.block(name), full, dtype)
        return value.to(dtype)

    def read_stored(self, name: str, index: Index | None = None) -> Tensor:
        """As it is in the file, FP8 and scales included."""
        file, source = self._where(name)
        with safe_open(self.folder / file, framework="pt") as opened:
            return opened.get_tensor(source) if index is None else opened.get_slice(source)[index]

    def block(self, name: str) -> tuple[int, int] | None:
        """(rows, columns) that share a scale of the FP8 weight ``name``; None: one scale for all."""
        shape, grid = self.shape(name), self.shape(name + WEIGHT_SCALE)
        return block_of(name, shape, grid, self.config)

    def _where(self, name: str) -> tuple[str, str]:
        if name not in self.source:
            raise CheckpointError(f"{self.folder} has no tensor {name}: .names lists what it has")
        return self.source[name]

    def _entry(self, name: str):
        file, source = self._where(name)
        return self.headers[file].entries[source]

    def _index(self, name: str, index: Index | None) -> Index:
        shape = self.shape(name)
        if index is None:
            return tuple(slice(0, size) for size in shape)
        if len(index) > len(shape) or any(part.step not in (None, 1) for part in index):
            raise CheckpointError(f"index {index} of {name} {shape}: one slice with step 1 for each leading dimension")
        full = (*index, *(slice(None) for _ in shape[len(index) :]))
        bounds = [part.indices(size)[:2] for part, size in zip(full, shape)]
        beyond = any((part.stop or 0) > size or (part.start or 0) > size for part, size in zip(full, shape))
        if beyond or any(stop < start for start, stop in bounds):
            raise CheckpointError(f"index {index} does not lie in {name} {shape}")
        return tuple(slice(*bound) for bound in bounds)

    def _check_scales(self) -> None:
        for name in self.source:
            stored = self.stored_dtype(name)
            if name.endswith(SCALES):
                weight = name.rpartition(".")[0] + ".weight"
                if weight not in self.source or self.stored_dtype(weight) != FP8:
                    raise CheckpointError(
                        f"{self.folder}: {name} is a scale, and {weight} is no FP8 (E4M3) weight there"
                    )
                if stored not in SCALE_DTYPES:
                    raise CheckpointError(f"{self.folder}: {name} is {CODES[stored]}: scales are F32, BF16 or F8_E8M0")
            elif stored == FP8:
                if name + WEIGHT_SCALE not in self.source:
                    raise CheckpointError(f"{self.folder}: {name} is FP8 and has no {name + WEIGHT_SCALE}")
                self.block(name)
            elif not stored.is_floating_point or stored == torch.float8_e5m2:
                raise CheckpointError(
                    f"{self.folder}: {name} is {CODES[stored]}: weights are F32, F16, BF16, or F8_E4M3 with scales"
                )


def block_of(name: str, shape: tuple, grid: tuple, config: dict) -> tuple[int, int] | None:
    """(rows, columns) that share a scale of a weight ``shape`` whose scales are ``grid``; None: one scale for all."""
    if all(size == 1 for size in grid):
        return None
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    if block is None and len(grid) == 2 and not shape[0] % grid[0] and not shape[1] % grid[1]:
        block = (shape[0] // grid[0], shape[1] // grid[1])
    if block is None or len(grid) != 2 or grid != tuple(-(-size // part) for size, part in zip(shape, block)):
        raise CheckpointError(
            f"{name} {shape} has scales {grid}, which is not one for each block of {block or 'a size that divides it'} "
            "(quantization_config.weight_block_size)"
        )
    return tuple(block)


def _files(folder: Path) -> tuple[str | None, list[str]]:
    """The index's text (None without one) and the weight files, of which all exist."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            raise CheckpointError(f"{folder / INDEX} has no weight_map: fetch it again")
        files = sorted(set(index["weight_map"].values()))
        foreign = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
        if foreign:
            raise CheckpointError(
                f"{folder / INDEX} names {shorten(foreign)}: only safetensors files beside it are read"
            )
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {shorten(missing)}, which {INDEX} names: fetch them again")
        return (folder / INDEX).read_text(encoding="utf-8"), files
    if (folder / SINGLE).is_file():
        return None, [SINGLE]
    found = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
    )
    pickles = [name for name in found if not name.endswith(".safetensors")]
    if pickles:
        raise CheckpointError(
            f"{folder} holds {shorten(pickles)} and no {SINGLE}: pickled weights run code when read, and are not read "
            "here; save the model with transformers' save_pretrained, which writes safetensors"
        )
    beside = f", only {shorten(found)}, whose names are not Hugging Face's" if found else ""
    raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}{beside}: fetch those of the checkpoint")


def _check_index(folder: Path, weight_map: dict[str, str], headers: dict[str, Header]) -> None:
    absent = [f"{name} in {file}" for name, file in weight_map.items() if name not in headers[file].entries]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX} names tensors that the files lack: {shorten(absent)}: fetch them again"
        )
    unnamed = [
        f"{n} in {file}" for file, header in headers.items() for n in header.entries if weight_map.get(n) != file
    ]
    if unnamed:
        raise CheckpointError(
            f"{folder / INDEX} does not name tensors of the files: {shorten(unnamed)}: fetch it again"
        )


def expected_shapes(config: dict, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by runtime name of the model that ``config`` describes, from transformers on the meta device.

    ``tied``: without a head of its own. Raises CheckpointError for another model's config.
    """
    from transformers import Ministral3Config, Ministral3ForCausalLM, Mistral3Config, Mistral3ForConditionalGeneration

    kind, text = config.get("model_type"), (config.get("text_config") or {}).get("model_type")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if kind == "mistral3" and text == "ministral3":
        build, settings = Mistral3ForConditionalGeneration, Mistral3Config(**plain)
    elif kind == "ministral3":
        build, settings = Ministral3ForCausalLM, Ministral3Config(**plain)
    else:
        found = f"model_type {kind!r}" + (f" with text_config.model_type {text!r}" if text else "")
        raise CheckpointError(
            f"config.json has {found}: mistral3 with a ministral3 text_config, or ministral3, is read"
        )
    with torch.device("meta"):
        model = build(settings)
    shapes = {runtime_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if tied:
        shapes.pop(HEAD)
    return shapes


def may_be_tied(config: dict) -> bool:
    """Whether the config lets the head be the embedding; transformers has the flag at two levels."""
    flags = [level.get("tie_word_embeddings") for level in (config, config.get("text_config") or {})]
    return True in flags or False not in flags


def check_shapes(found: Mapping[str, tuple], expected: Mapping[str, tuple], what: str, remedy: str) -> None:
    """Raises CheckpointError naming every kind of difference: missing, extra and misshapen tensors."""
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"lacks {shorten(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"has {shorten(extra)}, which the model lacks")
    shapes = [f"{n} {found[n]} instead of {expected[n]}" for n in expected if n in found and found[n] != expected[n]]
    if shapes:
        problems.append(f"has the wrong shape for {shorten(shapes)}")
    if problems:
        raise CheckpointError(f"{what} {'; '.join(problems)}: {remedy}")


def check_complete(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the files hold exactly the tensors of the model that the config describes."""
    tied = checkpoint.tied and may_be_tied(checkpoint.config)
    found = {name: checkpoint.shape(name) for name in checkpoint.names}
    check_shapes(
        found,
        expected_shapes(checkpoint.config, tied),
        f"{checkpoint.folder}",
        "fetch or save it again, or use the config.json that belongs to it",
    )
