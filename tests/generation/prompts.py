"""Prompts for the tests' models, and what Hugging Face generates after them, one at a time."""

import torch
from torch import nn

from m3kernels.models.generation.prompt import Prompt
from models import IMAGE_TOKEN, MERGED, VOCAB


def text_prompts(*lengths: int, seed: int = 1) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(tuple(torch.randint(11, VOCAB, (n,), generator=generator).tolist())) for n in lengths]


def image_prompt(*sizes: tuple[int, int], text: int = 4, seed: int = 1, images_of: Prompt | None = None) -> Prompt:
    """Images of (rows, columns) merged tokens, words before and after each; ``images_of`` lends its pixels."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(11, VOCAB, (n,), generator=generator).tolist()

    tokens = words(text)
    for height, width in sizes:
        tokens += [IMAGE_TOKEN] * (height * width) + words(3)
    if images_of is not None:
        return Prompt(tuple(tokens), images_of.images)
    return Prompt(
        tuple(tokens), tuple(torch.randn(3, h * MERGED, w * MERGED, generator=generator).numpy() for h, w in sizes)
    )


def by_transformers(hf: nn.Module, prompt: Prompt, new: int, **options) -> list[int]:
    """Greedy tokens after one prompt, by ``generate`` of the unpatched model."""
    device = next(hf.parameters()).device
    ids = torch.tensor([prompt.tokens], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        height, width = (max(image.shape[dim] for image in prompt.images) for dim in (1, 2))
        pixels = torch.zeros(len(prompt.images), 3, height, width)
        for at, image in zip(pixels, prompt.images):
            at[:, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
        sizes = torch.tensor([image.shape[1:] for image in prompt.images])
        inputs |= {"pixel_values": pixels.to(device), "image_sizes": sizes.to(device)}
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return hf.generate(**inputs, **options)[0, len(prompt.tokens) :].tolist()
