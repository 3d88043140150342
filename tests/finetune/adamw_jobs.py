"""What the ranks do in test_fused_adamw.py."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from m3kernels.models.finetune.adamw import FusedAdamW, gradient_norm
from m3kernels.parallel import make_mesh

# over ("dp", "tp"): sizes that the ranks do not share evenly, one that some have nothing of, and whole ones
PLACEMENTS = (
    ((9, 6), (Shard(0), Shard(1))),
    ((7, 5), (Shard(0), Replicate())),
    ((1, 3), (Shard(0), Shard(0))),
    ((5, 4), (Replicate(), Shard(1))),
    ((6,), (Replicate(), Replicate())),
)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def whole(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in PLACEMENTS]


def split(mesh, tensors):
    """Each on a mesh object of its own, as FSDP2's units have them."""
    meshes = [copy.copy(mesh) for _ in tensors]
    return [distribute_tensor(t, m, at) for t, m, (_, at) in zip(tensors, meshes, PLACEMENTS)]


def norms(tp: int) -> tuple[float, float, float, float]:
    """(ours, torch's over DTensors, of the whole tensors, without summing over ranks)"""
    mesh, tensors = make_mesh(tp=tp, device_type="cpu"), whole(1)
    parameters = [nn.Parameter(torch.zeros_like(t)) for t in split(mesh, tensors)]
    for p, g in zip(parameters, split(mesh, tensors)):
        p.grad = g
    theirs = torch.nn.utils.get_total_norm([p.grad for p in parameters]).full_tensor()
    alone = torch.stack([p.grad.to_local().norm() for p in parameters]).norm()
    exact = torch.cat([t.flatten() for t in tensors]).norm()
    return float(gradient_norm(parameters)), float(theirs), float(exact), float(alone)


def steps(tp: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Whole parameters after three steps; the last one's gradient is a sum that is still to be made."""
    mesh = make_mesh(tp=tp, device_type="cpu")
    parameters = [nn.Parameter(t.to(dtype)) for t in split(mesh, whole(0))]
    optimizer = FusedAdamW(parameters, **OPTIONS)
    for step in range(1, 4):
        gradients = split(mesh, whole(step))
        share = whole(step)[-1] / dist.get_world_size()
        gradients[-1] = type(gradients[-1]).from_local(share, mesh, (Partial(), Partial()))
        for p, g in zip(parameters, gradients):
            p.grad = g.to(dtype)
        norm = gradient_norm(parameters)
        optimizer.step(factor=(0.5 / (norm + 1e-6)).clamp(max=1.0))
    return [p.detach().full_tensor() for p in parameters]
