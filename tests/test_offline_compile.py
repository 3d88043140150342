"""Every shipped kernel configuration compiled for sm_90a without a GPU: shared memory fits, nothing spills undeclared."""

import contextlib
import importlib
import io
import re
from importlib import metadata

import pytest
import torch

from m3kernels.ops._decode_products import Tiles
from m3kernels.ops._triton import HAS_TRITON, INTERPRET

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRET, reason="needs triton, not interpreted")

MEASURED_WITH = "3.6."
SHARED_MEMORY = 232_448  # bytes a program may use on H100 and H200
WIDTHS = (127, 1024, 3072, 4096, 5120, 9216, 16_384, 32_768, 65_536)
# bytes; at 5,120 the spill is what the fastest measured configuration has, beyond 16,384 a row outgrows the registers
MAY_SPILL = {
    ("rms_norm_fwd_kernel", 65_536): 250,
    ("rms_norm_bwd_kernel", 5120): 40,
    ("rms_norm_bwd_kernel", 9216): 100,
    ("rms_norm_bwd_kernel", 16_384): 1600,
    ("rms_norm_bwd_kernel", 32_768): 1600,
    ("rms_norm_bwd_kernel", 65_536): 2600,
    # where no other form takes the pass: ranks that the kernels for Hopper leave
    ("lora_shrink_kernel", 16): 12,
    ("lora_shrink_kernel", 48): 56,
    ("lora_shrink_kernel", 96): 56,
    # 64x64 tiles by 4 warps spill and are the fastest that were measured: 325 TFLOP/s, 198 without a spill (docs/attention.md)
    ("attention_bwd_dkdv_kernel", 64): 212,
    ("attention_bwd_dkdv_kernel", 80): 456,
    ("attention_bwd_dkdv_kernel", 128): 436,
    ("attention_bwd_dq_kernel", 80): 40,
    ("attention_bwd_dq_kernel", 128): 32,
    ("attention_bwd_dq_kernel", 256): 12,
    ("attention_fwd_kernel", 256): 80,
    ("attention_decode_kernel", 256): 48,
}

rms = importlib.import_module("m3kernels.ops.rms_norm")
swiglu = importlib.import_module("m3kernels.ops.swiglu")
rotary = importlib.import_module("m3kernels.ops.rotary")
loss = importlib.import_module("m3kernels.ops._cross_entropy_kernels")
launchers = importlib.import_module("m3kernels.ops._attention_triton")
decode = importlib.import_module("m3kernels.ops.attention_decode")
adapters = importlib.import_module("m3kernels.ops._lora_launch")
adapter_kernels = importlib.import_module("m3kernels.ops._lora_kernels")
adapter_sums = importlib.import_module("m3kernels.ops._lora_sum_kernels")
sums = importlib.import_module("m3kernels.ops._lora_sums")
dora = importlib.import_module("m3kernels.ops._dora_scale")
fp8 = importlib.import_module("m3kernels.ops.fp8_dequantize")
vocab_parallel = importlib.import_module("m3kernels.parallel.cross_entropy")
decode_linear, decode_qkv, decode_swiglu = (
    importlib.import_module(f"m3kernels.ops.decode_{name}") for name in ("linear", "qkv", "swiglu")
)
adamw = importlib.import_module("m3kernels.ops.adamw")
global_norm = importlib.import_module("m3kernels.ops.global_norm")
kv_write = importlib.import_module("m3kernels.ops.kv_write")
sampling = importlib.import_module("m3kernels.ops.sample")


