"""Hugging Face's model over several GPUs on the weights of ``bench.parallel``: tp_plan="auto", and FSDP2 with Liger's parts."""

import warnings
from contextlib import ExitStack

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from m3kernels.bench.model_shapes import Size, text_config
from m3kernels.bench.train_peers import become, liger


def tensor_parallel(size: Size, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Sharded by transformers over all processes; its weights are drawn, and to be overwritten."""
    from transformers import Ministral3ForCausalLM

    with warnings.catch_warnings():
        # transformers 5.17 wants tp_plan in a DistributedConfig, which means the same
        warnings.simplefilter("ignore", FutureWarning)
        options = {"config": text_config(size), "state_dict": {}, "dtype": dtype, "attn_implementation": "sdpa"}
        return Ministral3ForCausalLM.from_pretrained(None, tp_plan="auto", **options)


def whole(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """On one GPU; its weights are drawn, and to be overwritten."""
    from transformers import Ministral3ForCausalLM

    with torch.device(device):
        return Ministral3ForCausalLM._from_config(text_config(size), dtype=dtype, attn_implementation="sdpa")


def with_liger(model: nn.Module, mesh: DeviceMesh | None, stack: ExitStack) -> nn.Module:
    """Liger's parts in the model until ``stack`` ends, and FSDP2 by layers over ``mesh``, with transformers' mean loss."""
    stack.enter_context(become(model, (liger,)))
    if mesh is not None:
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    return model
