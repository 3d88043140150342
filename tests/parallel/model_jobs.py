"""What the ranks of tests/parallel/test_model.py run."""

import copy
import dataclasses
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from native import twins
from torch import Tensor, nn

import m3kernels
from m3kernels.models.ministral3 import Ministral3, layers
from m3kernels.models.ministral3.parallel import parallelize
from m3kernels.models.ministral3.recompute import RUN, set_recompute
from m3kernels.parallel import collectives, make_mesh
from models import distance, float64_islands, text_batch, vlm_batch

# eight query heads over four of keys, so that four ranks can share them; a vocabulary of four parts
TEXT = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 152}
# more than one image, none, one and one: what falls to a rank may have no image at all
IMAGES = ([(2, 3), (1, 2)], [], [(2, 2)], [(3, 1)])


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def twin(kind: str, tied: bool = False, dtype=torch.float64, device: str = "cpu", **text) -> Ministral3:
    options = {**TEXT, "tie_word_embeddings": tied, **text}
    if kind == "vlm":
        options = {"text": options, "tie_word_embeddings": tied}
    return twins(kind, dtype=dtype, device=device, **options)[1].train()


def batches(model: Ministral3, kind: str, count: int, rank: int = 0, ranks: int = 1) -> list[dict]:
    """``count`` batches of four rows, of which ``rank`` gets its share, with the images that are in it."""
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    made = []
    for seed in range(count):
        if kind == "text":
            batch = text_batch(model, batch=4, padding="right", seed=seed)
            made.append({key: value[mine] for key, value in batch.items()})
            continue
        batch = vlm_batch(model, IMAGES, seed=seed)
        pixels = {key: batch.pop(key) for key in ("pixel_values", "image_sizes")}
        first = sum(map(len, IMAGES[: mine.start]))
        images = slice(first, first + sum(map(len, IMAGES[mine])))
        made.append({key: value[mine] for key, value in batch.items()})
        if images.stop > images.start:
            made[-1] |= {key: value[images] for key, value in pixels.items()}
    return made


