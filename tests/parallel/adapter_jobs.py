"""What the ranks of tests/parallel/test_adapters_sharded.py run."""

import copy
from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from model_jobs import batches, part_alone, steps, twin, whole
from peft_twins import PARTS, disturb
from torch import Tensor

import m3kernels
from m3kernels.models.ministral3 import (
    AdapterConfig,
    Ministral3,
    adapted,
    adapter_of,
    adapter_parameters,
    add_adapters,
    load_adapter,
    merge_adapters,
    parallelize,
    reset_adapters,
    save_adapter,
    set_recompute,
    targets_of,
)
from m3kernels.parallel import make_mesh
from m3kernels.patching import adapters as fused
from models import float64_islands, text_batch

# what is left out, by the name that the module uses for it
WRONG = {
    "norms not summed": ("all_reduce_sum", lambda x, group: x),
    "gradients not summed": ("local", part_alone),
}


def model_of(kind: str, dora: bool, dtype=torch.float64, *, train: str = "", dropout: float = 0.0) -> Ministral3:
    """With adapters on everything that its kind has; but for ``train``, a module that is trained whole instead."""
    model = twin(kind, dtype=dtype)
    parts = {} if train else PARTS[kind]
    config = AdapterConfig(rank=4, alpha=6, dora=dora, dropout=dropout, dtype=None)
    add_adapters(model, config, targets_of(model, **parts))
    if train:
        model.get_submodule(train).requires_grad_(True)
    disturb(model)
    return model


def train(
    kind: str, dora: bool, tp: int, dp: int, replicate: int = 1, wrong: str = "", module: str = "", count: int = 4
) -> tuple[dict, dict]:
    """(what one process sees, what this rank of many sees) in ``count`` steps of AdamW."""
    with float64_islands(), ExitStack() as stack:
        one = model_of(kind, dora, train=module)
        many = parallelize(copy.deepcopy(one), make_mesh(tp, dp, replicate, device_type="cpu"))
        ranks = dp * replicate
        want = steps(one, batches(one, kind, count))
        if wrong:
            stack.enter_context(mock.patch.object(adapted, *WRONG[wrong]))
        return want, steps(many, batches(one, kind, count, dist.get_rank() // tp, ranks))


def with_dropout(dora: bool, tp: int, mode: str) -> tuple[dict, dict]:
    """(one process, many) from the same seed, with masks drawn in training and under recompute."""
    # a backward that recomputes is outside of float64_islands
    with float64_islands() if mode == "none" else nullcontext():
        one = model_of("text", dora, dropout=0.4)
        many = parallelize(copy.deepcopy(one), make_mesh(tp, 1, device_type="cpu"))
        set_recompute(many, mode)
        found = []
        for model in (one, many):
            torch.manual_seed(3)
            # all rows full: padding to a multiple of the ranks would draw for more tokens
            found.append(steps(model, [text_batch(one, batch=4)]))
        return tuple(found)


def with_kernels(dora: bool, tp: int, dp: int) -> tuple[dict, dict, list[int]]:
    """(plain, patched, layers taken by each call of the op) at one layout in fp32."""
    plain = model_of("vlm", dora, torch.float32)
    ours = copy.deepcopy(plain)
    m3kernels.patch(ours)
    mesh = make_mesh(tp, dp, device_type="cpu")
    taken, real, found = [], fused.lora_linears, []

    def counting(x, layers, **options):
        taken.append(len(layers))
        return real(x, layers, **options)

    run = mock.patch.multiple(fused, lora_linears=counting, _kernels_run=lambda x: True)
    for model in (plain, ours):
        share = batches(plain, "vlm", 1, dist.get_rank() // tp, dp)
        with run if model is ours else nullcontext():
            found.append(steps(parallelize(model, mesh), share))
    return *found, taken


def masks(tp: int) -> tuple[Tensor, Tensor]:
    """What two calls of the op drop of ones in a column layer's input and in this rank's part of a row layer's."""
    torch.manual_seed(5)
    found = []
    mesh = make_mesh(tp, 1, device_type="cpu")
    model = parallelize(model_of("text", False, torch.float32, dropout=0.5), mesh).train()
    layer = model.model.language_model.layers[0].self_attn
    for projection in (layer.q_proj, layer.o_proj):
        width = projection.in_features // (tp if projection is layer.o_proj else 1)
        found.append(projection.dropped(torch.ones(64, width)))
    return tuple(found)


def save(kind: str, dora: bool, tp: int, dp: int, folder: str, module: str = "") -> None:
    model = parallelize(model_of(kind, dora, train=module), make_mesh(tp, dp, device_type="cpu"))
    save_adapter(model, f"{folder}/adapter", base_name_or_path=None)
    # saving takes merged weights from the layers as they are
    with torch.no_grad():
        model(**batches(model, kind, 1, dist.get_rank() // tp, dp)[0])
    model.save_pretrained(f"{folder}/merged")
    merge_adapters(model)
    assert not adapter_parameters(model)
    model.save_pretrained(f"{folder}/in-place")


def load(kind: str, tp: int, dp: int, folder: str) -> dict[str, Tensor]:
    """Parameters of a model that took its adapters from a folder."""
    model = twin(kind)
    add_adapters(model, *adapter_of(folder))
    parallelize(model, make_mesh(tp, dp, device_type="cpu"))
    load_adapter(model, folder)
    return {name: whole(p).detach() for name, p in model.named_parameters()}


def fresh(folder: str, tp: int, dp: int, dora: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adapters beside a checkpoint that was read into shards, and after another seed."""

    def add(model: Ministral3) -> None:
        add_adapters(model, AdapterConfig(rank=4, dora=dora), targets_of(model, **PARTS["vlm"]))

    model = Ministral3.from_pretrained(folder, mesh=make_mesh(tp, dp, device_type="cpu"), prepare=add)
    first = {name: whole(p).detach().clone() for name, p in adapter_parameters(model).items()}
    reset_adapters(model, 7)
    return first, {name: whole(p).detach() for name, p in adapter_parameters(model).items()}


def in_bf16(tp: int, dp: int) -> tuple[dict, dict]:
    """(fp32 gradients of one process, those of many with bf16 weights and fp32 adapters)."""
    one = twin("text", dtype=torch.float32)
    config = AdapterConfig(rank=4, alpha=6, dora=True)
    add_adapters(one, config, targets_of(one))
    disturb(one)
    many = copy.deepcopy(one)
    for name, parameter in many.named_parameters():
        if name not in adapter_parameters(many):
            parameter.data = parameter.data.bfloat16()
    parallelize(many, make_mesh(tp, dp, device_type="cpu"), reduce_dtype=torch.float32)
    found = []
    for model, share in (
        (one, batches(one, "text", 1)),
        (many, batches(one, "text", 1, dist.get_rank() // tp, dp)),
    ):
        loss = model(**share[0]).loss
        loss.backward()
        grads = {name: whole(p.grad) for name, p in adapter_parameters(model).items()}
        found.append({"loss": loss.detach(), **grads})
    return tuple(found)
