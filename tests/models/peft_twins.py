"""Native models with adapters beside transformers' model in PEFT."""

import copy

import torch
from native import twins
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from m3kernels.models.ministral3 import AdapterConfig, Ministral3, adapter_parameters, add_adapters, targets_of
from m3kernels.models.ministral3.weights import runtime_name
from m3kernels.peft import target_modules

PARTS = {"text": {}, "vlm": {"vision": True, "projector": True}}


def disturb(model: Ministral3, seed: int = 3) -> None:
    """B and the magnitudes away from where they start, where the adapters do nothing; of a whole model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            noise = torch.randn(p.shape, generator=generator).to(p) * 0.1
            p.mul_(1 + noise) if name.endswith("magnitude") else p.add_(noise)


def adapted(
    kind: str = "text", dtype=torch.float64, *, text: dict | None = None, **options
) -> tuple[nn.Module, Ministral3]:
    """(transformers' model, ours with adapters on everything that its kind has), the same weights."""
    changes = (text or {}) if kind == "text" else {"text": text or {}}
    hf, model = twins(kind, dtype=dtype, **changes)
    config = AdapterConfig(**{"rank": 4, "alpha": 6.0, "dtype": None, **options})
    add_adapters(model, config, targets_of(model, **PARTS[kind]))
    disturb(model)
    return hf, model


def in_peft(hf: nn.Module, folder, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(hf), folder, is_trainable=trainable)


def fresh_peft(hf: nn.Module, kind: str, **changes) -> PeftModel:
    """PEFT's own adapters, drawn wide."""
    torch.manual_seed(4)
    options = {"r": 4, "lora_alpha": 6, "target_modules": target_modules(hf, **PARTS[kind]), "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(hf), LoraConfig(**{**options, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


def our_name(name: str) -> str:
    """Ours for a parameter's name in PEFT's model."""
    name = runtime_name(name.removeprefix("base_model.model.")).replace(".base_layer", "")
    name = name.replace(".modules_to_save.default", "")
    for theirs, ours in (("lora_A", "lora_A"), ("lora_B", "lora_B"), ("lora_magnitude_vector", "lora_magnitude")):
        name = name.replace(f".{theirs}.default.weight", f".{ours}")
    return name


def steps(model: nn.Module, batches: list[dict]) -> dict[str, Tensor]:
    """Loss and gradients of each step of AdamW, and what was trained at the end, by our names."""
    trained = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-3)
    seen = {}
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        seen |= {f"loss {step}": loss.detach()}
        seen |= {f"grad {step} {name}": p.grad.clone() for name, p in trained.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return seen | {name: p.detach().clone() for name, p in trained.items()}