def compile_sm90(kernel, warps: int, constexprs: dict, types: dict, stages: int | None = None, **options: int) -> dict:
    """Registers, spills and shared memory of one configuration; pointers and strides declared 16-aligned, as launched."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constexprs else types[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or re.search(r"(stride|width|vocab)\d?$", n)]
    aligned += [
        n
        for n in ("n1", "n2", "n3", "rank", "part", "small_row", "small_col", "width_each")
        if signature.get(n) == "i32"
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached kernel comes back without the assembler's log
        options |= {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    text = log.getvalue()
    # such a kernel is launched before the one that it reads from has ended
    assert not constexprs.get("OVERLAP") or "griddepcontrol.wait" in compiled.asm["ptx"]
    return {
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "registers": max(map(int, re.findall(r"Used (\d+) registers", text))),
        "spilled": max(map(int, re.findall(r"(\d+) bytes spill stores", text)), default=0),
        "serialised": re.findall(r"\((C75\d+)\)", text),
        "ttgir": compiled.asm["ttgir"],
        "ptx": compiled.asm["ptx"],
    }


def check(kernel, report: dict, width: int) -> None:
    """Spills are held for the Triton that the choices were measured with; another's register allocation is another."""
    assert report["shared"] <= SHARED_MEMORY, report["shared"]
    if not metadata.version("triton").startswith(MEASURED_WITH):
        return
    assert report["spilled"] <= MAY_SPILL.get((kernel.__name__, width), 0), (report["spilled"], report["registers"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_forward(width, residual, dtype):
    config, p = rms.forward_config(width), f"*{dtype}"
    types = dict.fromkeys(("p_x", "p_residual", "p_weight", "p_y", "p_summed"), p)
    types |= {"p_rstd": "*fp32", "x_stride": "i32", "residual_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    constexprs = {"WIDTH": width, "BLOCK": rms.next_power_of_2(width), "ROWS": config.rows}
    constexprs["HAS_RESIDUAL"] = residual
    check(rms.rms_norm_fwd_kernel, compile_sm90(rms.rms_norm_fwd_kernel, config.warps, constexprs, types), width)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dsummed", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_backward(width, dsummed, dtype):
    config = rms.backward_config(width, (2 + dsummed) * (4 if dtype == "fp32" else 2))
    types = dict.fromkeys(("p_dy", "p_dsummed", "p_x", "p_weight", "p_dx"), f"*{dtype}")
    types |= {"p_rstd": "*fp32", "p_dweight": "*fp32", "x_stride": "i32", "n_rows": "i32"}
    constexprs = {"WIDTH": width, "BLOCK": rms.next_power_of_2(width), "ROWS": config.rows}
    constexprs |= {"STAGES": config.stages, "HAS_DSUMMED": dsummed, "NEEDS_DWEIGHT": True}
    check(rms.rms_norm_bwd_kernel, compile_sm90(rms.rms_norm_bwd_kernel, config.warps, constexprs, types), width)


def test_column_sum():
    types = {"p_partial": "*fp32", "p_out": "*bf16", "n_partial": "i32"}
    constexprs = {"WIDTH": 4096, "BLOCK_ROW": 64, "BLOCK": 32}
    check(rms.column_sum_kernel, compile_sm90(rms.column_sum_kernel, 4, constexprs, types), 4096)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", [swiglu.swiglu_fwd_kernel, swiglu.swiglu_bwd_kernel], ids=lambda k: k.__name__)
def test_swiglu(kernel, dtype):
    types = {n: f"*{dtype}" if n.startswith("p_") else "i32" for n in kernel.arg_names}
    report = compile_sm90(kernel, swiglu.CONFIG.warps, {"BLOCK": swiglu.CONFIG.block}, types)
    check(kernel, report, 0)
    assert "ld.global.v4" in report["ptx"]  # 16 bytes a thread


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("per_block", "per_row"), [(False, False), (True, False), (False, True)])
def test_fp8_dequantize(per_block, per_row, dtype):
    kernel = fp8.fp8_dequantize_kernel
    types = {n: "i32" for n in kernel.arg_names} | {"p_weight": "*fp8e4nv", "p_scale": "*fp32", "p_out": f"*{dtype}"}
    constexprs = {"BLOCK_N": fp8.CONFIG.edge, "BLOCK_K": fp8.CONFIG.edge, "PER_BLOCK": per_block}
    constexprs["PER_ROW"] = per_row
    report = compile_sm90(kernel, fp8.CONFIG.warps, constexprs, types)
    check(kernel, report, 0)
    # 16 bytes a thread, and the hardware's conversion of two numbers at a time
    assert "ld.global.v4" in report["ptx"] and "cvt.rn.f16x2.e4m3x2" in report["ptx"]


def optimizer_types(kernel) -> dict:
    types = {n: "fp32" for n in kernel.arg_names} | dict.fromkeys(("p_fixed", "p_gradients", "p_sizes"), "*i64")
    types |= {"p_chunks": "*i32", "p_decay": "*fp32", "p_factor": "*fp32", "p_partial": "*fp32", "p_norm": "*fp32"}
    return types | {"seed": "i64", "step": "i32", "n_partial": "i32"}


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("parameter", "copy"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
    ids=["fp32", "master", "stochastic"],
)
def test_adamw(parameter, copy, gradient):
    kernel, config, types = adamw.adamw_kernel, adamw.CONFIG, adamw.TYPES
    constexprs = {"PARAMETER": types[parameter], "GRADIENT": types[gradient], "COPY": types.get(copy), "CLIPS": True}
    constexprs |= {"CHUNK": config.chunk, "LANES": adamw.LANES}
    report = compile_sm90(kernel, config.warps, constexprs, optimizer_types(kernel))
    check(kernel, report, 0)
    # four programs on an SM
    assert report["registers"] <= 128
    # 4 elements a thread, from addresses that a table holds
    wide = [parameter, gradient, torch.float32, torch.float32]
    for kind, dtypes in (("ld", wide), ("st", [parameter, torch.float32, torch.float32, copy])):
        assert report["ptx"].count(f"{kind}.global.v4.b32") == 4 * dtypes.count(torch.float32)
        assert report["ptx"].count(f"{kind}.global.v2.b32") == 4 * dtypes.count(torch.bfloat16)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
def test_global_norm(gradient):
    kernel, constexprs = global_norm.square_sum_kernel, {"GRADIENT": global_norm.TYPES[gradient]}
    constexprs |= {"CHUNK": global_norm.CONFIG.chunk, "LANES": global_norm.CONFIG.lanes}
    report = compile_sm90(kernel, global_norm.CONFIG.warps, constexprs, optimizer_types(kernel))
    check(kernel, report, 0)
    assert "ld.global.v4" in report["ptx"]
    kernel = global_norm.norm_kernel
    check(kernel, compile_sm90(kernel, 8, {"BLOCK": 4096}, optimizer_types(kernel)), 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(32, 8, 128), (16, 16, 64), (12, 3, 80), (64, 8, 256)])
@pytest.mark.parametrize(
    ("by_position", "scaled", "backward"), [(False, True, False), (False, True, True), (True, False, False)]
)
def test_rotary(q_heads, k_heads, dim, by_position, scaled, backward, dtype):
    kernel, config = rotary.rotary_kernel, rotary.CONFIG
    types = {n: "i32" for n in kernel.arg_names} | {
        "beta": "fp32",
        "p_position": "*i64",
        "p_cos": "*fp32",
        "p_sin": "*fp32",
    }
    types |= dict.fromkeys(("p_q", "p_k", "p_q_out", "p_k_out"), f"*{dtype}")
    constexprs = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": dim // 2,
        "BLOCK_HALF": rms.next_power_of_2(dim // 2),
        "BLOCK_Q_HEADS": min(config.heads, rms.next_power_of_2(q_heads)),
        "BLOCK_K_HEADS": min(config.heads, rms.next_power_of_2(k_heads)),
        "TABLE_BY_POSITION": by_position,
        "HAS_SCALE": scaled,
        "BACKWARD": backward,
    }
    check(kernel, compile_sm90(kernel, config.warps, constexprs, types), dim)


@pytest.mark.parametrize("vocab", [301, 32_000, 131_072])
@pytest.mark.parametrize(
    ("gradient", "smoothing", "correct"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_cross_entropy(vocab, gradient, smoothing, correct):
    kernel, config = loss.cross_entropy_kernel, loss.row_config(vocab, keeps_more=smoothing or correct)
    types = {n: "i32" for n in kernel.arg_names} | {"smoothing": "fp32", "z_loss": "fp32", "p_label": "*i64"}
    types |= {"p_logits": "*bf16"} | dict.fromkeys(("p_scale", "p_loss", "p_correct", "p_deferred", "p_rest"), "*fp32")
    constexprs = {
        "BLOCK": config.block,
        "WRITES_GRADIENT": gradient,
        "HAS_SMOOTHING": smoothing,
        "HAS_Z_LOSS": smoothing,
        "WANTS_CORRECT": correct,
        "DEFERS_LABEL": gradient,
    }
    check(kernel, compile_sm90(kernel, config.warps, constexprs, types), vocab)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("vocab", [301, 16_384, 65_536, 131_072])
@pytest.mark.parametrize("name", ["stats", "dlogits"])
def test_vocab_parallel_cross_entropy(name, vocab, dtype):
    kernel, config = getattr(vocab_parallel, f"vocab_parallel_{name}_kernel"), loss.row_config(vocab)
    types = {n: "*fp32" if n.startswith("p_") else "i32" for n in kernel.arg_names}
    types |= {"p_logits": f"*{dtype}", "p_label": "*i64"}
    report = compile_sm90(kernel, config.warps, {"BLOCK": config.block}, types)
    check(kernel, report, vocab)
    # 16 bytes a thread
    assert vocab == 301 or "ld.global.v4" in report["ptx"]


def test_label_terms():
    kernel = loss.add_label_terms_kernel
    types = dict.fromkeys(("p_sorted", "p_order", "p_end"), "*i64") | {"p_deferred": "*fp32"}
    types |= dict.fromkeys(("p_dweight", "p_hidden"), "*bf16") | dict.fromkeys(
        ("hidden_stride", "width", "vocab"), "i32"
    )
    check(kernel, compile_sm90(kernel, 4, {"ROWS": 8, "BLOCK": 1024}, types), 0)


def test_label_summary():
    kernel = loss.label_summary_kernel
    types = {
        "p_label": "*i64",
        "p_valid": "*i1",
        "p_inverse": "*fp32",
        "n": "i32",
        "vocab": "i32",
        "ignore_index": "i32",
    }
    check(kernel, compile_sm90(kernel, 8, {"BLOCK": 4096}, types), 0)


def attention_types(kernel, constexprs: dict) -> dict:
    types = {n: "*bf16" if n.startswith("p_") else "i32" for n in kernel.arg_names if n not in constexprs}
    types |= dict.fromkeys(("p_lse", "p_delta"), "*fp32") | dict.fromkeys(
        ("p_cu_q", "p_cu_k", "p_ranges", "p_seen_by"), "*i32"
    )
    return types | {"scale": "fp32"}


# causal, window, packed, ranges
MASKS = [
    (True, False, False, False),
    (False, False, False, True),
    (False, False, True, False),
    (True, True, True, False),
]


# all masks at the heads of text and vision; at others the one with the fewest values beside it and the one with the most
@pytest.mark.parametrize(
    ("dim", "causal", "window", "packed", "ranges"),
    [(dim, *mask) for dim, masks in ((64, MASKS), (128, MASKS), (80, MASKS[:2]), (256, MASKS[:2])) for mask in masks],
)
@pytest.mark.parametrize("name", ["fwd", "bwd_dkdv", "bwd_dq"])
def test_attention(name, dim, causal, window, packed, ranges):
    table = {"fwd": launchers.FORWARD, "bwd_dkdv": launchers.DKDV, "bwd_dq": launchers.DQ}[name]
    config = launchers.tile_config(table, dim, torch.bfloat16)
    kernel = getattr(launchers, f"attention_{name}_kernel")
    constexprs = {
        "GROUP": 4,
        "DIM": dim,
        "BLOCK_DIM": rms.next_power_of_2(dim),
        "BLOCK_Q": config.queries,
        "BLOCK_K": config.keys,
        "CAUSAL": causal,
        "WINDOW": window,
        "RANGES": ranges,
        "PACKED": packed,
        "PRECISION": "tf32",
    }
    report = compile_sm90(kernel, config.warps, constexprs, attention_types(kernel, constexprs), config.stages)
    check(kernel, report, dim)
    # C7511, C7512, C7515: the assembler made the tensor cores wait for each product
    assert not report["serialised"]
    # Triton 3.4 to 3.7.0 stores a transposed product wrongly
    assert "#linear" not in "".join(re.findall(r"ttg\.local_alloc.*", report["ttgir"]))
    if dim < 256:
        assert "wgmma.mma_async" in report["ptx"]


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("new", "window"), [(1, False), (4, True), (16, False)])
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_decode(new, window, dim, scaled):
    kernel, config = decode.attention_decode_kernel, decode.CONFIG
    constexprs = {"NEW": new, "GROUP": 4, "ROWS": max(16, 4 * new), "DIM": dim, "BLOCK_DIM": rms.next_power_of_2(dim)}
    constexprs |= {
        "BLOCK_K": config.keys,
        "WINDOW": window,
        "LENGTHS": not window,
        "RANGES": window,
        "SCALED": scaled,
        "MOVED": scaled,
        "PRECISION": "tf32",
        "OVERLAP": True,
    }
    types = attention_types(kernel, constexprs) | {"p_partial": "*fp32", "p_length": "*i64"}
    if scaled:
        types |= dict.fromkeys(("p_k", "p_v"), "*fp8e4nv") | dict.fromkeys(("p_k_scale", "p_v_scale"), "*fp32")
    stages = config.stages if dim <= 128 else decode.WIDE_STAGES
    warps = decode.warps_for(constexprs["BLOCK_DIM"], scaled)
    check(kernel, compile_sm90(kernel, warps, constexprs, types, stages), dim)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 80)])
