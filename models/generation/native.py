"""``Ministral3.generate`` and ``Ministral3.stream``: the generator that a native model keeps, and the options of a call."""

import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from m3kernels.models.generation.call import Call, Inputs
from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.kept import generator_of
from m3kernels.models.ministral3 import Ministral3


def generator_for(model: Ministral3, kv_dtype: Literal["fp8"] | None) -> Generator:
    """The model's generator; it holds the model weakly, whose cache it would keep alive otherwise.

    It notices by itself what has changed in the model, but for how that is spread over ranks.
    """
    return generator_of(model, (id(model.layout), kv_dtype), lambda: Generator(weakref.proxy(model), kv_dtype=kv_dtype))


@torch.no_grad()
def call_of(
    model: Ministral3, inputs: Inputs, options: Mapping[str, Any], config: GenerationConfig | None, seed: int | None
) -> Call:
    """A call's inputs and options, with the defaults of the checkpoint's ``generation_config.json``."""
    has_file = model.source is not None and (model.source / "generation_config.json").is_file()
    own = GenerationConfig.from_pretrained(model.source) if has_file else None
    return Call.of(model, inputs, options, (config, own), seed)
