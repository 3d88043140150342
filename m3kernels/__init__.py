"""Fused Triton kernels for Mistral AI's Ministral 3, patched into a Hugging Face model with one call.

import m3kernels
report = m3kernels.patch(model)
print(report)

``m3kernels.generate(model, input_ids, max_new_tokens=100)`` is the model's ``generate`` by the fast engine.

``m3kernels.peft.target_modules(model)`` names the modules for a LoRA.
"""

from m3kernels import peft as peft  # not in __all__: a star import would hide the real peft
from m3kernels.patching import PatchReport, is_patched, patch, patched, unpatch
from m3kernels.patching.importing import when_imported


def _name_attention() -> None:
    """``from_pretrained(..., attn_implementation="m3kernels")``."""
    from m3kernels.patching.attention import register

    register()


# transformers' models take longer to import than all of this, and many who import this need none
when_imported("transformers.modeling_utils", _name_attention)

__version__ = "0.1.0"
__all__ = ["PatchReport", "generate", "is_patched", "patch", "patched", "unpatch"]


def __getattr__(name: str):
    # the engine and transformers' generation are imported where somebody generates
    if name == "generate":
        from m3kernels.models.generation.huggingface import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