def test_kv_write(heads, dim, scaled):
    kernel = kv_write.kv_write_kernel
    types = {n: "*bf16" if n.startswith("p_") else "i32" for n in kernel.arg_names} | {"p_rows": "*i64", "p_at": "*i64"}
    if scaled:
        types |= dict.fromkeys(("p_k_cache", "p_v_cache"), "*fp8e4nv")
        types |= dict.fromkeys(("p_k_scale", "p_v_scale"), "*fp32")
    constexprs = {"HEADS": heads, "DIM": dim, "BLOCK_HEADS": rms.next_power_of_2(heads)}
    constexprs |= {"BLOCK_DIM": rms.next_power_of_2(dim), "HAS_ROWS": True, "SCALED": scaled}
    report = compile_sm90(kernel, 4, constexprs | {"SMALLEST": kv_write.SMALLEST_SCALE, "OVERLAP": True}, types)
    check(kernel, report, 0)
    assert not scaled or "cvt.rn.satfinite.e4m3x2.f32" in report["ptx"]


@pytest.mark.parametrize("splits", [1, 64])
def test_attention_combine(splits):
    kernel = decode.attention_combine_kernel
    constexprs = {"NEW": 1, "DIM": 128, "BLOCK_DIM": 128, "BLOCK_SPLIT": splits, "OVERLAP": True}
    types = attention_types(kernel, constexprs) | {"p_partial": "*fp32"}
    check(kernel, compile_sm90(kernel, 4, constexprs, types), 128)


