"""Names and files of a Ministral 3 checkpoint: every layout in the wild, read by transformers' runtime names."""

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from m3kernels.models.ministral3 import fp8
from m3kernels.models.ministral3.files import (
    CODES,
    DTYPES,
    PICKLES,
    CheckpointError,
    Entry,
    Header,
    listing,
    locate,
    read_header,
    read_json,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# stands in a folder for as long as its import is not complete
UNFINISHED = "import-unfinished.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
SCALES = (".weight_scale_inv", ".activation_scale")
# (in the file, at run time); the first that fits is taken
PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.language_model.", "model.language_model."),
    ("model.vision_tower.", "model.vision_tower."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)


def runtime_name(name: str) -> str:
    """The name that transformers gives a checkpoint's tensor in memory; one of no known layout comes back as it is."""
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def disk_name(name: str, text_only: bool) -> str:
    """The name under which transformers saves what it calls ``name`` in memory."""
    for new, old in [("model.", "model.language_model."), *PREFIXES[-2:-1]] if text_only else PREFIXES[:4]:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def is_scale(name: str) -> bool:
    """Whether a tensor belongs to the FP8 form of a weight, in any layout."""
    return name.endswith(SCALES)


def expected_shapes(config: Mapping, tied: bool) -> dict[str, tuple[int, ...]]:
    """Runtime names and shapes of the tensors that a model of this ``config.json`` has, without a head if ``tied``.

    They are those of transformers' own model, built on the meta device.

    Raises:
        CheckpointError: the config is not one of a Ministral 3, or transformers cannot build a model from it.
    """
    from transformers import (
        Ministral3Config,
        Ministral3ForCausalLM,
        Mistral3Config,
        Mistral3ForConditionalGeneration,
    )

    check_architecture(config)
    config = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "quantization_config"}
    text_only = config["model_type"] == "ministral3"
    config_class = Ministral3Config if text_only else Mistral3Config
    model_class = Ministral3ForCausalLM if text_only else Mistral3ForConditionalGeneration
    try:
        with torch.device("meta"):
            model = model_class(config_class.from_dict(config))
    except Exception as error:
        raise CheckpointError(f"transformers cannot build a model from config.json: {error}") from error
    shapes = {runtime_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del shapes[HEAD]
    return shapes


def check_architecture(config: Mapping) -> None:
    """Raises CheckpointError unless the config is a Ministral 3's, and quantised not at all or as fine-grained FP8."""
    kind = config.get("model_type")
    text = config.get("text_config", {}).get("model_type") if kind == "mistral3" else kind
    if text != "ministral3":
        raise CheckpointError(
            f"config.json is of model_type {kind!r} (text {text!r}); allowed: 'mistral3' with text 'ministral3', "
            "or 'ministral3' alone"
        )
    quantization = config.get("quantization_config")
    if quantization and quantization.get("quant_method") != "fp8":
        raise CheckpointError(
            f"quantization_config's quant_method is {quantization.get('quant_method')!r}; allowed: 'fp8' "
            "(E4M3 with weight_scale_inv) or none: take the BF16 release of this checkpoint"
        )


def shape_errors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, padded: bool = False
) -> list[str]:
    """What is wrong with the names and shapes that were found, as sentences; ``padded`` allows more vocabulary rows."""
    errors = []
    if missing := expected.keys() - found.keys():
        errors.append(f"missing: {listing(missing)}")
    if extra := found.keys() - expected.keys():
        errors.append(f"not in this model: {listing(extra)}")
    odd = []
    for name in expected.keys() & found.keys():
        have, want = found[name], expected[name]
        grown = padded and name in (EMBEDDING, HEAD) and len(have) == 2 and have[0] > want[0] and have[1:] == want[1:]
        if have != want and not grown:
            odd.append(f"{name} is {list(have)}, config.json says {list(want)}")
    if odd:
        errors.append("of another shape: " + listing(odd))
    return errors


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, its name there, dtype and shape there."""

    file: str
    name: str
    entry: Entry


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors in any of the three layouts, read by runtime names; made by ``Checkpoint.open``.

    Attributes:
        folder: where it is.
        config: the dict of its ``config.json``.
        files: the header of each safetensors file, by file name, names as in the file.
        stored: where each weight lies, by runtime name.
        scales: where each FP8 scale lies, by runtime name.
    """

    folder: Path
    config: dict
    files: dict[str, Header]
    stored: dict[str, Stored]
    scales: dict[str, Stored]

    @classmethod
    def open(
        cls, source: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> "Checkpoint":
        """Reads headers and ``config.json`` of a local folder or a Hub id; no weight is read yet.

        Raises:
            CheckpointError: nothing is there, a file is missing, truncated, corrupt or a pickle, the index does not
                fit the files, two tensors have one name, an FP8 weight has no scale, or it is another architecture.
        """
        folder = locate(source, revision=revision, token=token)
        files = {name: read_header(folder / name) for name in _weight_files(folder)}
        config = read_json(folder / "config.json")
        check_architecture(config)
        _check_index(folder, files)
        stored, scales = {}, {}
        for file, header in files.items():
            if "DCP_SHARDING_INFO" in (header.metadata or {}):
                raise CheckpointError(
                    f"{folder / file} holds pieces of tensors, as ranks of a job wrote them: join them with torch's "
                    "consolidate_safetensors_files_on_every_rank first"
                )
            for name, entry in header.entries.items():
                runtime = runtime_name(name)
                table = scales if is_scale(name) else stored
                if other := table.get(runtime):
                    raise CheckpointError(
                        f"{folder}: {other.name} ({other.file}) and {name} ({file}) are both {runtime}: remove one"
                    )
                table[runtime] = Stored(file, name, entry)
        checkpoint = cls(folder, config, files, stored, scales)
        checkpoint._check_scales()
        return checkpoint

    @property
    def names(self) -> list[str]:
        """Runtime names, in the order of the files, without the scales of FP8 weights."""
        return list(self.stored)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: true iff there is no tensor for it, whatever the config's flags say."""
        return HEAD not in self.stored

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block with an FP8 scale of its own."""
        return tuple((self.config.get("quantization_config") or {}).get("weight_block_size") or fp8.BLOCK)

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is FP8."""
        return any(stored.entry.dtype == "F8_E4M3" for stored in self.stored.values())

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of what is not quantised: the config's, else the most common one."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        dtype = getattr(torch, str(said).removeprefix("torch."), None)
        if dtype in CODES and dtype != torch.float8_e4m3fn:
            return dtype
        counts = Counter(s.entry.dtype for s in self.stored.values() if s.entry.dtype != "F8_E4M3")
        return DTYPES[counts.most_common(1)[0][0]] if counts else torch.bfloat16

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by runtime name."""
        return self._find(name).entry.shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype in the file."""
        return DTYPES[self._find(name).entry.dtype]

    def scale_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an FP8 weight's scales in the file."""
        return self.scales[name + "_scale_inv"].entry.shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which ``read`` gives a tensor by default: an FP8 weight's is ``float_dtype``."""
        dtype = DTYPES[self._find(name).entry.dtype]
        return self.float_dtype if dtype == torch.float8_e4m3fn else dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor, or ``tensor[index]`` of it, on the CPU; only what is asked for is read from the disk.

        A whole tensor may be a private map of the file: copy it before the file itself is rewritten.

        An FP8 weight is multiplied by its scale in fp32 and cast once, exactly as transformers dequantises it.

        Args:
            name: runtime name.
            index: one slice of step 1 for each leading dimension.
            dtype: of the result; the tensor's own (see ``dtype``) by default.

        Raises:
            CheckpointError: no such name; an index that is no tuple of such slices; the file cannot be read.
        """
        stored, ranges = self._find(name), self._ranges(name, index)
        shape = stored.entry.shape
        dtype = dtype or self.dtype(name)
        if not all(ranges):
            # a rank of an uneven sharding; safetensors refuses empty slices
            return torch.empty([len(r) for r in ranges] + list(shape[len(ranges) :]), dtype=dtype)
        tensor = self._load(stored, tuple(slice(r.start, r.stop) for r in ranges))
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor.to(dtype)
        rows, columns = [*ranges, *map(range, shape[len(ranges) :])]
        scale = self._load(self.scales[name + "_scale_inv"])
        return fp8.dequantize(tensor, fp8.spread(scale, self.block, rows, columns), dtype)

    def read_fp8(self, name: str, index: tuple[slice, ...] | None = None) -> tuple[Tensor, Tensor]:
        """An FP8 weight, or ``weight[index]`` of it, as it is stored, and its scales in fp32: (), or of the blocks it has."""
        ranges = self._ranges(name, index)
        weight = self._load(self._find(name), tuple(slice(r.start, r.stop) for r in ranges))
        scale = self._load(self.scales[name + "_scale_inv"]).float()
        if scale.numel() == 1:
            return weight, scale.reshape(())
        return weight, scale[tuple(slice(r.start // b, -(-r.stop // b)) for r, b in zip(ranges, self.block))]

    def read_scale(self, name: str) -> Tensor:
        """An FP8 scale by runtime name, as it is stored."""
        return self._load(self.scales[name])

    def _ranges(self, name: str, index: tuple[slice, ...] | None) -> list[range]:
        shape, index = self.shape(name), index or ()
        if len(index) > len(shape) or any(not isinstance(i, slice) or i.step not in (None, 1) for i in index):
            raise CheckpointError(f"{name} {list(shape)}: index {index} is no tuple of slices of step 1")
        return [range(*i.indices(size)) for i, size in zip(index, shape)]

    def _find(self, name: str) -> Stored:
        try:
            return self.stored[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}") from None

    def _load(self, stored: Stored, index: tuple[slice, ...] = ()) -> Tensor:
        try:
            with safe_open(self.folder / stored.file, framework="pt") as file:
                return file.get_slice(stored.name)[index] if index else file.get_tensor(stored.name)
        except Exception as error:
            raise CheckpointError(f"{self.folder / stored.file}: {stored.name} cannot be read: {error}") from error

    def _check_scales(self) -> None:
        for name, stored in self.stored.items():
            if stored.entry.dtype != "F8_E4M3":
                continue
            scale = self.scales.get(name + "_scale_inv")
            if scale is None:
                raise CheckpointError(f"{self.folder}: {stored.name} is FP8, but {stored.name}_scale_inv is missing")
            shape = stored.entry.shape
            if len(shape) != 2 or not fp8.fits(scale.entry.shape, shape, self.block):
                raise CheckpointError(
                    f"{self.folder}: {scale.name} is {list(scale.entry.shape)}; for {list(shape)} in blocks of "
                    f"{list(self.block)} it must be a scalar, [1] or {list(fp8.grid(shape, self.block))}"
                )

    def check(self, *, padded: bool = False) -> dict[str, tuple[int, ...]]:
        """The names and shapes that ``config`` asks for, after making sure that the files hold exactly these.

        Raises:
            CheckpointError: tensors are missing, not in the model, or of another shape; it names them.
        """
        expected = expected_shapes(self.config, tied=False)
        if self.tied and may_be_tied(self.config):
            del expected[HEAD]
        errors = shape_errors({name: self.shape(name) for name in self.names}, expected, padded=padded)
        known = {name.removesuffix("weight") + suffix.removeprefix(".") for name in expected for suffix in SCALES}
        if odd := self.scales.keys() - known:
            errors.append(f"scales of no weight: {listing(odd)}")
        if errors:
            raise CheckpointError(f"{self.folder} does not hold the model of its config.json; " + "; ".join(errors))
        return expected


def may_be_tied(config: Mapping) -> bool:
    """Whether a checkpoint without a head is complete: unless the flag is false at both levels (absent is the default)."""
    if config["model_type"] == "ministral3":
        return config.get("tie_word_embeddings", False)
    return config.get("tie_word_embeddings", True) or config["text_config"].get("tie_word_embeddings", False)


def _weight_files(folder: Path) -> list[str]:
    """File names of the weights: those of the index, or the single file."""
    if (folder / UNFINISHED).exists():
        raise CheckpointError(f"{folder} is an interrupted import: run the same import again, it goes on from there")
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}: remove the one that is out of date")
    if single.exists():
        return [SINGLE]
    if index.exists():
        files = set(_weight_map(index).values())
        if odd := [name for name in files if not re.fullmatch(r"[^/\\]+\.safetensors", name)]:
            raise CheckpointError(f"{index} names files that are no safetensors in its folder: {listing(odd)}")
        if missing := [name for name in files if not (folder / name).exists()]:
            raise CheckpointError(f"{folder} lacks files that its index names: {listing(missing)}; get them again")
        return sorted(files)
    found = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in found if name.endswith(PICKLES)]:
        raise CheckpointError(
            f"{folder} has no safetensors but {listing(pickles)}: pickles can run code and are not read; "
            "save the model again with transformers' save_pretrained"
        )
    if "consolidated.safetensors" in found:
        raise CheckpointError(
            f"{folder} holds Mistral's own format (consolidated.safetensors), not Hugging Face's: "
            f"get the files {SINGLE} or {INDEX} and its shards too"
        )
    if shards := [name for name in found if name.endswith(".safetensors")]:
        raise CheckpointError(f"{folder} holds {listing(shards)}, but no {INDEX}: get that file, too")
    raise CheckpointError(f"{folder} holds no checkpoint: neither {SINGLE} nor {INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; get it again")
    return weight_map


def _check_index(folder: Path, files: Mapping[str, Header]) -> None:
    """The index and the headers must name the same tensors in the same files."""
    if not (folder / INDEX).exists():
        return
    said: Iterable = _weight_map(folder / INDEX).items()
    held = [(name, file) for file, header in files.items() for name in header.entries]
    if missing := set(said) - set(held):
        raise CheckpointError(
            f"{folder}: tensors that {INDEX} names are not in their files: "
            + listing(f"{name} ({file})" for name, file in missing)
        )
    if extra := set(held) - set(said):
        raise CheckpointError(
            f"{folder}: tensors that {INDEX} does not name: " + listing(f"{name} ({file})" for name, file in extra)
        )
