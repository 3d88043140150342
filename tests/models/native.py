"""Native models beside their Hugging Face twins."""

import copy

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3 import Config, Ministral3
from m3kernels.models.ministral3.loading import to_empty
from m3kernels.models.ministral3.weights import runtime_name
from models import build


def like(hf: nn.Module) -> Ministral3:
    """A native model with the weights of a Hugging Face one, which stays as it is."""
    state = {runtime_name(name): tensor.detach().clone() for name, tensor in hf.state_dict().items()}
    parameter = next(hf.parameters())
    with torch.device("meta"):
        model = Ministral3(Config.from_hf(copy.deepcopy(hf.config)))
    to_empty(model.to(parameter.dtype), parameter.device)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tied
    missing, extra = model.load_state_dict(state, strict=True)
    assert not missing and not extra
    return model.train(hf.training)


def twins(kind: str = "text", **options) -> tuple[nn.Module, Ministral3]:
    """(Hugging Face's, ours): the same weights."""
    hf = build(kind, **options)
    return hf, like(hf)


def kept(batch: dict) -> Tensor:
    """(batch, seq) bool: what is no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def seen(model: nn.Module, batch: dict, **options) -> dict[str, Tensor]:
    """Logits where there is no padding."""
    with torch.no_grad():
        return {"logits": model(**{k: v for k, v in batch.items() if k != "labels"}, **options).logits[kept(batch)]}


def trained(model: nn.Module, batch: dict, **options) -> dict[str, Tensor]:
    """Loss and every gradient, by runtime name."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    grads = {runtime_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **grads}
