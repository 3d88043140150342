"""Our own generation engine as a peer of the decode bench, on the parameters of the Hugging Face model beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

import m3kernels
from m3kernels.bench.train_peers import native_twin
from m3kernels.models.generation.batches import images_of
from m3kernels.models.generation.engine import EVERY, Generator
from m3kernels.models.generation.prefill import Plan, Prefill
from m3kernels.models.generation.prompt import Prompt, Sampling
from m3kernels.models.generation.state import State
from m3kernels.models.ministral3.quantized import quantize_
from m3kernels.models.ministral3.vision import grids_of

if TYPE_CHECKING:
    from m3kernels.bench.decode import Stopwatch


@dataclass(frozen=True)
class Engine:
    """How the engine is set up: see ``Generator``; ``fp8``: with a copy of the weights in E4M3, a scale a row."""

    fp8: bool = False
    kv_dtype: Literal["fp8"] | None = None

    def open(self, model: nn.Module) -> Generator:
        twin = native_twin(model)
        if self.fp8:
            quantize_(twin)
        m3kernels.patch(twin)
        return Generator(twin, kv_dtype=self.kv_dtype)


def prompts_of(ids: Tensor, pictures: dict[str, Tensor]) -> list[Prompt]:
    """Rows (batch, prompt), each with all images."""
    images = tuple(images_of(pictures.get("pixel_values"), pictures.get("image_sizes")))
    return [Prompt(tuple(row), images) for row in ids.tolist()]


@torch.no_grad()
def forced_logits(generator: Generator, prompts: Sequence[Prompt], forced: Tensor) -> Tensor:
    """(steps + 1, batch, vocab) fp32: after the prompt, and after each of the forced tokens (steps, batch)."""
    model = generator.model
    plans = [Plan.of(prompt, model.config, "a prompt") for prompt in prompts]
    room = len(plans[0].keys) + len(forced) + 1
    state = State(len(plans), room, generator.kv_dtype, generator.step, None, model.device)
    logits = [Prefill(model, generator.chunk)(plans, state.cache)]
    state.begin([len(plan.keys) for plan in plans], Sampling())
    for ids in forced:
        state.draw(logits[-1])
        state.ids.copy_(ids)
        logits.append(generator.step(state.ids, state.positions, state.filled, state.cache))
        state.cache.lengths = [length + 1 for length in state.cache.lengths]
    return torch.stack(logits)


def timed(
    generator: Generator, prompts: Sequence[Prompt], new_tokens: int, watch: "Stopwatch"
) -> tuple[float, list[float]]:
    """(milliseconds to the first token, of a token in each later burst), nothing of an earlier call's cache reused."""
    generator.forget()
    run = generator.start(prompts, Sampling(max_new_tokens=new_tokens), every=EVERY)
    watch.mark()
    sizes = []
    for burst in run:
        watch.mark()
        sizes.append(len(burst[0]))
    first, _, *rest = watch.intervals()
    # the first bursts wait for graphs that are recorded, and for each other
    return first, [ms / size for ms, size in list(zip(rest, sizes[1:]))[1:-1]]


@torch.no_grad()
def tower(model: nn.Module, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> Callable[[], Tensor]:
    """The images' features, a call each time."""
    twin = native_twin(model)
    m3kernels.patch(twin)
    grids = grids_of(pixels, sizes, twin.config.vision)

    def features() -> Tensor:
        with torch.no_grad():
            return twin.model.image_features(pixels, grids)

    return features
