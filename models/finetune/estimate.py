"""What a run will need and do, before it does it: parameters trained by part, memory a rank, FLOPs a token."""

from dataclasses import dataclass, replace

import torch

from m3kernels.models.finetune.build import DTYPES, PARTS, part_of_name
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.ministral3 import Ministral3, set_recompute
from m3kernels.models.ministral3.merging import is_adapter
from m3kernels.models.ministral3.recompute import kept_bytes, least_recompute
from m3kernels.models.ministral3.sharding import row_of

GIB = 2**30
# what is left to the allocator's fragments, workspaces and NCCL
SPARE = 0.08
LOGITS_BYTES = 3 * 256 * 2**20
# dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


@dataclass(frozen=True)
class Counts:
    """Attributes: parameters of a part of the model, those of them that are trained, those that are adapters."""

    total: int
    trained: int
    adapters: int


def count(model: Ministral3) -> dict[str, Counts]:
    """By part of the model."""
    found = {}
    for part in PARTS:
        mine = [(name, p) for name, p in model.named_parameters() if part_of_name(name) == part]
        if mine:
            found[part] = Counts(
                sum(p.numel() for _, p in mine),
                sum(p.numel() for _, p in mine if p.requires_grad),
                sum(p.numel() for name, p in mine if is_adapter(name)),
            )
    return found


@dataclass(frozen=True)
class Memory:
    """Bytes a rank, estimated: of weights, gradients and optimizer (``states``), activations, and what a step needs besides.

    Attributes:
        kept: of weights that data-parallel ranks do not let go of when a layer is done: frozen ones never, trained ones from
            forward to backward; 0 where they do.
    """

    weights: int
    states: int
    activations: int
    other: int
    kept: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.states + self.activations + self.other + self.kept


def states_bytes(model: Ministral3, config: FinetuneConfig, tp: int, batch_ranks: int) -> tuple[int, int]:
    """(weights, gradients and optimizer) of a rank."""
    stored, computed = DTYPES[config.train.precision]
    weights = states = 0
    for name, p in model.named_parameters():
        share = p.numel() / (tp if row_of(name).dim is not None else 1) / batch_ranks
        if not p.requires_grad:
            # a frozen tower stays whole on every rank
            frozen_tower = part_of_name(name) != "language_model"
            weights += (share * batch_ranks if frozen_tower else share) * computed.itemsize
            continue
        own_master = batch_ranks > 1 or stored == computed
        weights += share * (stored.itemsize if own_master else stored.itemsize + computed.itemsize)
        moments = 2 * max(stored.itemsize, 4) if config.optimizer.name == "adamw" else 2
        states += share * (stored.itemsize + moments)
    return int(weights), int(states)


def choose_recompute(
    model: Ministral3, config: FinetuneConfig, tp: int, batch_ranks: int, memory: int | None
) -> Memory:
    """Sets what layers of text model and vision tower recompute, and says what a rank will need.

    Weights of other data-parallel ranks are kept where nothing has to be recomputed for it.

    Args:
        memory: bytes of the GPU; None on a CPU, where ``auto`` recomputes nothing. Where all that is known does not fit,
            everything is recomputed: the estimate takes forwards for full, and all of them for images.
    """
    text = model.model.language_model
    _, dtype = DTYPES[config.train.precision]
    kept = kept_bytes(text.config, config.dataset.seq_length, dtype, tp)
    weights, states = states_bytes(model, config, tp, batch_ranks)
    step = _step_bytes(model, tp, batch_ranks, kept["none"], dtype)
    vision = {mode: _vision_bytes(model, config, dtype, mode) for mode in ("none", "all")}
    asked = config.train.recompute
    if asked == "auto" and memory is not None:
        budget = int(memory * (1 - SPARE) - weights - states - step)
        tower, modes = _least(kept, len(text.layers), vision, budget)
    else:
        tower, modes = ("all" if asked in ("attention", "all") else "none"), "none" if asked == "auto" else asked
    set_recompute(model, modes)
    if model.config.vision is not None:
        model.model.vision_tower.recompute = tower
    found = Memory(weights, states, sum(kept[mode] for mode in text.recompute), step + vision[tower])
    of_others = kept_of_others(model, config, tp, batch_ranks)
    recomputes = set(text.recompute) != {"none"} or tower != "none"
    if memory is None or recomputes or found.total + of_others > memory * (1 - SPARE):
        return found
    return replace(found, kept=of_others)


def kept_of_others(model: Ministral3, config: FinetuneConfig, tp: int, batch_ranks: int) -> int:
    """Bytes of all gathered weights at once, beyond what a rank has of them; what is computed in is no trained one's master."""
    _, computed = DTYPES[config.train.precision]
    total = 0.0
    for name, p in model.named_parameters():
        part = p.numel() / (tp if row_of(name).dim is not None else 1) * computed.itemsize
        if p.requires_grad:
            total += part
        elif part_of_name(name) == "language_model":
            total += part * (1 - 1 / batch_ranks)
    return int(total) if batch_ranks > 1 else 0


