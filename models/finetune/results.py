"""What a finished run writes for other libraries: a Hugging Face model, PEFT's adapter, a model with the adapter merged."""

from pathlib import Path

from m3kernels.models.finetune.build import Built
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.ministral3.adapter_files import save_adapter


def export(config: FinetuneConfig, built: Built, folder: Path, *, progress: bool) -> dict[str, Path]:
    """Writes what the configuration asks for; every rank calls it. Folders of an earlier run are replaced.

    Returns:
        folders by what is in them: "model" of a full run; "adapter", and "merged" where asked for.
    """
    model, dtype = built.model, built.dtype
    if model.adapters is None:
        model.save_pretrained(folder / "model", dtype=dtype, overwrite=True, progress=progress)
        return {"model": folder / "model"}
    written = {"adapter": folder / "adapter"}
    base = str(config.checkpoint.pretrained_checkpoint)
    base = str(Path(base).resolve()) if Path(base).exists() else base
    save_adapter(model, folder / "adapter", base_name_or_path=base, overwrite=True)
    if config.checkpoint.merge_adapter:
        written["merged"] = folder / "merged"
        model.save_pretrained(folder / "merged", dtype=dtype, overwrite=True, progress=progress)
    return written
