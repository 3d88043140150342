"""What the ranks of test_tensor_parallel.py run."""

import copy

import torch
from model_jobs import twin
from prompts import image_prompt, text_prompts

from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.prompt import GenerationError, Sampling
from m3kernels.models.ministral3 import AdapterConfig, add_adapters, parallelize, targets_of
from m3kernels.parallel import make_mesh


def generated(kind: str, tp: int, tied: bool, adapted: bool) -> dict[str, list]:
    """Tokens by one process, and by this rank of many."""
    one = twin(kind, tied, torch.float32).eval()
    if adapted:
        add_adapters(one, AdapterConfig(rank=4, dtype=None), targets_of(one))
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    many = parallelize(copy.deepcopy(one), make_mesh(tp, 1, device_type="cpu"))
    prompts = text_prompts(5, 17, 30)
    if kind == "vlm":
        prompts += [image_prompt((2, 3), (1, 2)), image_prompt((2, 2))]
    found = {}
    for name, model in (("one", one), ("many", many)):
        generator = Generator(model, chunk=13)
        found[name] = [g.tokens for g in generator.generate(prompts, Sampling(max_new_tokens=10))]
        found[f"{name} sampled"] = [
            g.tokens
            for g in generator.generate(prompts, Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=3))
        ]
        found[f"{name} fused"] = generator.fused
    return found


def refusal() -> str:
    model = parallelize(twin("text", dtype=torch.float32).eval(), make_mesh(1, 2, device_type="cpu"))
    try:
        Generator(model)
    except GenerationError as error:
        return str(error)
    return ""