@pytest.mark.parametrize(
    ("name", "warps", "constexprs", "dtype"),
    [
        ("top", "warps", {"GROUP": 2048}, "fp32"),
        ("bins", "bins_warps", {"FIRST": True, "SPLITS": 64, "PIVOTS": 32, "GROUP": 2048, "BLOCK": 128}, "fp32"),
        ("bins", "bins_warps", {"FIRST": False, "SPLITS": 64, "PIVOTS": 32, "GROUP": 2048, "BLOCK": 128}, "fp32"),
        ("compact", "warps", {"SPLITS": 64, "PIVOTS": 32, "GROUP": 2048}, "fp32"),
        ("least", "least_warps", {"SPLITS": 64, "PIVOTS": 32, "WAYS": 32, "BLOCK": 256}, "fp32"),
        ("race", "warps", {"LANES": 512, "DRAWS": False, "FILTERS": False}, "fp32"),
        ("race", "warps", {"LANES": 512, "DRAWS": True, "FILTERS": True}, "fp32"),
        # all that another dtype of logits changes is their load
        ("race", "warps", {"LANES": 512, "DRAWS": True, "FILTERS": True}, "bf16"),
        ("pick", "warps", {"SPLITS": 64}, "fp32"),
    ],
    ids=str,
)
def test_sample(name, warps, constexprs, dtype):
    kernel = getattr(sampling, f"sample_{name}_kernel")
    types = {n: "*fp32" if n.startswith("p_") else "i32" for n in kernel.arg_names} | {"p_logits": f"*{dtype}"}
    types |= dict.fromkeys(("p_top_k", "p_seed", "p_step", "p_out"), "*i64")
    types |= dict.fromkeys(("p_id", "p_count", "p_last_count", "p_by_k"), "*i32")
    report = compile_sm90(kernel, getattr(sampling.CONFIG, warps), {**constexprs, "OVERLAP": True}, types)
    check(kernel, report, 0)


