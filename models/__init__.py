"""Ministral 3 of our own, its conversion and its finetuning."""

import m3kernels

if getattr(m3kernels, "__file__", None) is None:
    raise ImportError(
        f"m3kernels is taken for the folder {list(m3kernels.__path__)[0]} instead of the package in it: Python looks into the "
        "script's or the current folder first. Start from another folder, or name the clone otherwise"
    )
