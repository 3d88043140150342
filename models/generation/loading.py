"""The checkpoint that is generated from: found and checked before a weight is read, then loaded, merged and patched."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

import m3kernels
from m3kernels.models.finetune.data.encode import tokenizer_folder
from m3kernels.models.generation.chat import ALSO, refusals
from m3kernels.models.generation.prompt import GenerationError
from m3kernels.models.ministral3 import Config, Ministral3
from m3kernels.models.ministral3.adapter_files import CONFIG, check_adapter
from m3kernels.models.ministral3.adapters import adapter_of, add_adapters, load_adapter, merge_adapters
from m3kernels.models.ministral3.files import CheckpointError, locate, read_json
from m3kernels.models.ministral3.layout import find_native
from m3kernels.models.ministral3.quantized import quantize_
from m3kernels.models.ministral3.sharding import check as check_split
from m3kernels.models.ministral3.weights import Checkpoint, check_architecture

# what tells models of one family apart, at the level of the language model
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be loaded.

    Attributes:
        folder: of its weights.
        config: of the model that they make.
        adapter: the folder of an adapter that fits it.
        notices: what the person who generates should know.
    """

    folder: Path
    config: Config
    adapter: Path | None = None
    notices: tuple[str, ...] = ()


def find(
    hf_model_path: str | os.PathLike,
    *,
    checkpoint_path: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    revision: str | None = None,
    tp: int = 1,
) -> Found:
    """Finds weights and checks that they are whole, fit their config and each other; none is read.

    Args:
        hf_model_path: a Hugging Face checkpoint, a folder or a Hub id. Of the latter everything is fetched, or without
            weights where ``checkpoint_path`` has these.
        checkpoint_path: a native checkpoint, as ``m3kernels convert import`` writes it, or the folder of its ``iter_N`` or
            ``step-N`` folders, of which the latest complete one is taken.
        adapter: LoRA or DoRA, as PEFT or a finetune saves it.
        revision: branch, tag or commit of a Hub id.
        tp: ranks that are to share each layer.

    Raises:
        CheckpointError: nothing is there, it is damaged, or the two checkpoints are of different models.
        ConfigError: the config asks for what this model does not compute.
        AdapterError: an adapter of another model, or of a kind that is not computed here.
        ParallelError: ``tp`` does not divide the model.
    """
    notices: list[str] = []
    if checkpoint_path is None:
        folder = locate(hf_model_path, revision=revision)
    else:
        folder, passed_over = _native(Path(checkpoint_path).expanduser())
        notices += passed_over
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    if checkpoint_path is not None:
        with refusals():
            hf_folder = tokenizer_folder(hf_model_path, also=ALSO, revision=revision)
        _check_same_model(hf_folder, checkpoint)
    config = Config.from_hf(checkpoint.config, tied=checkpoint.tied, pad_vocab_to=tp)
    check_split(config, tp)
    if adapter is None:
        return Found(folder, config, None, tuple(notices))
    adapter = Path(adapter).expanduser()
    with torch.device("meta"):
        model = Ministral3(config)
    add_adapters(model, *adapter_of(adapter))
    check_adapter(model, adapter)
    notices += _other_base(adapter, {Path(hf_model_path).name, folder.name})
    return Found(folder, config, adapter, tuple(notices))


def load(
    found: Found,
    *,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    device: str | torch.device = "cpu",
    mesh: DeviceMesh | None = None,
    progress: bool = False,
) -> Ministral3:
    """The model in eval mode, frozen, with its adapter merged and m3kernels' kernels in it.

    Args:
        dtype: of the parameters; the checkpoint's own by default. FP8 weights are dequantised but with ``fp8``.
        fp8: hold the text layers' weights in FP8: an FP8 checkpoint's as it has them, others with a scale for each output
            channel, and so any that an adapter is merged into, which takes the memory of ``dtype`` meanwhile.
        mesh: ("dp", "tp") with dp 1; each rank reads its own part alone.
        progress: whether to show a bar.

    Raises:
        GenerationError: ``fp8`` with an adapter over a mesh.
    """
    check_fp8(fp8, found.adapter, 1 if mesh is None else mesh["tp"].size())

    def prepare(model: Ministral3) -> None:
        if found.adapter is not None:
            add_adapters(model, *adapter_of(found.adapter))
        m3kernels.patch(model)

    pad = 1 if mesh is None else mesh["tp"].size()
    options = {"dtype": dtype, "device": device, "mesh": mesh, "pad_vocab_to": pad, "progress": progress}
    if fp8 and found.adapter is None:
        options["quantize"] = "keep" if Checkpoint.open(found.folder).is_fp8 else "fp8"
    model = Ministral3.from_pretrained(found.folder, prepare=prepare, **options)
    if found.adapter is not None:
        load_adapter(model, found.adapter)
        merge_adapters(model)
        if fp8:
            quantize_(model)
        # the layers that were adapted have classes of their own again
        m3kernels.patch(model)
    return model.requires_grad_(False)


def check_fp8(fp8: bool, adapter: str | os.PathLike | None, tp: int) -> None:
    """Raises GenerationError for what goes with FP8 weights on one rank alone."""
    if fp8 and adapter is not None and tp > 1:
        raise GenerationError(
            f"FP8 weights with an adapter over tp={tp}: weights are quantised after an adapter is merged into them, whole; "
            "take tp=1, or save the merged model first (merge_adapters(model), model.save_pretrained(folder))"
        )


def default_device(kind: str = "auto") -> torch.device:
    """The device of this process: "auto" is its GPU where torch sees one.

    Raises:
        GenerationError: a GPU is asked for and there is none, or another kind of device.
    """
    if kind not in ("auto", "cuda", "cpu"):
        raise GenerationError(f"device {kind!r}; allowed: auto, cuda, cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise GenerationError(f"device cuda, but torch {torch.__version__} sees no GPU: take auto or cpu")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _native(path: Path) -> tuple[Path, list[str]]:
    try:
        return find_native(path)
    except CheckpointError as error:
        # a finetune keeps what it resumes from apart from what is used
        for run in (path, path.parent, path.parent.parent):
            if (run / "model" / "config.json").is_file():
                raise CheckpointError(
                    f"{error}; {path} belongs to a finetune, whose model is {run / 'model'}: give that as --hf-model-path"
                ) from error
            if (run / "adapter" / CONFIG).is_file():
                raise CheckpointError(
                    f"{error}; {path} belongs to a finetune, whose adapter is {run / 'adapter'}: give that as --adapter"
                ) from error
        raise


def _check_same_model(hf_folder: Path, checkpoint: Checkpoint) -> None:
    theirs = read_json(hf_folder / "config.json")
    check_architecture(theirs)
    differing = [
        f"{name} ({a} there, {b} in {checkpoint.folder})"
        for name in SIZES
        if (a := _size(theirs, name)) != (b := _size(checkpoint.config, name))
    ]
    if differing:
        raise CheckpointError(
            f"{hf_folder} is another model than the checkpoint's: they differ in {', '.join(differing)}; give the "
            "checkpoint that it was converted from"
        )


def _size(config: Mapping, name: str):
    return config.get("text_config", config).get(name)


def _other_base(adapter: Path, names: set[str]) -> list[str]:
    """A notice where an adapter says that it was trained on another checkpoint; shapes alone cannot tell."""
    base = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not base or Path(base).name in names:
        return []
    return [f"the adapter was trained on {base}; it fits {', '.join(sorted(names))} by its shapes"]