PRODUCTS = {
    "decode_linear": (decode_linear.decode_linear_kernel, 9216, {"RESIDUAL": True}),
    "decode_swiglu": (decode_swiglu.decode_swiglu_kernel, 3072, {}),
    "decode_qkv": (
        decode_qkv.decode_qkv_kernel,
        5120,
        {"Q_HEADS": 32, "K_HEADS": 8, "HALF": 64, "PARTS": 1, "HAS_SCALE": True, "CACHED": True},
    ),
}


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_decode_products(op, fp8, rows):
    kernel, width, constexprs = PRODUCTS[op]
    tables = vars(importlib.import_module(f"m3kernels.ops.{op}")).items()
    for tile in {t.choose(rows) for name, t in tables if isinstance(t, Tiles) and ("FP8" in name) == fp8}:
        constexprs = constexprs | {"K": width, "ROWS": rows, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns}
        constexprs |= {"STAGES": tile.stages, "NORM": True, "X_SCALE": 1.0}
        constexprs |= {"MOVED": fp8, "OVERLAP": True}
        types = {n: "*bf16" if n.startswith("p_") else "i32" for n in kernel.arg_names}
        types |= {n: "*fp32" for n in types if n.endswith("_scale") or n in ("p_cos", "p_sin")}
        types |= {n: "*i64" for n in ("p_position", "p_slot")} | {"eps": "fp32", "beta": "fp32"}
        if fp8:
            types |= {n: "*fp8e4nv" for n in types if n in ("p_w", "p_gate", "p_up") or n.endswith("_weight")}
        check(kernel, compile_sm90(kernel, tile.warps, constexprs | {"SCALED": 2 * fp8}, types), width)


