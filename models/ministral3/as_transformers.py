"""What code written for transformers asks of a model and of its config, besides the forward."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3.cache import KVCache
from m3kernels.models.ministral3.recompute import set_recompute

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import GenerateDecoderOnlyOutput
    from transformers.generation.streamers import BaseStreamer

    from m3kernels.models.generation.engine import Run
    from m3kernels.models.ministral3.convert import Report

# where transformers' name differs from that of TextConfig
TEXT_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
VISION_NAMES = {"spatial_merge_size": "spatial_merge_size", "vision_feature_layer": "feature_layer"}


# of a forward: what is taken, what is passed on by transformers' collators and wrappers, and what is not there
TAKEN = ("past_key_values", "shift_labels", "cu_seq_lens_q")
WITHOUT_EFFECT = ("cache_position", "token_type_ids", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
NOT_THERE = ("output_attentions", "output_hidden_states")


def options_of_transformers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a forward's options that are taken.

    Raises:
        TypeError: an unknown one: ignored, a misspelt argument would go unnoticed.
        ValueError: outputs that are not there, or another library's cache.
    """
    for name, value in options.items():
        if name in NOT_THERE and value:
            raise ValueError(
                f"{name}=True: this model returns loss, logits and cache; hook a module for what is inside"
            )
        if name not in (*TAKEN, *WITHOUT_EFFECT, *NOT_THERE):
            raise TypeError(f"Ministral3.forward takes no {name}; options: {', '.join((*TAKEN, *WITHOUT_EFFECT))}")
    past = options.get("past_key_values")
    if past is not None and not isinstance(past, KVCache):
        raise ValueError(
            f"past_key_values is a {type(past).__name__}; allowed: the past_key_values of an earlier output"
        )
    return {name: options[name] for name in TAKEN if options.get(name) is not None}


