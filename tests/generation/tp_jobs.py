"""What the ranks of test_tensor_parallel.py run."""

import copy

import torch
from model_jobs import twin
from prompts import image_prompt, text_prompts

from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.prompt import GenerationError, Sampling
from m3kernels.models.ministral3 import (
    AdapterConfig,
    Config,
    Ministral3,
    QuantizationError,
    add_adapters,
    parallelize,
    sharding,
    targets_of,
)
from m3kernels.models.ministral3.quantized import prepare_quantized, quantized_layers
from m3kernels.models.ministral3.shards import part_of
from m3kernels.models.ministral3.weights import Checkpoint
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


def quantised(folder: str, quantize: str) -> dict[str, object]:
    """Tokens by one process, and by this rank of many, of a checkpoint with FP8 weights."""
    found = {}
    load = {"dtype": torch.float32, "quantize": quantize}
    one = Ministral3.from_pretrained(folder, **load)
    mesh = make_mesh(2, 1, device_type="cpu")
    many = Ministral3.from_pretrained(folder, **load, mesh=mesh, pad_vocab_to=2)
    for name, model in (("one", one), ("many", many)):
        generated = Generator(model, chunk=13).generate(text_prompts(5, 17), Sampling(max_new_tokens=10))
        found[name] = [g.tokens for g in generated]
    rank, scales_equal, halves = mesh["tp"].get_local_rank(), True, True
    whole = quantized_layers(one)
    for name, layer in quantized_layers(many).items():
        dim = sharding.row_of(f"{name}.weight").dim
        halves &= part_of(layer.weight).shape[dim] == whole[name].weight.shape[dim] // 2
        expected = whole[name].weight_scale
        if expected.dim() == 2 or (expected.dim() == 1 and dim == 0):
            expected = expected.chunk(2, dim)[rank]
        scales_equal &= torch.equal(layer.weight_scale, expected)
    return found | {"scales equal": scales_equal, "halves": halves}


def quantised_refusals(folder: str) -> tuple[str, str]:
    said = []
    checkpoint = Checkpoint.open(folder)
    for mesh in ((1, 2), (2, 1)):
        with torch.device("meta"):
            model = Ministral3(Config.from_hf(checkpoint.config, tied=checkpoint.tied))
        try:
            prepare_quantized(model, checkpoint, "keep", make_mesh(*mesh, device_type="cpu"))
        except QuantizationError as error:
            said.append(str(error))
    return tuple(said)