def compile_gluon(kernel, constexprs: dict, types: dict, **options) -> dict:
    """As ``compile_sm90``, for a Gluon kernel."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constexprs else types.get(n, "i32") for n in names}
    aligned = [
        n for n in names if signature[n].startswith("*") or n.endswith("seq_stride") or n.endswith("head_stride")
    ]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if not n.startswith("lse")}
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        source = GluonASTSource(kernel, signature, constexprs, attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    text = log.getvalue()
    return {
        "shared": compiled.metadata.shared,
        "spilled": max(map(int, re.findall(r"(\d+) bytes spill stores", text)), default=0),
        "serialised": re.findall(r"\((C75\d+)\)", text),
        "ptx": compiled.asm["ptx"],
    }


def adapter_types(kernel, constexprs: dict, **other: str) -> dict:
    types = {n: "*bf16" if n.startswith("p_") else "i32" for n in kernel.arg_names if n not in constexprs}
    types |= dict.fromkeys(("dropout", "scale", "s1", "s2", "s3"), "fp32")
    return types | {"p_seed": "*i64", "p_arrived": "*i32", "p_work": "*i32"} | other


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def adapter_layout(rank: int, split: bool, count: int):
    wide, narrow = torch.empty(rank, 8), torch.empty(rank, 8, dtype=torch.bfloat16)
    return adapters.Layout.of(narrow, wide if split else narrow, count)


def skinny_report(kernel, config, form: dict, dtype: str, split: bool) -> dict:
    """A pass in Triton; adapters are fp32 where ``split``."""
    constexprs = form | {"OVERLAP": False}
    if kernel is adapter_kernels.lora_shrink_kernel:
        constexprs |= {"small_col" if form["SCALED"] else "small_row": 1}
    else:
        constexprs |= {"WITH_Y": True}
    of_adapters = [n for n in kernel.arg_names if n.startswith(("p_small", "p_other", "p_d"))] * split
    types = adapter_types(kernel, constexprs, **dict.fromkeys(["p_scale", "p_slabs", *of_adapters], "*fp32"))
    types |= dict.fromkeys([n for n in kernel.arg_names if n.startswith(("factor", "other"))], "fp32")
    types = {n: "*fp32" if t == "*bf16" and dtype == "fp32" else t for n, t in types.items() if n in kernel.arg_names}
    return compile_sm90(kernel, config.warps, constexprs, types, config.stages)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rank", [16, adapters.MOST_AT_ONCE])
@pytest.mark.parametrize("split", [False, True])
def test_adapter_passes(rank, split, count):
    """Their loads run ahead of their use: without that the rate of memory is not reached."""
    layout = adapter_layout(rank, split, count)
    passes = [
        (adapter_kernels.lora_shrink_kernel, adapters.shrink_form(layout, True, False, 0.0, torch.bfloat16)),
        (adapter_kernels.lora_shrink_kernel, adapters.shrink_form(layout, False, True, 0.0, torch.bfloat16)),
        (adapter_kernels.lora_outer_kernel, adapters.outer_form(layout, True, 0.0, torch.bfloat16)),
    ]
    for kernel, form in passes:
        report = skinny_report(kernel, *form, "bf16", split)
        check(kernel, report, rank * count)
        assert "cp.async" in report["ptx"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradient_of_a_for_the_largest_rank(count):
    kernel, layout = adapter_kernels.lora_outer_kernel, adapter_layout(adapters.MOST_OF_DA, False, count)
    config, form = adapters.outer_form(layout, False, 0.0, torch.bfloat16, adapters.MOST_OF_DA)
    constexprs = form | {"WITH_Y": False, "OVERLAP": True}
    types = adapter_types(kernel, constexprs, p_slabs="*fp32", p_scale="*fp32")
    check(kernel, compile_sm90(kernel, config.warps, constexprs, types, config.stages), count * layout.rank)


@pytest.mark.parametrize("rank", [16, adapters.MOST_AT_ONCE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_passes_with_dropout(rank, dtype):
    split = dtype == "bf16"
    layout = adapter_layout(rank, split, 3)
    for kernel, form in (
        (adapter_kernels.lora_shrink_kernel, adapters.shrink_form(layout, True, False, 0.5, DTYPES[dtype])),
        (adapter_kernels.lora_outer_kernel, adapters.outer_form(layout, False, 0.5, DTYPES[dtype])),
    ):
        check(kernel, skinny_report(kernel, *form, dtype, split), rank * 3)


@pytest.mark.parametrize("split", [False, True])
def test_adapter_parts(split):
    """Also each branch's types: the interpreter lets a name have one in each."""
    of_adapters = "*fp32" if split else "*bf16"
    kernel, constexprs = adapter_sums.lora_parts_kernel, {"SPLIT": split, "OVERLAP": False}
    given = [n for n in kernel.arg_names if re.fullmatch(r"p_[ab]\d", n)]
    types = adapter_types(kernel, constexprs, **dict.fromkeys(given, of_adapters))
    check(kernel, compile_sm90(kernel, 4, constexprs, types), 0)


@pytest.mark.parametrize(("rank", "split", "at_once"), [
    (16, False, True), (16, False, False), (16, True, True), (32, False, False),
])  # fmt: skip
def test_dora_norm(rank, split, at_once):
    """W's own loads run ahead where one tile of A and B is all."""
    kernel = dora.dora_norm_kernel
    constexprs = {
        "BLOCK_N": dora.BLOCK_N,
        "BLOCK_K": dora.BLOCK_K,
        "BLOCK_R": rank,
        "AT_ONCE": at_once,
        "SPLIT": split,
        "PRECISION": "tf32",
        "STAGES": dora.STAGES,
        "OVERLAP": True,
    }
    of_adapters = dict.fromkeys([f"p_{n}{j}" for n in "abm" for j in (1, 2, 3)], "*fp32" if split else "*bf16")
    of_adapters |= dict.fromkeys(("p_squares", "p_norm", "p_scale"), "*fp32")
    types = adapter_types(kernel, constexprs, **of_adapters)
    report = compile_sm90(kernel, 4, constexprs, types)
    check(kernel, report, rank)
    tile = 2 * dora.BLOCK_N * dora.BLOCK_K
    assert "cp.async" in report["ptx"]
    ahead = report["shared"] >= (dora.STAGES - 1) * tile
    assert ahead or not at_once
    if rank == 16 and not split:  # the tiles of larger adapters are as large
        assert ahead == at_once