class ConfigNames:
    """transformers' names on a ``Config``. What the model is made of is fixed; all else may be set, and means nothing to it.

    Attributes:
        use_cache: what transformers' Trainer switches off; a forward goes by its argument alone.
    """

    use_cache = False
    is_encoder_decoder = False
    bos_token_id = eos_token_id = None
    name_or_path = _name_or_path = ""

    @property
    def model_type(self) -> str:
        return "ministral3" if self.vision is None else "mistral3"

    @property
    def tie_word_embeddings(self) -> bool:
        return self.tied

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "ConfigNames":
        """This one, whose names are the text model's."""
        return self

    def to_dict(self) -> dict:
        """Fields, nested, and the names of transformers on top; ``save_pretrained`` writes Hugging Face's, from ``hf``."""
        names = ("model_type", "tie_word_embeddings", "use_cache", "vocab_size", "hidden_size", "head_dim", *TEXT_NAMES)
        fields = dataclasses.asdict(self)
        del fields["hf"]
        return fields | {name: getattr(self, name) for name in names}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __getattr__(self, name: str):
        fields = vars(self)
        if "text" in fields:  # not while a copy is being made
            text, vision = fields["text"], fields["vision"]
            if vision is not None:
                if name in ("text_config", "vision_config"):
                    return self if name == "text_config" else vision
                if name in ("image_token_index", "image_token_id"):
                    return fields["image_token"]
                if name in VISION_NAMES:
                    return getattr(vision, VISION_NAMES[name])
            if not name.startswith("_") and hasattr(text, TEXT_NAMES.get(name, name)):
                return getattr(text, TEXT_NAMES.get(name, name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value) -> None:
        if name in vars(self) and any(field.name == name for field in dataclasses.fields(self)):
            raise dataclasses.FrozenInstanceError(
                f"{name} is fixed once a config is made: make another with dataclasses.replace, and a model of that"
            )
        object.__setattr__(self, name, value)


class ModelMethods:
    """transformers' methods on a ``Ministral3``."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # num_items_in_batch: what the Trainer counts over accumulated batches
    supports_gradient_checkpointing = True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        hf_model: str | os.PathLike | None = None,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        progress: bool = False,
    ) -> "Report":
        """Writes a Hugging Face checkpoint: safetensors, ``config.json``, and the tokenizer's files of what it came from.

        A sharded model is saved by all ranks together: each gathers one tensor at a time, the first one writes, and no
        rank returns before the folder is there. One that is whole on every rank is saved by the rank that calls.

        Args:
            folder: appears when it is complete; a failure leaves what stood there.
            hf_model: a checkpoint whose names, files, dtypes, config and other files are written instead.
            dtype: of the file; the parameters' own by default, with ``hf_model`` that of its layout.
            overwrite: replace a checkpoint that stands there.
            progress: whether to show a bar.

        Raises:
            CheckpointError: the folder is not free or its disk too small; the config is not known (a model that was
                not made from a Hugging Face config needs ``hf_model``) or does not fit the parameters; on every rank.
            OSError: the disk, on the rank that writes; CheckpointError on the others.
        """
        from m3kernels.models.ministral3.convert import to_hf

        return to_hf(self, folder, hf_model, dtype=dtype, overwrite=overwrite, progress=progress)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes decoder layers, but their attention where kernels run; ``recompute.set_recompute`` has finer choices.

        Args:
            activation_checkpointing_kwargs: of ``torch.utils.checkpoint``; it is never reentrant here, whatever they say.
            every_n_layers: recompute the first of so many layers.

        Raises:
            ValueError: ``offload``, which is not there.
        """
        if offload:
            raise ValueError("offload=True: this model keeps activations on their device; set_recompute takes a budget")
        layers = len(self.model.language_model.layers)
        set_recompute(self, ["none" if i % every_n_layers else "attention" for i in range(layers)])

    def activation_checkpointing_disable(self) -> None:
        set_recompute(self, "none")

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(mode in ("attention", "all") for mode in self.model.language_model.recompute)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping | None = None, **options) -> None:
        """:meth:`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Embeddings get a gradient even where nothing below them is trained, as reentrant checkpoints need it."""
        self.disable_input_require_grads()
        hook = lambda module, inputs, output: output.requires_grad_(True)
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(hook)

    def disable_input_require_grads(self) -> None:
        if (hook := self.__dict__.pop("_require_grads_hook", None)) is not None:
            hook.remove()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs) -> dict:
        """The inputs as they are: PEFT's causal language models want the method."""
        return {"input_ids": input_ids, **inputs}

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence | None = None,
        *,
        seed: int | None = None,
        generation_config: "GenerationConfig | None" = None,
        streamer: "BaseStreamer | None" = None,
        stream: bool = False,
        kv_dtype: str | None = None,
        **options,
    ) -> "Tensor | GenerateDecoderOnlyOutput | Run":
        """transformers' ``generate``; inputs, options, result and errors are those of :func:`m3kernels.generate`.

        Under tensor parallelism every rank calls it with the same inputs and the same seed, and gets the same rows.

        Args:
            generation_config: before that of the checkpoint's folder, where the model was read from one.
            stream: give :meth:`stream`'s iterator instead.
            options: transformers' (``max_new_tokens``, ``do_sample``, ``temperature``, ...).
        """
        from m3kernels.models.generation.native import call_of, generator_for

        inputs = (input_ids, attention_mask, pixel_values, image_sizes)
        if stream:
            if streamer is not None:
                raise ValueError("give either stream=True, for an iterator, or a streamer, which is called")
            return self.stream(*inputs, seed=seed, generation_config=generation_config, kv_dtype=kv_dtype, **options)
        call = call_of(self, inputs, options, generation_config, seed)
        return call.rows(generator_for(self, kv_dtype), streamer)

    def stream(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence | None = None,
        *,
        seed: int | None = None,
        generation_config: "GenerationConfig | None" = None,
        kv_dtype: str | None = None,
        every: int = 1,
        **options,
    ) -> "Run":
        """:meth:`generate` as an iterator of bursts: of each row the new tokens since the last one.

        End-of-sequence ids are not among them; ``run.stop(row)`` ends a row, ``run.results`` says what came and why it ended.

        Args:
            every: tokens a row in a burst.
        """
        from m3kernels.models.generation.native import call_of, generator_for

        inputs = (input_ids, attention_mask, pixel_values, image_sizes)
        run = call_of(self, inputs, options, generation_config, seed).bursts(generator_for(self, kv_dtype), every)
        run.model = self  # the generator alone would not keep it
        return run
