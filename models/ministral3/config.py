"""What a Ministral 3 is made of: frozen dataclasses, read from the Hugging Face config that comes with a checkpoint."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from m3kernels.models.ministral3.as_transformers import ConfigNames
from m3kernels.models.ministral3.weights import check_architecture

ROPE_TYPES = ("yarn", "default")


class ConfigError(ValueError):
    """A config asks for what this model cannot compute."""


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: YaRN (https://arxiv.org/abs/2309.00071) over a base of ``theta``, or the base alone.

    Attributes:
        kind: "yarn" or "default" (no extension).
        theta: base of the wavelengths.
        factor: by how much the context was extended.
        original_max: positions before the extension; the Llama-4 query scale counts in it as well.
        beta_fast, beta_slow: rotations over ``original_max`` above which a frequency stays, below which it is divided.
        truncate: whether the range between the two is rounded outwards to whole dimensions.
        attention_factor: what cos and sin are multiplied by.
        llama4_beta: slope of the query scale; None: no scale.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_max: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    llama4_beta: float | None = None

    @classmethod
    def from_hf(cls, parameters: Mapping, max_positions: int) -> "Rope":
        """Reads transformers' ``rope_parameters``, with its defaults for what is absent."""
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ConfigError(f"rope_type is {kind!r}; allowed: {', '.join(ROPE_TYPES)}, as Ministral 3 has it")
        shared = {"theta": parameters["rope_theta"], "llama4_beta": parameters.get("llama_4_scaling_beta")}
        original = parameters.get("original_max_position_embeddings")
        if kind == "default":
            return cls(kind, original_max=original, **shared)
        original = original or max_positions
        factor = parameters.get("factor") or max_positions / original
        return cls(
            kind,
            factor=factor,
            original_max=int(original),
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            truncate=parameters.get("truncate", True),
            attention_factor=_attention_factor(parameters, factor),
            **shared,
        )

    @property
    def llama4(self) -> tuple[float, int] | None:
        """(beta, original_max) of the query scale, None without one."""
        return None if self.llama4_beta is None or self.original_max is None else (self.llama4_beta, self.original_max)

    def inv_freq(self, head_dim: int) -> Tensor:
        """(head_dim / 2,) fp32 radians a position, on the CPU whatever the default device is."""
        wavelengths = self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        if self.kind == "default":
            return 1.0 / wavelengths

        def dimension(rotations: float) -> float:
            """Where in the head a frequency turns this often over the original length."""
            turns = self.original_max / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
        extrapolated, interpolated = 1.0 / wavelengths, 1.0 / (self.factor * wavelengths)
        return interpolated * (1 - kept) + extrapolated * kept


def _attention_factor(parameters: Mapping, factor: float) -> float:
    if (said := parameters.get("attention_factor")) is not None:
        return float(said)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)


@dataclass(frozen=True)
class TextConfig:
    """The language model; ``head_dim`` is not hidden / heads on the 3B and the 14B.

    Attributes:
        vocab_size: ids that there are.
        max_positions: tokens of the longest sequence that the model was made for.
        pad_vocab_to: embedding and head have rows up to a multiple of this, zeros that no id names and no logit shows.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    sliding_window: int | None
    attention_dropout: float
    pad_token_id: int | None
    max_positions: int
    pad_vocab_to: int = 1

    def __post_init__(self):
        if self.pad_vocab_to < 1:
            raise ConfigError(f"pad_vocab_to is {self.pad_vocab_to}; allowed: 1 (no padding) and more")

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head, with the padding."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


@dataclass(frozen=True)
class VisionConfig:
    """The Pixtral tower and the projector behind it.

    Attributes:
        feature_layer: whose hidden states the projector takes, as transformers counts them: 0 is what enters the first
            layer, ``num_layers`` what leaves the last.
        projector_eps: of the projector's norm; the tower's own is fixed.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    patch_size: int
    hidden_act: str
    rope_theta: float
    attention_dropout: float
    spatial_merge_size: int
    feature_layer: int
    projector_act: str
    projector_bias: bool
    projector_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def inv_freq(self) -> Tensor:
        """(head_dim / 2,) fp32: the even ones, which turn with the row, then the odd ones, which turn with the column."""
        frequencies = Rope("default", self.rope_theta).inv_freq(self.head_dim)
        return torch.cat([frequencies[0::2], frequencies[1::2]])


