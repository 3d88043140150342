"""Sharding a model over a mesh: tensor parallelism by the table, FSDP2 over the batch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from m3kernels.models.ministral3 import sharding
from m3kernels.models.ministral3.adapted import adapted_layers
from m3kernels.models.ministral3.merging import MAGNITUDE
from m3kernels.models.ministral3.model import Ministral3
from m3kernels.models.ministral3.shards import part_of
from m3kernels.parallel import ParallelError, group_of, summed_together


@dataclass(frozen=True)
class Layout:
    """Where a model runs.

    Attributes:
        mesh: dimensions "tp", "dp", and "dp_replicate" where whole groups of shards are repeated.
        shards_vision: whether FSDP2 has parts of the vision tower, so that every rank must run it in every forward.
        dtype: what FSDP2 gathers weights in; None for their own.
    """

    mesh: DeviceMesh
    shards_vision: bool
    dtype: torch.dtype | None = None

    @cached_property
    def tp_group(self) -> ProcessGroup | None:
        """Ranks that share each layer, None for one."""
        return group_of(self.mesh, "tp")

    @cached_property
    def batch_group(self) -> ProcessGroup | None:
        """Ranks that see different batches, None for one."""
        if "dp_replicate" in self.mesh.mesh_dim_names:
            return self.mesh["dp_replicate", "dp"]._flatten("batch").get_group()
        return group_of(self.mesh, "dp")

    def without_images(self, model: Ministral3, x_tD: Tensor) -> Tensor:
        """``x_tD``, after running the tower on a blank image where other ranks wait for this one's part of its weights."""
        if not self.shards_vision:
            return x_tD
        vision = model.config.vision
        side = vision.spatial_merge_size
        blank = x_tD.new_zeros(1, vision.num_channels, side * vision.patch_size, side * vision.patch_size)
        return x_tD + 0 * model.model.image_features(blank, ((side, side),)).sum().to(x_tD.dtype)

    def summed_together(self, text: nn.Module) -> AbstractContextManager:
        """For a forward of ``text``: gradients of what tensor-parallel ranks hold whole are summed together, at the end.

        Not where the batch is split: FSDP2 wants each layer's when that layer's backward is over.
        """
        alone = self.tp_group is not None and self.batch_group is None
        if not (alone and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return nullcontext()
        whole = (p for p in text.parameters() if isinstance(p, DTensor) and p.placements[0].is_replicate())
        return summed_together(whole, self.tp_group)

    def __deepcopy__(self, memo) -> "Layout":
        return self


def parallelize(
    model: Ministral3,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    shard_frozen: bool = True,
) -> Ministral3:
    """Shards a model in place, on the meta device or with weights that are the same on every rank.

    Freeze and ``m3kernels.patch`` before. Gradients are summed over ranks, not averaged: the model divides its loss by
    the supervised tokens of all of them.

    Args:
        mesh: from :func:`m3kernels.parallel.make_mesh`: ("dp", "tp"), or ("dp_replicate", "dp", "tp").
        param_dtype: what FSDP2 gathers weights in; their own by default.
        reduce_dtype: what FSDP2 sums gradients in; ``param_dtype`` by default.
        reshard_after_forward: whether layers let go of gathered weights between forward and backward.
        shard_frozen: whether FSDP2 shards frozen weights of the language model, too: without, every data-parallel rank has
            its tensor-parallel part of them whole, and nothing is sent.

    Returns:
        The model. Parameters are DTensors over the whole mesh; frozen vision towers stay whole on every rank.

    Raises:
        ParallelError: a mesh without these dimensions, a size that tp does not divide, or a model sharded already.
    """
    names = mesh.mesh_dim_names or ()
    if names not in (("dp", "tp"), ("dp_replicate", "dp", "tp")):
        raise ParallelError(f"the mesh has dimensions {names}; allowed: those of m3kernels.parallel.make_mesh")
    if model.layout is not None:
        raise ParallelError("the model is sharded already: make a new one")
    sharding.check(model.config, mesh["tp"].size())
    batch = mesh["dp"] if "dp_replicate" not in names else mesh["dp_replicate", "dp"]

    if mesh["tp"].size() > 1:
        split_parameters(model, mesh["tp"])
    shards_vision = False
    if batch.size() > 1:
        shards_vision = model.config.vision is not None and any(p.requires_grad for p in vision_parameters(model))
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        # on the mesh that FSDP2's own parameters have: torch's gradient norm takes no two
        kept = keep_magnitudes(model, mesh if mesh["tp"].size() > 1 else batch)
        if not shard_frozen:
            kept |= {p for p in model.parameters() if not p.requires_grad}
        options = {"mp_policy": policy, "reshard_after_forward": reshard_after_forward}
        _fully_shard(model, batch, shards_vision, kept, **options)
    model.layout = Layout(mesh, shards_vision, param_dtype if batch.size() > 1 else None)
    return model


def vision_parameters(model: Ministral3) -> list[nn.Parameter]:
    """Of the tower and the projector."""
    if model.config.vision is None:
        return []
    return [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]


def split_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every parameter as a DTensor on the tensor-parallel mesh, where the table says; nothing is sent."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        dim = sharding.row_of(name).dim
        placement = Replicate() if dim is None else Shard(dim)
        split = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        if dim is not None and not split.is_meta:
            # a part by itself lets go of the whole
            split._local_tensor = split._local_tensor.clone()
        made[id(parameter)] = nn.Parameter(split, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]


def keep_magnitudes(model: Ministral3, mesh: DeviceMesh) -> set[nn.Parameter]:
    """DoRA's magnitudes as DTensors that every data-parallel rank holds in their own dtype; returns them.

    They are near their norms: gathered in bf16, all but large changes of them would be lost.
    """
    kept = set()
    for name, layer in adapted_layers(model).items():
        if layer.lora_magnitude is None:
            continue
        part, trained = part_of(layer.lora_magnitude.detach()), layer.lora_magnitude.requires_grad
        dim = sharding.row_of(f"{name}.{MAGNITUDE}").dim
        split = {} if dim is None else {"tp": Shard(dim)}
        placements = [split.get(over, Replicate()) for over in mesh.mesh_dim_names]
        whole = DTensor.from_local(part, mesh, placements, run_check=False)
        layer.lora_magnitude = nn.Parameter(whole, requires_grad=trained)
        kept.add(layer.lora_magnitude)
    return kept


def _fully_shard(model: Ministral3, mesh: DeviceMesh, shards_vision: bool, kept: set[nn.Parameter], **options) -> None:
    """A unit for each layer, and one for what is left: embedding, head, last norm, projector; ``kept`` is in none."""
    layers = list(model.model.language_model.layers)
    whole = set(kept)
    if shards_vision:
        layers = [*model.model.vision_tower.transformer.layers, *layers]
    else:
        whole |= set(vision_parameters(model))
    layers = [layer for layer in layers if not kept.issuperset(layer.parameters())]
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options, ignored_params=kept)
    fully_shard(model, mesh=mesh, **options, ignored_params=whole)
    # in the order of the forward: a gather is under way before the host comes to the layer that waits for it
    for module, following in pairwise((model, *layers)):
        module.set_modules_to_forward_prefetch([following])
    for module in (*layers, model):
        # gloo has no reduction that divides
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