def test_lora_expand_and_dora_gradient():
    kernel, constexprs = (
        adapter_kernels.lora_expand_kernel,
        {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_R": 64, "ADDS": True},
    )
    constexprs |= {"PRECISION": "tf32"}
    check(kernel, compile_sm90(kernel, 8, constexprs, adapter_types(kernel, constexprs)), 64)
    kernel, constexprs = adapter_sums.dora_grad_kernel, {"BLOCK_M": sums.DORA_ROWS, "BLOCK_N": sums.DORA_COLS}
    constexprs |= {"BY_SCALE": True, "OVERLAP": True}
    types = adapter_types(kernel, constexprs, **dict.fromkeys(("p_norm", "p_scale", "p_sum", "p_dm"), "*fp32"))
    check(kernel, compile_sm90(kernel, 4, constexprs, types), sums.DORA_COLS)


HOPPER = [(True, False, False), (False, False, False), (True, True, False), (True, False, True), (True, True, True)]
needs_its_gluon = pytest.mark.skipif(
    not HAS_TRITON or not metadata.version("triton").startswith(MEASURED_WITH),
    reason=f"Gluon of triton {MEASURED_WITH}x",
)


@needs_its_gluon
@pytest.mark.parametrize(("causal", "window", "packed"), HOPPER)
def test_attention_hopper_forward(causal, window, packed):
    module = importlib.import_module("m3kernels.ops._attention_hopper_fwd")
    kernel = module.attention_fwd_hopper_kernel
    types = {n: "*bf16" for n in ("p_q", "p_k", "p_v", "p_out")} | {"p_lse": "*fp32", "scale": "fp32"}
    types |= {"p_cu_q": "*i32", "p_cu_k": "*i32"}
    constexprs = {"GROUP": 4, "DIM": 128, "CAUSAL": causal, "WINDOW": window, "PACKED": packed}
    report = compile_gluon(kernel, constexprs, types, num_warps=4)
    assert report["shared"] <= SHARED_MEMORY and not report["serialised"]
    # without a causal mask and at the entry of tiles; 0 in most forms
    assert report["spilled"] <= 172
    assert "wgmma.mma_async" in report["ptx"] and "setmaxnreg" in report["ptx"]


@needs_its_gluon
@pytest.mark.parametrize(("causal", "window", "packed"), HOPPER)
def test_attention_hopper_backward(causal, window, packed):
    module = importlib.import_module("m3kernels.ops._attention_hopper_bwd")
    kernel, rows = module.attention_bwd_hopper_kernel, module.ROWS.value
    types = {n: f"tensordesc<bf16[1,1,64,128],{rows!r}>" for n in ("d_q", "d_dout")}
    types |= {n: f"tensordesc<bf16[1,1,128,128],{rows!r}>" for n in ("d_k", "d_v")}
    types |= dict.fromkeys(("p_lse", "p_delta", "p_dq"), "*fp32") | dict.fromkeys(("p_dk", "p_dv"), "*bf16")
    types |= {"p_cu_q": "*i32", "p_cu_k": "*i32", "scale": "fp32"}
    constexprs = {"GROUP": 4, "CAUSAL": causal, "WINDOW": window, "PACKED": packed, "STAGES": module.STAGES}
    report = compile_gluon(kernel, constexprs, types, num_warps=4, maxnreg=168)
    assert report["shared"] <= SHARED_MEMORY and not report["serialised"]
    # in the masked loops only; measured as it is (docs/attention.md)
    assert report["spilled"] <= (700 if window else 320)
    # dq is added 16 bytes at a time
    assert "add.v4.f32" in report["ptx"]


def described(rows: int, columns: int, layout) -> str:
    return f"tensordesc<bf16[{rows},{columns}],{getattr(layout, 'value', layout)!r}>"


def check_gluon(kernel, constexprs: dict, types: dict, registers: int = 168, spills: int = 0) -> str:
    report = compile_gluon(kernel, constexprs, types, num_warps=4, maxnreg=registers)
    assert report["shared"] <= SHARED_MEMORY and not report["serialised"] and report["spilled"] <= spills
    assert "wgmma.mma_async" in report["ptx"] and "setmaxnreg" in report["ptx"]
    return report["ptx"]


@needs_its_gluon
@pytest.mark.parametrize(("across", "scaled", "count", "beside", "cut"), [
    (False, False, 1, False, False), (False, True, 2, False, False), (True, False, 3, False, False),
    (False, False, 1, True, False), (False, True, 3, True, False), (True, False, 1, True, False), (True, False, 3, True, False),
    (True, False, 1, True, True), (True, False, 2, True, True), (True, False, 3, True, True),
])  # fmt: skip
def test_linear_hopper(across, scaled, count, beside, cut):
    module = importlib.import_module("m3kernels.ops._linear_hopper")
    kernel, left = module.linear_low_rank_kernel, described(64, 64, module.A_TILE)
    right = described(64, 256, module.B_TILE_ACROSS) if across else described(256, 64, module.B_TILE)
    types = dict.fromkeys(kernel.arg_names, "i32") | {"p_scale": "*fp32", "p_shares": "*fp32", "p_work": "*i32"}
    types |= {n: left for n in types if n.startswith(("d_a", "d_t"))}
    types |= {n: right for n in types if n.startswith(("d_b", "d_low"))}
    types |= {n: described(64, 64, module.B_TILE_ACROSS) for n in types if n.startswith("d_out")}
    constexprs = {"ACROSS": across, "COUNT": count, "SCALED": scaled, "OVERLAP": True, "BESIDE": beside, "CUT": cut}
    ptx = check_gluon(kernel, constexprs, types)
    assert "griddepcontrol.wait" in ptx
    # what another kernel stores while this one runs is ordered before the copy engine reads it
    assert ("acquire" in ptx and "fence.proxy.async.global" in ptx) == beside


@needs_its_gluon
@pytest.mark.parametrize(("rank", "split", "blocks", "x_blocks", "scaled", "shared", "spills"), [
    (16, False, 16, 4, False, False, 24), (16, True, 12, 2, True, True, 24), (32, True, 8, 0, True, False, 16),
    (64, False, 4, 0, False, True, 8),
])  # fmt: skip
def test_lora_dy_hopper(rank, split, blocks, x_blocks, scaled, shared, spills):
    module = importlib.import_module("m3kernels.ops._lora_dy_launch")
    kernel, form = module.lora_dy_kernel, module.Form.of(adapter_layout(rank, split, 3), blocks, x_blocks)
    t_tile, b_tile = form.tiles()
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("p_part", "p_scale"), "*fp32")
    types |= dict.fromkeys(("s1", "s2", "s3"), "fp32") | dict.fromkeys(("p_work", "p_arrived"), "*i32")
    types |= {"p_du": "*bf16", "p_db": "*fp32" if split else "*bf16"}
    for j in (1, 2, 3):
        types |= dict.fromkeys((f"d_hi{j}", f"d_lo{j}"), described(64, rank, t_tile))
        types |= {f"d_y{j}": described(64, 128, module.Y_TILE), f"p_b{j}": "*fp32" if split else "*bf16"}
    types |= {"d_x": types["d_y1"], "d_du": types["d_hi1"], "p_da": types["p_db"]}
    constexprs = {
        "RANK": rank,
        "BLOCKS": blocks,
        "X_BLOCKS": x_blocks,
        "JOINT": 3,
        "PARTS": 1 + split,
        "SCALED": scaled,
        "SHARED": shared,
    }
    constexprs |= {"STAGES": form.stages, "T_STAGES": form.t_stages}
    ptx = check_gluon(kernel, constexprs | {"T_TILE": t_tile, "B_TILE": b_tile}, types, 128, spills)
    assert "release" in ptx and "acquire" in ptx