@dataclass
class Config(ConfigNames):
    """A whole model; fields cannot be set again.

    Attributes:
        vision: None for a checkpoint of the language model alone.
        image_token: the id whose embeddings are replaced by image features.
        tied: whether the head is the embedding. It goes by what a checkpoint holds, not by the config's flags.
        initializer_range: standard deviation of matrices that are drawn, not read.
        hf: the dict of the Hugging Face config that this was read from, for saving; of no effect on the model.
    """

    text: TextConfig
    vision: VisionConfig | None
    image_token: int | None
    tied: bool
    initializer_range: float = 0.02
    hf: dict | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_hf(cls, config, *, tied: bool | None = None, pad_vocab_to: int = 1) -> "Config":
        """Reads a transformers config, or the dict of a ``config.json``.

        Args:
            config: of model_type "mistral3" with a "ministral3" text model, or "ministral3" alone.
            tied: whether the head is the embedding; None goes by the flag of the outermost level, as
                transformers does.
            pad_vocab_to: see ``TextConfig``.

        Raises:
            CheckpointError: another architecture.
            ConfigError: something in it that this model does not compute.
        """
        from transformers import Ministral3Config, Mistral3Config

        if isinstance(config, Mapping):
            check_architecture(config)
            raw = copy.deepcopy(dict(config))
            hf_class = Ministral3Config if config["model_type"] == "ministral3" else Mistral3Config
            config = hf_class.from_dict({k: v for k, v in copy.deepcopy(raw).items() if k != "torch_dtype"})
        else:
            raw = config.to_dict()
            check_architecture(raw)
        multimodal = config.model_type == "mistral3"
        text = config.text_config if multimodal else config
        if tied is None:
            tied = config.tie_word_embeddings
        return cls(
            text=replace(_text(text), pad_vocab_to=pad_vocab_to),
            vision=_vision(config) if multimodal else None,
            image_token=config.image_token_index if multimodal else None,
            tied=tied,
            initializer_range=text.initializer_range,
            hf=raw,
        )


def _activation(name: str, where: str) -> str:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"{where} is {name!r}; allowed: {', '.join(sorted(ACT2FN))}")
    return name


def _text(hf) -> TextConfig:
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise ConfigError(
            f"{hf.num_attention_heads} query heads cannot share {hf.num_key_value_heads} key-value heads evenly"
        )
    return TextConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        hidden_act=_activation(hf.hidden_act, "hidden_act"),
        rope=Rope.from_hf(hf.rope_parameters, hf.max_position_embeddings),
        sliding_window=hf.sliding_window,
        attention_dropout=float(hf.attention_dropout),
        pad_token_id=hf.pad_token_id,
        max_positions=hf.max_position_embeddings,
    )


def _vision(hf) -> VisionConfig:
    tower, layer = hf.vision_config, hf.vision_feature_layer
    if not isinstance(tower.patch_size, int):
        raise ConfigError(f"vision_config.patch_size is {tower.patch_size}; allowed: one integer")
    if not isinstance(layer, int) or not -tower.num_hidden_layers - 1 <= layer <= tower.num_hidden_layers:
        raise ConfigError(
            f"vision_feature_layer is {layer}; allowed: one of the {tower.num_hidden_layers} layers "
            "(transformers' projector takes no more than one either)"
        )
    return VisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_layers=tower.num_hidden_layers,
        num_heads=tower.num_attention_heads,
        num_channels=tower.num_channels,
        patch_size=tower.patch_size,
        hidden_act=_activation(tower.hidden_act, "vision_config.hidden_act"),
        rope_theta=tower.rope_parameters["rope_theta"],
        attention_dropout=float(tower.attention_dropout),
        spatial_merge_size=hf.spatial_merge_size,
        feature_layer=layer % (tower.num_hidden_layers + 1),
        projector_act=_activation(hf.projector_hidden_act, "projector_hidden_act"),
        projector_bias=hf.multimodal_projector_bias,
        projector_eps=hf.text_config.rms_norm_eps,
    )
