"""Fused operations. Nothing here knows a model; each file holds one op with its formula, kernel and reference."""

from m3kernels.ops._common import KernelLaunchError
from m3kernels.ops.adamw import adamw, adamw_reference
from m3kernels.ops.attention import attention, attention_reference
from m3kernels.ops.attention_decode import attention_decode, attention_decode_reference
from m3kernels.ops.decode_linear import decode_linear, decode_linear_reference
from m3kernels.ops.decode_qkv import decode_qkv, decode_qkv_reference
from m3kernels.ops.decode_swiglu import decode_swiglu, decode_swiglu_reference
from m3kernels.ops.dora_linear import dora_linear, dora_linear_reference, dora_norm, dora_norm_reference
from m3kernels.ops.fp8_dequantize import fp8_dequantize, fp8_dequantize_reference
from m3kernels.ops.fp8_linear import fp8_linear, fp8_linear_reference
from m3kernels.ops.global_norm import global_norm, global_norm_reference
from m3kernels.ops.kv_write import kv_write, kv_write_reference
from m3kernels.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from m3kernels.ops.lora_linear import Adapted, lora_linear, lora_linear_reference, lora_linears
from m3kernels.ops.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from m3kernels.ops.rotary import (
    llama4_scale,
    rotary,
    rotary_2d,
    rotary_2d_reference,
    rotary_2d_table,
    rotary_reference,
    rotary_table,
)
from m3kernels.ops.sample import sample, sample_reference
from m3kernels.ops.swiglu import swiglu, swiglu_reference

__all__ = [
    "Adapted",
    "KernelLaunchError",
    "adamw",
    "adamw_reference",
    "add_rms_norm",
    "add_rms_norm_reference",
    "attention",
    "attention_decode",
    "attention_decode_reference",
    "attention_reference",
    "decode_linear",
    "decode_linear_reference",
    "decode_qkv",
    "decode_qkv_reference",
    "decode_swiglu",
    "decode_swiglu_reference",
    "dora_linear",
    "dora_linear_reference",
    "dora_norm",
    "dora_norm_reference",
    "fp8_dequantize",
    "fp8_dequantize_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "global_norm",
    "global_norm_reference",
    "kv_write",
    "kv_write_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "llama4_scale",
    "lora_linear",
    "lora_linear_reference",
    "lora_linears",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_2d",
    "rotary_2d_reference",
    "rotary_2d_table",
    "rotary_reference",
    "rotary_table",
    "sample",
    "sample_reference",
    "swiglu",
    "swiglu_reference",
]
