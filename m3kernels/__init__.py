"""Fused Triton kernels for Mistral AI's Ministral 3, patched into a Hugging Face model with one call.

import m3kernels
report = m3kernels.patch(model)
print(report)
"""

from m3kernels.patching import PatchReport, is_patched, patch, patched, unpatch

__version__ = "0.1.0"
__all__ = ["PatchReport", "is_patched", "patch", "patched", "unpatch"]
