"""Ministral 3 at its real sizes with random weights: configs, models, batches, and what a training step costs.

Adding a size is one entry of ``SIZES``.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SEED = 20260801
IMAGE_TOKEN, PAD_TOKEN = 10, 11
RANK, ALPHA = 16, 32
# the seven linears of a text layer; the vision tower names its parents otherwise
LORA_TARGETS = r".*\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
# attention backward: five matrix products where forward has two
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Vision:
    """A Pixtral tower; ``images``: (height, width) in pixels of what a batch holds, multiples of patch x merge."""

    layers: int = 24
    hidden: int = 1024
    heads: int = 16
    intermediate: int = 4096
    patch: int = 14
    merge: int = 2
    images: tuple[tuple[int, int], ...] = ((980, 1400), (700, 840))

    def patches(self) -> list[int]:
        """Patches of each image."""
        return [(h // self.patch) * (w // self.patch) for h, w in self.images]

    def tokens(self) -> list[int]:
        """Text positions that each image takes."""
        return [n // self.merge**2 for n in self.patches()]

    def layer_linears(self) -> int:
        """Parameters of a layer's seven linears."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Size:
    """A text model; ``std`` of the random weights is the released config's ``initializer_range``."""

    layers: int
    hidden: int
    intermediate: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 131072
    theta: float = 1e6
    tied: bool = False
    std: float = 0.02
    vision: Vision = field(default_factory=Vision)

    def layer_linears(self) -> int:
        """Parameters of a layer's seven linears."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.linear_shapes())

    def linear_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of q, k, v, o, gate, up, down."""
        q, kv, hidden, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        return [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]

    def head(self) -> int:
        """Parameters of the head."""
        return self.vocab * self.hidden

    def adapters(self) -> int:
        """LoRA parameters of all layers."""
        return self.layers * RANK * sum(fan_in + fan_out for fan_in, fan_out in self.linear_shapes())

    def projector_linears(self) -> tuple[int, int]:
        """Parameters of the patch merger and of the two linears behind it."""
        return self.vision.hidden**2 * self.vision.merge**2, (self.vision.hidden + self.hidden) * self.hidden


SIZES: dict[str, Size] = {
    "3b": Size(26, 3072, 9216, tied=True),
    "8b": Size(34, 4096, 14336),
    "14b": Size(40, 5120, 16384, theta=1e9),
}