def _step_bytes(model: Ministral3, tp: int, batch_ranks: int, widest: int, dtype: torch.dtype) -> int:
    """Logits of a chunk, the widest values of one layer, and what FSDP2 has gathered: two layers, embedding and head."""
    text = model.model.language_model
    layer = sum(p.numel() for p in text.layers[0].parameters()) / tp * dtype.itemsize
    embedding = text.embed_tokens.weight.numel() / tp * dtype.itemsize
    return int(LOGITS_BYTES + widest + (2 * layer + 2 * embedding if batch_ranks > 1 else 0))


def _vision_bytes(model: Ministral3, config: FinetuneConfig, dtype: torch.dtype, mode: str) -> int:
    """Activations of the tower for a forward that is all images; nothing is kept of one that is frozen."""
    vision = model.config.vision
    if vision is None:
        return 0
    patches = config.dataset.seq_length * vision.spatial_merge_size**2
    one = patches * (14 * vision.hidden_size + 4 * vision.intermediate_size) * dtype.itemsize
    if not any(p.requires_grad for p in model.model.vision_tower.parameters()):
        return one
    inputs = patches * vision.hidden_size * dtype.itemsize
    return vision.num_layers * (one if mode == "none" else inputs) + (0 if mode == "none" else one)


def _least(kept: dict[str, int], layers: int, vision: dict[str, int], budget: int) -> tuple[str, tuple[str, ...]]:
    """Modes of tower and decoder layers that fit: the tower recomputes before the decoder recomputes its attention."""
    for tower, worst in (("none", ("none", "cheap", "attention")), ("all", tuple(kept))):
        try:
            modes = least_recompute(kept, layers, budget - vision[tower])
        except ValueError:
            continue
        if set(modes) <= set(worst):
            return tower, modes
    return "all", ("all",) * layers


def flops_a_token(model: Ministral3, config: FinetuneConfig) -> float:
    """FLOPs that a step of training must compute for each token in linears: 2 a parameter forward, 2 for the input's gradient,
    2 for the weight's where it is trained. Attention is not in it, neither is recomputing nor the vision tower."""
    text = model.model.language_model
    linears = [
        p
        for name, p in model.named_parameters()
        if p.dim() == 2 and part_of_name(name) == "language_model" and not is_adapter(name)
    ]
    embedding = text.embed_tokens.weight
    tied = model.lm_head.weight is embedding
    total = 0.0
    for p in linears:
        if p is embedding and not tied:
            continue
        total += p.numel() * (6 if p.requires_grad else 4)
    return total


def peak_flops(device: torch.device) -> float | None:
    """Of dense bf16 products by the data sheet; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def summary(config: FinetuneConfig, model: Ministral3, memory: Memory, ranks: int, steps_per_epoch: int | None) -> str:
    """What ``--dry-run`` prints, and a run before it begins."""
    tp = config.model.tensor_model_parallel_size
    lines = [f"layout: {ranks} rank{'s' if ranks > 1 else ''} = data parallel {ranks // tp} x tensor parallel {tp}"]
    if config.model.replicate > 1:
        lines[-1] += f", of which {config.model.replicate} copies"
    lines.append(f"{'part':<24}{'parameters':>16}{'trained':>16}{'adapters':>14}")
    for part, counts in count(model).items():
        lines.append(f"{part:<24}{counts.total:>16,}{counts.trained:>16,}{counts.adapters:>14,}")
    if memory.kept:
        lines.append("weights of other data-parallel ranks: frozen ones kept, trained ones from forward to backward")
    modes = model.model.language_model.recompute
    chosen = ", ".join(f"{mode} in {modes.count(mode)}" for mode in dict.fromkeys(modes))
    lines.append(
        f"memory a rank, estimated: {memory.total / GIB:.2f} GiB = weights {memory.weights / GIB:.2f} + gradients and optimizer "
        f"{memory.states / GIB:.2f} + activations {memory.activations / GIB:.2f} + a step's own {memory.other / GIB:.2f}"
        + (f" + other ranks' weights {memory.kept / GIB:.2f}" if memory.kept else "")
    )
    if model.config.vision is not None and model.model.vision_tower.recompute == "all":
        chosen += ", all of the vision tower's"
    lines.append(f"recompute: {chosen} of {len(modes)} layers")
    if steps_per_epoch is None:
        lines.append(f"{config.train.train_iters} steps of a stream")
    else:
        epochs = config.train.train_iters / max(steps_per_epoch, 1)
        lines.append(f"{steps_per_epoch} steps an epoch, {config.train.train_iters} steps = {epochs:.2f} epochs")
    lines.append("loss: summed over supervised tokens, divided by their number in the whole global batch")
    return "\n".join(lines)
