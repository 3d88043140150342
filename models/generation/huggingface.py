"""``m3kernels.generate``: a Hugging Face model's ``generate`` by the fast engine, on the model's own weights."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from m3kernels.models.generation.borrowing import Source
from m3kernels.models.generation.call import Call
from m3kernels.models.generation.engine import Generator
from m3kernels.models.generation.kept import generator_of
from m3kernels.models.generation.options import NOT_GIVEN


@torch.no_grad()
def generate(
    hf_model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | Sequence | None = None,
    *,
    max_new_tokens: int | None = NOT_GIVEN,
    max_length: int | None = NOT_GIVEN,
    do_sample: bool | None = NOT_GIVEN,
    temperature: float | None = NOT_GIVEN,
    top_k: int | None = NOT_GIVEN,
    top_p: float | None = NOT_GIVEN,
    eos_token_id: int | Sequence[int] | None = NOT_GIVEN,
    pad_token_id: int | None = NOT_GIVEN,
    seed: int | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    kv_dtype: Literal["fp8"] | None = None,
    return_dict_in_generate: bool | None = NOT_GIVEN,
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """``hf_model.generate`` by the fast engine: the same tokens where the likeliest are taken, up to rounding.

    The model's weights are used where they are, and stay as they are; it may be patched or not, and be trained further.
    The engine's cache and its CUDA graph live as long as the model does. Every call reads its prompts anew: weights may
    have changed in between. Calls from several threads wait for one another.

    Args:
        hf_model: ``Ministral3ForCausalLM`` or ``Mistral3ForConditionalGeneration``, whole on one device; also inside PEFT,
            whose LoRA or DoRA adapters count (merged ones run faster: the decode step is fused then). FP8 layers run with
            activations as they are (W8A16), as their dequantised weights would.
        input_ids: (batch, seq) integers; None: one row of ``bos_token_id``.
        attention_mask: (batch, seq), 0 where there is padding, on the left or on the right: it changes nothing. None finds
            ``pad_token_id`` as transformers does.
        pixel_values: (images, channels, height, width), for the image tokens in their order.
        image_sizes: (images, 2), height and width of each in pixels.
        max_new_tokens, max_length, do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id: as transformers has them.
            What is not given is as ``generation_config`` says, else ``hf_model.generation_config``, else transformers'
            default; a None that is given counts, as it does there: no end of sequence, no filter.
        seed: of the draws; None takes one from torch's default generator.
        generation_config: between the call's own options and the model's.
        streamer: gets the prompt, each step's tokens (batch,), and the end, on the CPU.
        kv_dtype: "fp8" keeps keys and values in E4M3.
        return_dict_in_generate: transformers' output class with ``sequences`` alone.
        options: further ones of transformers with values that change nothing.

    Returns:
        (batch, seq + new) ids in the dtype and on the device of ``input_ids``: the rows as they came, then what was
        generated with its end-of-sequence token, then ``pad_token_id`` up to the longest row.

    Raises:
        GenerationError: an option that is not there (beams, several sequences a prompt, processors, criteria, guidance,
            assistants), inputs that do not fit, or a model that the engine does not compute; the message names it.
        TypeError: an option that transformers does not know.
    """
    named = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "return_dict_in_generate": return_dict_in_generate,
    }
    given = {name: value for name, value in named.items() if value is not NOT_GIVEN} | options
    source = Source.of(hf_model)
    generator = generator_of(
        source.model, (source.fingerprint, kv_dtype), lambda: Generator(source.shell(), kv_dtype=kv_dtype)
    )
    configs = (generation_config, source.model.generation_config)
    inputs = (input_ids, attention_mask, pixel_values, image_sizes)
    return Call.of(generator.model, inputs, given, configs, seed).rows(generator, streamer)
