"""What a finished run writes for other libraries: a Hugging Face model, PEFT's adapter, a model with the adapter merged."""

from pathlib import Path

import torch
import torch.distributed as dist

from m3kernels.models.finetune.build import Built
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.ministral3 import Ministral3
from m3kernels.models.ministral3.adapter_files import save_adapter
from m3kernels.models.ministral3.adapters import adapted_layers
from m3kernels.models.ministral3.files import CheckpointError, listing
from m3kernels.models.ministral3.merging import PARTS
from m3kernels.models.ministral3.shards import whole_of
from m3kernels.models.ministral3.weights import Checkpoint


def export(config: FinetuneConfig, built: Built, folder: Path, *, progress: bool) -> dict[str, Path]:
    """Writes what the configuration asks for; every rank calls it. Folders of an earlier run are replaced.

    The model is not to be trained afterwards: its parameters are the masters then.

    Returns:
        folders by what is in them: "model" of a full run; "adapter", and "merged" where asked for.
    """
    model, dtype = built.model, built.dtype
    built.trained.take_masters()
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
        check_merged(model, folder / "merged")
    return written


@torch.no_grad()
def check_merged(model: Ministral3, folder: Path) -> None:
    """Reads merged weights back: on random inputs each must do what weight and adapter do, but for its rounding.

    Every rank calls this, the first one reads.

    Raises:
        CheckpointError: one does not; on every rank.
    """
    state, wrong = model.state_dict(), []
    checkpoint = Checkpoint.open(folder) if dist.get_rank() == 0 else None
    for name, layer in adapted_layers(model).items():
        parts = [state.get(f"{name}.{part}") for part in ("weight", *PARTS)]
        weight, A, B, magnitude = (None if part is None else whole_of(part).cpu().double() for part in parts)
        if checkpoint is None:
            continue
        merged = checkpoint.read(f"{name}.weight")
        x = torch.randn(4, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        wanted = x @ weight.T + layer.scaling * (x @ A.T) @ B.T
        if magnitude is not None:
            wanted *= magnitude / torch.linalg.norm(weight + layer.scaling * B @ A, dim=1)
        error = float((x @ merged.double().T - wanted).norm() / wanted.norm())
        if not error <= torch.finfo(merged.dtype).eps:
            wrong.append(f"{name} (relative error {error:.1e})")
    found = [wrong]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        raise CheckpointError(f"{folder}: merged weights do not do what the adapters do: {listing(found[0])}")
