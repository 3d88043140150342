"""Rows of every kind and result files, as small as the reports and comparisons of them need."""

import json
from pathlib import Path


def op_row(peer: str, ms: float | None, *, op="rms_norm", label="8192x4096", direction="forward", **other) -> dict:
    row = {"kind": "row", "op": op, "label": label, "direction": direction, "peer": peer, "status": "ok", "reason": ""}
    row |= {"graph_ms": ms, "python_ms": None if ms is None else 2 * ms, "peak_bytes": None, "limit_ms": 0.03}
    return row | {"percent_of_limit": None if ms is None else 3 / ms} | other


def timed_row(peer: str, ms: float, spread: float = 0.01, **other) -> dict:
    """An op's row as the benchmark writes it, with both clocks' spread."""
    row = op_row(peer, ms, peak_bytes=64 << 20, error_over_eager=1.0, host_us=30.0, bytes=134225920, flops=0)
    row |= {"graph_p20": ms * (1 - spread), "graph_p80": ms * (1 + spread), "graph_reason": None, "overwrites": []}
    return row | {"python_p20": 1.9 * ms, "python_p80": 2.2 * ms} | other


def host_row(peer: str, us: float | None, *, what="rms_norm", which="forward", **other) -> dict:
    row = {"kind": "host", "what": what, "pass": which, "peer": peer, "status": "ok", "reason": "", "us": us}
    return row | {"p20": us and 0.9 * us, "p80": us and 1.1 * us, "samples": 21} | other


def train_row(peer: str, ms: float | None, *, mode="full", seq=4096, **other) -> dict:
    """84 TFLOP a step, so 120 ms at 700 TFLOP/s."""
    row = {"kind": "train", "size": "3b", "modality": "text", "mode": mode, "seq": seq, "batch": 1}
    row |= {"recompute": seq > 4096, "peer": peer, "status": "ok", "reason": "", "ms": ms, "p20": None, "p80": None}
    row |= {"samples": 5, "tokens_per_s": ms and 1e3 * seq / ms, "flops": 8.4e13, "mfu": ms and 120 / ms}
    row |= {"peak_gib": 20.0, "weights_gib": 6.4, "attention": "sdpa (cudnn)", "loss": 11.9, "loss_error": 1e-4}
    return row | {"grad_norm_error": None, "bound": {"loss": 2e-3, "grad_norm": 2e-2}} | other


def decode_row(peer: str, ms: float | None, *, batch=1, prompt=512, **other) -> dict:
    row = {"kind": "decode", "size": "3b", "batch": batch, "prompt": prompt, "new_tokens": 64, "peer": peer}
    row |= {"status": "ok", "reason": "", "ms_per_token": ms, "p20": ms and 0.99 * ms, "p80": ms and 1.01 * ms}
    row |= {"samples": 5, "ttft_ms": None, "tokens_per_s": ms and 1e3 * batch / ms, "bytes_per_token": 6.86e9}
    row |= {"bandwidth_share": ms and 2.3 / ms, "peak_gib": 7.0, "logits_error": 2e-3, "argmax_agreement": 1.0}
    return row | {"bound": {"logits": 1e-2}} | other


def write_file(folder: Path, rows: list[dict], name="nvidia-h200/2026-08-01-abc.jsonl", **other) -> Path:
    head = {
        "kind": "header",
        "date": "2026-08-01T10:00:00+00:00",
        "gpu": "NVIDIA H200",
        "driver": "580",
        "commit": "abc",
    }
    head |= {"versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}, "quick": False}
    head |= {"peers": {"liger": "0.8.5", "quack": "missing: quack-kernels is not installed"}}
    head |= {"ceilings": {"copy_bytes_s": 4.3e12, "gemm_flops_s": {"8192x4096x131072": 7e14}}} | other
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in [head, *rows]) + "\n")
    return path
