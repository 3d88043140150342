"""transformers' options of ``generate`` as ours: what is taken, with its order of precedence, and what is refused by name."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from m3kernels.models.generation.prompt import GenerationError, Sampling, real, whole

logger = logging.getLogger("m3kernels")


class _NotGiven:
    def __repr__(self) -> str:
        return "not given"


# an argument's default: transformers tells a None that is given from none
NOT_GIVEN: Any = _NotGiven()

# transformers' own, where neither the call nor a config says anything
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_length": 20}

TAKEN = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "return_dict_in_generate")
TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")

# of no effect on which tokens come out, or on nothing that runs here
WITHOUT_EFFECT = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "synced_gpus", "use_model_defaults"),
    *("early_stopping", "length_penalty", "decoder_start_token_id", "is_assistant", "token_type_ids", "logits_to_keep"),
    *(
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
    ),
    *("target_lookbehind", "max_matching_ngram_size", "assistant_ensemble_weight", "speculation_type"),
    *("transformers_version", "_from_model_config", "_commit_hash", "output_loading_info"),
)

# values with which an option changes nothing; any other is refused. None is always one.
NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    # an empty list of any class
    "logits_processor": ([],),
    "stopping_criteria": ([],),
}

# arguments of transformers' generate and inputs of its forward that are refused with any value
REFUSED = (
    *("inputs_embeds", "past_key_values", "cache", "position_ids", "labels", "cu_seq_lens_q", "mm_encoder_outputs"),
    *("prefix_allowed_tokens_fn", "assistant_model", "assistant_tokenizer"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "tokenizer", "adapter_names"),
)


@dataclass(frozen=True)
class Choice:
    """What a call of ``generate`` asked for.

    Attributes:
        sampling: for the engine; ``stop_tokens`` are the end-of-sequence ids.
        pad: what finished rows are filled with; None where no row can finish before the others.
        returns_dict: whether transformers' output class is wanted, not the ids alone.
    """

    sampling: Sampling
    pad: int | None
    returns_dict: bool = False


def merged(given: Mapping[str, Any], *configs: GenerationConfig | None) -> dict[str, Any]:
    """Every option's value: the call's, None too, else that of the first config that has one, else transformers' default.

    Raises:
        GenerationError: an option that changes what comes out and that is not there.
        TypeError: one that transformers does not know either.
    """
    for config in configs:
        if config is not None and not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config is a {type(config).__name__}; give a transformers GenerationConfig")
    known = set(GenerationConfig().to_dict()) | {*TAKEN, *TOKENS, *WITHOUT_EFFECT, *NEUTRAL, *REFUSED}
    for name in given:
        if name not in known:
            raise TypeError(f"generate takes no {name}; options: {', '.join((*TAKEN, *TOKENS))}")
    values = dict(DEFAULTS)
    for config in reversed(configs):
        fields = {} if config is None else config.to_dict()
        # what else stands in a generation_config.json, transformers ignores as well
        values |= {name: value for name, value in fields.items() if value is not None and name in known}
    values |= given
    for name, value in values.items():
        if name in (*TAKEN, *TOKENS, *WITHOUT_EFFECT) or value is None:
            continue
        if value not in NEUTRAL.get(name, ()):
            raise GenerationError(_refusal(name, value, name in given))
    return values


def _refusal(name: str, value: Any, in_call: bool) -> str:
    said = f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name
    origin = "" if in_call else ", from the generation config,"
    neutral = f" or leave it at {NEUTRAL[name][0]!r}" if NEUTRAL.get(name, ([],))[0] != [] else " or leave it out"
    return f"{said}{origin} is not in the fast path: call hf_model.generate(...) for it,{neutral}"


def choice_of(
    values: Mapping[str, Any], length: int, *, sets_length: bool, max_positions: int, seed: int | None
) -> Choice:
    """What merged options ask for.

    Args:
        length: columns of ``input_ids``.
        sets_length: whether call or configs had a ``max_length``; the default of 20 counts new tokens alone.
        max_positions: of the model; the default stops there.
        seed: of the draws; None takes one from torch's default generator, as transformers' draws would.

    Raises:
        GenerationError: no room for a new token, or values out of range.
    """
    most = values.get("max_new_tokens")
    if most is None:
        end = (
            whole("max_length", values["max_length"])
            if sets_length
            else min(length + DEFAULTS["max_length"], max_positions)
        )
        most = end - length
        if most < 1:
            raise GenerationError(
                f"input_ids have {length} columns, and max_length is {end}: nothing is left to generate; give max_new_tokens"
            )
    samples = bool(values["do_sample"])
    temperature = 1.0 if values["temperature"] is None else real("temperature", values["temperature"])
    if samples and not temperature > 0:
        raise GenerationError(f"temperature={temperature} with do_sample=True; allowed: above 0, or do_sample=False")
    if not samples and temperature != DEFAULTS["temperature"]:
        logger.warning(
            "m3kernels: temperature=%s counts with do_sample=True alone: tokens are the likeliest", temperature
        )
    drawing = {}
    if samples:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        top_k, top_p = values["top_k"] or 0, 1.0 if values["top_p"] is None else values["top_p"]
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    stops = ids_of(values.get("eos_token_id"))
    pad = next(iter(ids_of(values.get("pad_token_id"))), stops[0] if stops else None)
    sampling = Sampling(max_new_tokens=most, stop_tokens=stops, **drawing)
    return Choice(sampling, pad, bool(values.get("return_dict_in_generate")))


def ids_of(value: int | list[int] | Tensor | None) -> tuple[int, ...]:
    """One id, several or none, as transformers' configs have them."""
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(int(token) for token in value) if isinstance(value, (list, tuple)) else (int(value),)
