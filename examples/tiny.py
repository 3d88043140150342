"""What the examples train: a Ministral 3 by name or path, or a random tiny one with a byte tokenizer, without a download."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def load(name: str | None, dtype: torch.dtype, vision: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """``vision``: give the tiny one a vision tower too."""
    if name is None:
        tokenizer = tiny_tokenizer()
        config = tiny_config(len(tokenizer))
        model = Mistral3ForConditionalGeneration(with_vision(config)) if vision else Ministral3ForCausalLM(config)
        return model, tokenizer
    # the released checkpoints hold the vision tower as well
    vlm = AutoConfig.from_pretrained(name).model_type == "mistral3"
    cls = Mistral3ForConditionalGeneration if vlm else Ministral3ForCausalLM
    return cls.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        chat_template=CHAT,
    )


def tiny_config(vocab_size: int) -> Ministral3Config:
    return Ministral3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        initializer_range=0.1,
    )


def with_vision(config: Ministral3Config) -> Mistral3Config:
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        hidden_act="silu",
    )
    # no byte's token stands for images: none are given
    return Mistral3Config(
        text_config=config, vision_config=vision, image_token_index=config.pad_token_id, tie_word_embeddings=False
    )
