"""Ministral 3: the parallel model and its checkpoints."""

import importlib

# read on first use: conversion alone needs no model, and so no transformers
_HOMES = {
    "AdapterConfig": "adapters",
    "AdapterError": "adapters",
    "CheckpointError": "files",
    "Config": "config",
    "ConfigError": "config",
    "KVCache": "cache",
    "Ministral3": "model",
    "Output": "model",
    "QuantizationError": "quantized",
    "QuantizedLinear": "quantized",
    "adapter_of": "adapters",
    "adapter_parameters": "adapters",
    "add_adapters": "adapters",
    "load_adapter": "adapters",
    "merge_adapters": "adapters",
    "parallelize": "parallel",
    "quantize_": "quantized",
    "reset_adapters": "adapters",
    "save_adapter": "adapters",
    "set_recompute": "recompute",
    "targets_of": "adapters",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
