"""The table of rules: which transformers class an op replaces the forward of, and what that class must look like.

Rules go by structure and signature, not by version. A class that is named here but lacks an attribute or a parameter has
changed underneath us: that raises with ``strict=True``. A module whose configuration does not fit is skipped, reported.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from m3kernels.patching import adapters, fp8, loss, native, vision
from m3kernels.patching.classes import FORWARDS
from m3kernels.patching.text import is_silu

TEXT = "transformers.models.ministral3.modeling_ministral3"
MULTIMODAL = "transformers.models.mistral3.modeling_mistral3"
VISION = "transformers.models.pixtral.modeling_pixtral"


def _always(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Rule:
    """One row: modules of exactly ``source.name`` get ``forward`` as part of ``op``.

    Attributes:
        attributes: the module must have them.
        parameters: its forward must have them; ``new|old`` where releases differ in the name.
        why_not: reason why one module's configuration does not fit, or an empty string.
        prepare: is called with every module that is fused, at each patch.
    """

    op: str
    source: str
    name: str
    forward: str
    attributes: tuple[str, ...]
    parameters: tuple[str, ...]
    why_not: Callable[[nn.Module], str] = _always
    prepare: Callable[[nn.Module], object] = _always

    def mismatch(self, module: nn.Module) -> str:
        """How the class differs from what the rule was written for; empty when it does not."""
        lacking = [a for a in self.attributes if not hasattr(module, a)]
        if lacking:
            return f"{self.name} has no {', '.join(lacking)}"
        parameters = inspect.signature(type(module).forward).parameters
        lacking = [p.replace("|", " or ") for p in self.parameters if not set(p.split("|")) & set(parameters)]
        return f"{self.name}.forward takes no {', '.join(lacking)}" if lacking else ""


def _needs_silu(module: nn.Module) -> str:
    return "" if is_silu(module.act_fn) else f"activation is {type(module.act_fn).__name__}, not silu"


NORM = {"attributes": ("weight", "variance_epsilon"), "parameters": ("hidden_states",)}
MLP = {
    "attributes": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    "parameters": ("x",),
    "why_not": _needs_silu,
}
ROTARY = {"attributes": ("inv_freq", "attention_scaling"), "parameters": ("x", "position_ids")}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "config")
LAYER = ("hidden_states", "attention_mask", "position_embeddings")
CACHE = "cache|past_key_values"
NATIVE = ("q_proj", "k_proj", "v_proj", "o_proj", "core", "config")

RULES = (
    Rule("rms_norm", TEXT, "Ministral3RMSNorm", "rms_norm", **NORM),
    Rule("rms_norm", MULTIMODAL, "Mistral3RMSNorm", "rms_norm", **NORM),
    Rule("rms_norm", VISION, "PixtralRMSNorm", "rms_norm", **NORM),
    Rule(
        "add_rms_norm",
        TEXT,
        "Ministral3DecoderLayer",
        "add_rms_norm",
        ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        (*LAYER, "position_ids", CACHE, "use_cache"),
    ),
    Rule(
        "add_rms_norm",
        VISION,
        "PixtralAttentionLayer",
        "vision_add_rms_norm",
        ("attention", "feed_forward", "attention_norm", "ffn_norm"),
        LAYER,
    ),
    Rule(
        "rotary",
        TEXT,
        "Ministral3Attention",
        "rotary",
        (*PROJECTIONS, "layer_idx", "attention_dropout"),
        (*LAYER, "position_ids", CACHE),
    ),
    Rule("rotary", TEXT, "Ministral3RotaryEmbedding", "rotary_table", **ROTARY),
    Rule("rotary_2d", VISION, "PixtralAttention", "rotary_2d", (*PROJECTIONS, "dropout"), LAYER),
    Rule("rotary_2d", VISION, "PixtralVisionRotaryEmbedding", "rotary_2d_table", **ROTARY),
    Rule(
        "attention",
        VISION,
        "PixtralVisionModel",
        "vision_model",
        ("patch_conv", "patch_size", "ln_pre", "transformer", "patch_positional_embedding", "config"),
        ("pixel_values", "image_sizes"),
    ),
    Rule("swiglu", TEXT, "Ministral3MLP", "swiglu", **MLP),
    Rule("swiglu", VISION, "PixtralMLP", "swiglu", **MLP),
    Rule(
        "fp8_linear",
        *fp8.LAYER,
        "fp8_linear",
        ("weight", "weight_scale_inv", "block_size", "bias"),
        ("input",),
        fp8.why_not,
    ),
    Rule(
        "lora_linear",
        *adapters.LAYER,
        "lora_linear",
        ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "merged", "disable_adapters"),
        ("x",),
        adapters.why_not,
    ),
    *(
        Rule(
            "linear_cross_entropy",
            source,
            name,
            "linear_cross_entropy",
            ("model", "lm_head", "loss_function"),
            ("labels", "logits_to_keep"),
            loss.fuse_head,
        )
        for source, name in ((TEXT, "Ministral3ForCausalLM"), (MULTIMODAL, "Mistral3ForConditionalGeneration"))
    ),
    Rule(
        "lora_linear",
        *adapters.NATIVE_LAYER,
        "native_lora_linear",
        ("weight", "lora_A", "lora_B", "lora_magnitude", "scaling", "dropout"),
        ("x",),
        adapters.why_not_native,
    ),
    Rule("rms_norm", native.LAYERS, "RMSNorm", "native_rms_norm", ("weight", "eps"), ("x", "update")),
    Rule("rotary", native.TEXT, "Attention", "native_rotary", NATIVE, ("step",), prepare=native.side_by_side_attention),
    Rule(
        "rotary_2d",
        native.VISION,
        "VisionAttention",
        "native_rotary_2d",
        NATIVE,
        ("table_PK", "images"),
        prepare=native.side_by_side_attention,
    ),
    Rule(
        "attention",
        native.LAYERS,
        "SequenceAttention",
        "native_attention",
        ("causal", "window", "dropout", "layer"),
        ("q_THK", "k_TGK", "v_TGK", "sequences", "cache"),
    ),
    Rule(
        "swiglu",
        native.LAYERS,
        "MLP",
        "native_swiglu",
        MLP["attributes"],
        ("x_TD",),
        _needs_silu,
        native.side_by_side_mlp,
    ),
    Rule("linear_cross_entropy", native.ROOT[0], "Head", "native_head", ("weight",), ("x_TD", "labels_T")),
)


def prepare(model: nn.Module) -> None:
    """Prepares every module that is fused; again where that was undone since, by a cast or a move to another device.

    Nothing of a model that ``borrows_weights`` of another: that one may not find them moved.
    """
    if getattr(model, "borrows_weights", False):
        return
    by_forward = {rule.forward: rule.prepare for rule in RULES}
    for module in model.modules():
        by_forward.get(getattr(type(module), "_m3k_forward", ""), _always)(module)


OPS = tuple(dict.fromkeys(rule.op for rule in RULES))

# forwards whose projections' adapters are taken together
PROJECTING = ("rotary", "rotary_2d", "swiglu", "native_rotary", "native_rotary_2d", "native_swiglu")

# parts that adapters are chosen by, and what is whose module; all others are the text model's
PARTS = {
    "text": (),
    "vision": ((VISION, "PixtralVisionModel"), (native.VISION, "VisionTower")),
    "projector": ((MULTIMODAL, "Mistral3MultiModalProjector"), (native.VISION, "Projector")),
}

# whose config's attention implementation becomes ours; rotary and rotary_2d give them their forwards
ATTENTION_MODULES = ((TEXT, "Ministral3Attention"), (VISION, "PixtralAttention"))

# what patch() takes, besides wrappers around these
ROOTS = {
    TEXT: (
        "Ministral3ForCausalLM",
        "Ministral3Model",
        "Ministral3ForSequenceClassification",
        "Ministral3ForTokenClassification",
        "Ministral3ForQuestionAnswering",
    ),
    MULTIMODAL: ("Mistral3ForConditionalGeneration", "Mistral3Model"),
    VISION: ("PixtralVisionModel",),
    native.ROOT[0]: (native.ROOT[1],),
}

assert all(rule.forward in FORWARDS for rule in RULES) and vision