def steps(model: nn.Module, data: list[dict], clip: float = 0.5) -> dict[str, Tensor]:
    """Loss, gradient norm and gradients of each step of AdamW, and the parameters at the end."""
    # eps as large as gradients: without it the first step is their sign, and an error of 1e-16 in one near zero shows
    # foreach is what CUDA takes by default
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, foreach=True)
    seen = {}
    for step, batch in enumerate(data):
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        seen |= {f"loss {step}": loss.detach(), f"norm {step}": whole(norm)}
        if step == 0:
            seen |= {f"grad {n}": whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return seen | {name: whole(p).detach() for name, p in model.named_parameters()}


def train(
    kind: str,
    tied: bool,
    tp: int,
    dp: int,
    replicate: int = 1,
    freeze: str = "",
    patched: bool = False,
    dtype=torch.float64,
    count: int = 4,
    wrong: bool = False,
    device: str = "cpu",
) -> tuple[dict, dict]:
    """(what one process sees, what this rank of many sees)."""
    with float64_islands() if dtype == torch.float64 else nullcontext():
        one = twin(kind, tied, dtype, device)
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(not freeze or freeze not in name)
        many = copy.deepcopy(one)
        if patched:
            m3kernels.patch(many)
        mesh = make_mesh(tp, dp, replicate, device_type=device)
        parallelize(many, mesh)
        ranks = dp * replicate
        share = batches(one, kind, count, dist.get_rank() // tp, ranks)
        with mock.patch.object(layers, "local", part_alone) if wrong else nullcontext():
            seen = steps(many, share)
        pair = steps(one, batches(one, kind, count)), seen
        return tuple({name: x.cpu() for name, x in found.items()} for found in pair)


def recomputed(tp: int, dp: int, patched: bool) -> dict[str, dict]:
    """Loss and gradients of one step, by recompute mode."""
    plain, found = twin("vlm"), {}
    mesh = make_mesh(tp, dp, device_type="cpu")
    (batch,) = batches(plain, "vlm", 1, dist.get_rank() // tp, dp)
    for mode in RUN:
        model = copy.deepcopy(plain)
        if patched:
            m3kernels.patch(model)
        parallelize(model, mesh)
        set_recompute(model, mode)
        loss = model(**batch).loss
        loss.backward()
        grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        found[mode] = {"loss": loss.detach(), **grads}
    return found


def reductions() -> list[int]:
    """How many all-reduces the backward of a language model has at tp 2: as it is, and where each parameter has its own."""
    model = parallelize(twin("text"), make_mesh(2, device_type="cpu"))
    (batch,), counts = batches(model, "text", 1), []
    for together in (model.layout.summed_together, lambda _: nullcontext()):
        with mock.patch.object(type(model.layout), "summed_together", lambda _, text, of=together: of(text)):
            loss = model(**batch).loss
        with mock.patch.object(collectives.dist, "all_reduce", wraps=dist.all_reduce) as seen:
            loss.backward()
        counts.append(seen.call_count)
    return counts


def part_alone(parameter: Tensor) -> Tensor:
    """The gradient of each rank's tokens is taken for the whole."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def load_sharded(folder: str, tp: int, dp: int) -> tuple[dict, int, int]:
    """(logits and losses of a model read into shards, elements on this rank, elements of the whole)."""
    mesh = make_mesh(tp, dp, device_type="cpu")
    model = Ministral3.from_pretrained(folder, dtype=torch.float64, mesh=mesh)
    here = sum(p.to_local().numel() for p in model.parameters())
    state = {name: whole(p).detach() for name, p in model.named_parameters()}
    batch = text_batch(model)
    with torch.no_grad():
        state["logits"] = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return state, here, sum(p.numel() for p in model.parameters())


def save_dcp(folder: str, checkpoint: str, tp: int, dp: int) -> None:
    model = Ministral3.from_pretrained(folder, dtype=torch.float64, mesh=make_mesh(tp, dp, device_type="cpu"))
    dcp.save(model.state_dict(), checkpoint_id=checkpoint)


def load_dcp(folder: str, checkpoint: str, tp: int, dp: int) -> dict:
    """Parameters after reading what another layout saved over zeros."""
    model = Ministral3.from_pretrained(folder, dtype=torch.float64, mesh=make_mesh(tp, dp, device_type="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state)
    return {name: whole(p).detach() for name, p in model.named_parameters()}


def cached(tp: int) -> tuple[Tensor, Tensor]:
    """(logits at once, logits of a prompt and of what follows token by token) on a tensor-parallel model."""
    one = twin("text").eval()
    many = parallelize(copy.deepcopy(one), make_mesh(tp, 1, device_type="cpu"))
    ids = text_batch(one, batch=3)["input_ids"]
    with torch.no_grad():
        out = many(ids[:, :15], use_cache=True)
        parts = [out.logits]
        for i in range(15, 21):
            parts.append(many(ids[:, i : i + 1], cache=out.cache).logits)
        return one(ids).logits, torch.cat(parts, dim=1)


def errors(tp: int, text: dict) -> str:
    """The message with which a layout is refused."""
    config = twin("text").config
    with torch.device("meta"):
        model = Ministral3(dataclasses.replace(config, text=dataclasses.replace(config.text, **text)))
    try:
        parallelize(model, make_mesh(tp, 1, device_type="cpu"))
    except ValueError as error:
        return str(error)
    return ""


def on_a_gpu(tp: int) -> dict[str, tuple[float, float]]:
    """Distances from fp64 of (one process, many) in bf16 with kernels, on CUDA tensors over gloo: loss and gradients."""
    torch.cuda.set_device(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "num_hidden_layers": 3}
    text = {**TEXT, **sizes, "tie_word_embeddings": False}
    truth = twins("vlm", device="cuda", dtype=torch.float64, text=text, tie_word_embeddings=False)[1].train()
    one = copy.deepcopy(truth).bfloat16()
    many = copy.deepcopy(one)
    for model in (one, many):
        m3kernels.patch(model)
    parallelize(many, make_mesh(tp, 1, device_type="cuda"))
    seen = []
    for model in (truth, one, many):
        loss = model(**batches(model, "vlm", 1)[0]).loss
        loss.backward()
        seen.append({"loss": loss.detach()} | {n: gathered(p.grad).cpu() for n, p in model.named_parameters()})
    exact, alone, split = seen
    return {name: (distance(alone[name], exact[name]), distance(split[name], exact[name])) for name in exact}


def gathered(grad: Tensor) -> Tensor:
    """A gradient of all ranks on the host: DTensor's own collectives do not run over gloo on CUDA tensors."""
    if not hasattr(grad, "to_local"):
        return grad
    (placement,), local = grad.placements, grad.to_local().cpu()
    if placement.is_shard():
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts, dim=placement.dim)
    return local