@needs_its_gluon
@pytest.mark.parametrize(("rank", "count", "split", "spills"), [
    (16, 1, False, 0), (16, 3, True, 0), (64, 3, False, 140), (64, 2, True, 200),
])  # fmt: skip
def test_lora_x_hopper(rank, count, split, spills):
    """Spills are where a tile is stored, once for thousands of products."""
    module = importlib.import_module("m3kernels.ops._lora_x_hopper")
    layout = adapter_layout(rank, split, count)
    form, kernel = module.Form.of(layout), module.lora_x_kernel
    x_tile, a_tile, rest_tile = form.layouts()
    types = dict.fromkeys(kernel.arg_names, "i32") | {"p_t": "*bf16", "p_work": "*i32"}
    types |= {"d_x": described(64, form.k, x_tile)}
    types |= dict.fromkeys(("d_a_hi", "d_a_lo"), described(form.tile, form.k, a_tile))
    types |= {"d_rest": described(form.rest or form.tile, form.k, rest_tile)}
    constexprs = {
        "RANK": rank,
        "PADDED": layout.padded,
        "COLUMNS": form.tile,
        "REST": form.rest,
        "PARTS": 1 + split,
        "STAGES": form.stages,
    }
    ptx = check_gluon(
        kernel, constexprs | {"X_TILE": x_tile, "A_TILE": a_tile, "REST_TILE": rest_tile}, types, spills=spills
    )
    assert "griddepcontrol.wait" in ptx and "release" in ptx


def test_the_check_fails_for_a_configuration_that_spills():
    """A row of 65,536 with 4 warps cannot stay in registers: were the check blind, this would pass."""
    types = dict.fromkeys(("p_x", "p_residual", "p_weight", "p_y", "p_summed"), "*bf16")
    types |= {"p_rstd": "*fp32", "x_stride": "i32", "residual_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    constexprs = {"WIDTH": 65_536, "BLOCK": 65_536, "ROWS": 1, "HAS_RESIDUAL": False}
    report = compile_sm90(rms.rms_norm_fwd_kernel, 4, constexprs, types)
    if not metadata.version("triton").startswith(MEASURED_WITH):
        pytest.skip(f"spills are held for triton {MEASURED_WITH}x")
    with pytest.raises(AssertionError):
        check(rms.rms_norm_fwd_kernel, report, 4096)
