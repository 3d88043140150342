"""The mesh of processes: tensor parallel innermost (neighbouring ranks, one host), data parallel around it.

("dp", "tp")                     FSDP over dp
("dp_replicate", "dp", "tp")     HSDP: copies of such a mesh, one a ``dp_replicate`` index
"""

from math import gcd

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class ParallelError(ValueError):
    """A layout that does not fit the processes that were started; the message says what would."""


def make_mesh(tp: int = 1, dp: int | None = None, replicate: int = 1, device_type: str | None = None) -> DeviceMesh:
    """A mesh over all processes of the default group.

    Args:
        tp: ranks that share each layer.
        dp: ranks that share the parameters' storage and split the batch; None takes all that are left.
        replicate: copies of such a mesh, which split the batch as well (HSDP).
        device_type: "cuda" or "cpu"; None takes "cuda" where there is one.

    Returns:
        A DeviceMesh with the dimensions ("dp", "tp"), or ("dp_replicate", "dp", "tp") when ``replicate`` > 1; dimensions
        of size 1 are there as well.

    Raises:
        ParallelError: no process group, a size below 1, or a number of processes that is not replicate * dp * tp.
    """
    if not dist.is_initialized():
        raise ParallelError(
            "make_mesh: there is no process group; call torch.distributed.init_process_group() under torchrun first"
        )
    world = dist.get_world_size()
    sizes = {"replicate": replicate, "tp": tp} | ({} if dp is None else {"dp": dp})
    for name, size in sizes.items():
        if size < 1:
            raise ParallelError(f"make_mesh: {name} must be at least 1, got {size}")
    dp = max(world // (tp * replicate), 1) if dp is None else dp
    wanted = replicate * dp * tp
    if world != wanted:
        raise ParallelError(
            f"make_mesh: {world} processes do not make replicate {replicate} x dp {dp} x tp {tp} = {wanted}; "
            f"start with --nproc-per-node={wanted}{_tp_that_fits(world, tp, sizes.get('dp'), replicate)}"
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    shape, names = ((dp, tp), ("dp", "tp"))
    if replicate > 1:
        shape, names = (replicate, *shape), ("dp_replicate", *names)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    # DTensor then sums over the whole mesh (a gradient norm, say) at once, not dimension by dimension
    mesh._flatten("all")
    return mesh


def _tp_that_fits(world: int, tp: int, dp: int | None, replicate: int) -> str:
    """ ", or tp=N" where another tp alone repairs the layout, else nothing."""
    others = replicate * (dp or 1)
    if world % others:
        return ""
    left = world // others
    return f", or tp={left if dp is not None else gcd(left, tp)}"


def group_of(mesh: DeviceMesh | None, name: str) -> ProcessGroup | None:
    """The group of this process along dimension ``name``; None where there is no such dimension or it has one rank."""
    if mesh is None or name not in (mesh.mesh_dim_names or ()):
        return None
    if mesh.size(mesh.mesh_dim_names.index(name)) == 1:
        return None
    return mesh.get_group(name)
