"""Patching Hugging Face models: rules as data, classes swapped per instance, a report that can undo itself."""

from m3kernels.patching.api import PatchError, is_patched, patch, patched, unpatch
from m3kernels.patching.report import PatchReport, Skip

__all__ = ["PatchError", "PatchReport", "Skip", "is_patched", "patch", "patched", "unpatch"]