def text_config(size: Size):
    """The text config as released: YaRN factor 16 over 16384 positions, query scale 0.1."""
    from transformers import Ministral3Config

    rope = {"rope_type": "yarn", "rope_theta": size.theta, "factor": 16.0, "original_max_position_embeddings": 16384}
    rope |= {"max_position_embeddings": 262144, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
    rope |= {"mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    return Ministral3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        initializer_range=size.std,
        max_position_embeddings=262144,
        pad_token_id=PAD_TOKEN,
        tie_word_embeddings=size.tied,
        rope_parameters=rope,
    )


def vlm_config(size: Size):
    """The text model with its Pixtral tower."""
    from transformers import Mistral3Config, PixtralVisionConfig

    vision = size.vision
    tower = PixtralVisionConfig(
        hidden_size=vision.hidden,
        intermediate_size=vision.intermediate,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        patch_size=vision.patch,
        image_size=1540,
        hidden_act="silu",
        initializer_range=size.std,
    )
    return Mistral3Config(
        text_config=text_config(size),
        vision_config=tower,
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=vision.merge,
        tie_word_embeddings=size.tied,
    )


def build(size: Size, modality: str, device: torch.device) -> nn.Module:
    """A bf16 model ("text" or "vision") made on ``device`` itself, so that 14B take seconds; the same for one seed.

    Raises:
        RuntimeError: rotary frequencies came out other than transformers computes them on a CPU.
    """
    from transformers import Ministral3ForCausalLM, Mistral3ForConditionalGeneration

    cls = Ministral3ForCausalLM if modality == "text" else Mistral3ForConditionalGeneration
    config = text_config(size) if modality == "text" else vlm_config(size)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = cls._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    check_rotary(model)
    return model


def check_rotary(model: nn.Module) -> None:
    """Frequencies are buffers that no weight file restores: whoever moves or casts a model can spoil them unseen."""
    for name, module in model.named_modules():
        if not hasattr(module, "inv_freq") or module.inv_freq.device.type == "meta":
            continue
        expected = type(module)(module.config).inv_freq
        if module.inv_freq.dtype != torch.float32 or not torch.allclose(module.inv_freq.cpu(), expected, rtol=1e-5):
            raise RuntimeError(f"{name}.inv_freq is {module.inv_freq.dtype} and not what transformers computes in fp32")


def adapt(model: nn.Module, mode: str) -> nn.Module:
    """The model as ``mode`` trains it: "full" as it is, "lora" and "dora" inside PEFT with bf16 adapters.

    B is random instead of zero, so that every gradient is one; DoRA's magnitudes then differ from the norms as well.
    """
    if mode == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LORA_TARGETS, use_dora=mode == "dora"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.manual_seed(SEED + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def make_batch(size: Size, modality: str, batch: int, seq: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens (batch, seq) and labels; for "vision" every row holds the same images, whose tokens have no label."""
    g = torch.Generator().manual_seed(SEED)
    first = PAD_TOKEN + 1
    ids = torch.randint(first, size.vocab, (batch, seq), generator=g)
    labels = torch.randint(first, size.vocab, (batch, seq), generator=g)
    if modality == "text":
        return {"input_ids": ids.to(device), "labels": labels.to(device)}
    start = 1
    for tokens in size.vision.tokens():
        ids[:, start : start + tokens] = IMAGE_TOKEN
        start += tokens + 1
    if start > seq:
        raise ValueError(f"the images take {start - 1} tokens, more than the sequence of {seq}")
    labels[ids == IMAGE_TOKEN] = -100
    images = size.vision.images * batch
    made = {"input_ids": ids, "labels": labels} | draw_images(images, g)
    return {name: t.to(device) for name, t in made.items()}


def draw_images(sizes: tuple[tuple[int, int], ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Random ``pixel_values`` and ``image_sizes`` of images of (height, width) pixels, each in the upper left corner."""
    pixels = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    for image, (height, width) in zip(pixels, sizes):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels.bfloat16(), "image_sizes": torch.tensor(sizes)}


@dataclass(frozen=True)
class Flops:
    """What a training step must compute, in FLOPs: in linears and in attention. Recomputing is not counted."""

    gemm: int
    attention: int

    @property
    def total(self) -> int:
        return self.gemm + self.attention


def step_flops(size: Size, modality: str, mode: str, batch: int, seq: int) -> Flops:
    """Forward and backward of one step.

    A linear costs 2 FLOPs a parameter and token forward, 2 for its input's gradient and 2 for its weight's, which a
    frozen one is spared. Causal attention is half a square, attention within an image a whole one.
    """
    tokens, full = batch * seq, mode == "full"
    linears = size.layers * size.layer_linears() + size.head()
    gemm = (6 if full else 4) * linears * tokens
    gemm += 0 if full else 6 * size.adapters() * tokens
    forward = size.layers * 2 * 2 * batch * seq * seq // 2 * size.heads * size.head_dim
    attention = int((1 + ATTENTION_BACKWARD) * forward)
    if modality == "vision":
        tower = _tower_flops(size, trained=full)
        gemm, attention = gemm + batch * tower.gemm, attention + batch * tower.attention
    return Flops(gemm, attention)


def _tower_flops(size: Size, trained: bool) -> Flops:
    """Tower and projector for the images of one row; frozen, nothing flows back into them."""
    vision, factor = size.vision, 6 if trained else 2
    patches, tokens = vision.patches(), sum(vision.tokens())
    # nothing is wanted of the pixels: the convolution has no gradient of its input
    convolution = (4 if trained else 2) * 3 * vision.patch**2 * vision.hidden * sum(patches)
    gemm = factor * (vision.layers * vision.layer_linears() * sum(patches) + sum(size.projector_linears()) * tokens)
    forward = vision.layers * 2 * 2 * sum(n * n for n in patches) * vision.hidden
    return Flops(convolution + gemm, int((1 + ATTENTION_BACKWARD * trained) * forward))


def decode_bytes(size: Size, batch: int, context: int) -> int:
    """Bytes that one decoding step must read in bf16: all linears and norms, and ``context`` keys and values a row.

    Of an embedding that the head does not share, it reads ``batch`` rows.
    """
    weights = size.layers * (size.layer_linears() + 2 * size.hidden) + size.head() + size.hidden + batch * size.hidden
    cache = size.layers * 2 * size.kv_heads * size.head_dim * context * batch
    return 2 * (weights + cache)
