"""Ministral 3: the parallel model and its checkpoints."""

import importlib

# read on first use: conversion alone needs no model, and so no transformers
_HOMES = {
    "CheckpointError": "files",
    "Config": "config",
    "ConfigError": "config",
    "KVCache": "cache",
    "Ministral3": "model",
    "Output": "model",
    "parallelize": "parallel",
    "set_recompute": "recompute",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
