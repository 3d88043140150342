"""What a finished run writes for other libraries: a Hugging Face model, PEFT's adapter, a model with the adapter merged."""

from pathlib import Path

import torch

from m3kernels.models.finetune.build import DTYPES, Built, is_adapter
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.ministral3.adapters import save_adapter, save_merged


def export(config: FinetuneConfig, built: Built, folder: Path, *, progress: bool) -> dict[str, Path]:
    """Writes what the configuration asks for; every rank calls it. Folders of an earlier run are replaced.

    Returns:
        folders by what is in them: "model" of a full run; "adapter", and "merged" where asked for.
    """
    model = built.model
    dtype = DTYPES[config.train.precision][1]
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        model.save_pretrained(folder / "model", dtype=dtype, overwrite=True, progress=progress)
        return {"model": folder / "model"}
    written = {"adapter": folder / "adapter"}
    base = str(config.checkpoint.pretrained_checkpoint)
    base = str(Path(base).resolve()) if Path(base).exists() else base
    save_adapter(
        model,
        folder / "adapter",
        base_name_or_path=base,
        dtype=torch.promote_types(dtype, torch.float32),
        overwrite=True,
    )
    if config.checkpoint.merge_adapter:
        written["merged"] = folder / "merged"
        save_merged(model, folder / "merged", dtype=dtype, overwrite=True, progress=progress)
    return written
