"""What the ranks of tests/parallel/test_fsdp.py run."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
from adapter_jobs import model_of
from model_jobs import batches, steps, twin
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from m3kernels.models.ministral3 import Ministral3, parallelize
from m3kernels.models.ministral3.merging import is_adapter
from m3kernels.parallel import local, make_mesh
from models import float64_islands

Seen = dict[str, Tensor]


def _trained(one: Ministral3, tp: int, dp: int, **options) -> tuple[Seen, Seen, Ministral3]:
    many = parallelize(copy.deepcopy(one), make_mesh(tp, dp, device_type="cpu"), **options)
    kind, rank = "vlm", dist.get_rank() // tp
    return steps(one, batches(one, kind, 3)), steps(many, batches(one, kind, 3, rank, dp)), many


def frozen_whole(dora: bool, tp: int, dp: int) -> tuple[Seen, Seen, list[str]]:
    """(one process, this rank, names of what FSDP2 has of the language model's layers)."""
    with float64_islands():
        one = model_of("vlm", dora)
        want, seen, many = _trained(one, tp, dp, shard_frozen=False)
    layers = many.model.language_model.layers.named_parameters()
    over_batch = [name for name, p in layers if hasattr(p, "device_mesh") and p.device_mesh.size() == tp * dp]
    assert all(is_adapter(name) == p.requires_grad for name, p in many.named_parameters())
    return want, seen, over_batch


def gathered_once(dp: int, reshard: bool) -> tuple[Seen, Seen, int, int]:
    """(one process, this rank, gathers in three steps, FSDP2's units)."""
    original, calls = param_group.foreach_all_gather, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with float64_islands(), mock.patch.object(param_group, "foreach_all_gather", counted):
        want, seen, many = _trained(twin("vlm"), 1, dp, reshard_after_forward=reshard)
    units = sum(hasattr(module, "set_modules_to_forward_prefetch") for module in many.modules())
    return want, seen, len(calls), units


def order_of_a_forward(dp: int) -> list[str]:
    """Which layers are gathered, and which are run, as it happens: "gather 0", "run 0", ..., vision layers with a v."""
    model = parallelize(twin("vlm"), make_mesh(1, dp, device_type="cpu"))
    (batch,) = batches(model, "vlm", 1, dist.get_rank(), dp)
    original, told = param_group.foreach_all_gather, []
    layers = [(f"v{i}", layer) for i, layer in enumerate(model.model.vision_tower.transformer.layers)]
    layers += [(f"{i}", layer) for i, layer in enumerate(model.model.language_model.layers)]
    owners = {id(module): name for name, layer in layers for module in layer.modules()}
    for name, layer in layers:
        # after FSDP2's own hook, which is the layer's
        first = next(child for child in layer.modules() if next(child.children(), None) is None)
        first.register_forward_pre_hook(lambda *_, name=name: told.append(f"run {name}"))

    def gathered(fsdp_params, *args, **kwargs):
        told.append(f"gather {owners.get(id(fsdp_params[0]._module_info.module), 'the rest')}")
        return original(fsdp_params, *args, **kwargs)

    with mock.patch.object(param_group, "foreach_all_gather", gathered):
        model(**batch)
    return told


def gradients_of_local(tp: int) -> dict[str, object]:
    """What ``local`` makes of a split and of a whole parameter in two backwards, and of a frozen one."""
    mesh, rows = make_mesh(tp, 1, device_type="cpu")["tp"], torch.arange(24.0, dtype=torch.float64).view(4, 6)
    found = {}
    for name, placement in (("split", Shard(0)), ("whole", Replicate())):
        parameter = nn.Parameter(distribute_tensor(rows, mesh, [placement], src_data_rank=None))
        for scale in (1.0, 2.0):
            part = local(parameter)
            # a gradient whose memory is transposed
            (part.t() * scale * (1 + dist.get_rank()) * part.detach().t()).sum().backward()
        grad = parameter.grad
        found[name] = (type(part), part._version, grad.placements == parameter.placements, grad.full_tensor())
        found[f"{name} is contiguous"] = grad.to_local().is_contiguous()
    parameter = nn.Parameter(distribute_tensor(rows, mesh, [Shard(0)], src_data_rank=None))
    (first,) = torch.autograd.grad(local(parameter).square().sum(), parameter, create_graph=True)
    try:
        first.to_local().sum().backward()
        found["twice"] = ""
    except RuntimeError as error:
        found["twice"] = str(error)
    found["frozen"] = local(parameter.detach()).requires_grad
    return found
