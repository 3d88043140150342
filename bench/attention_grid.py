"""Attention's backends over lengths, masks and directions on this GPU: ``python -m m3kernels.bench.attention_grid OUT.json``.

Writes every median, and the order of backends that :mod:`m3kernels.ops._attention_backends` chooses by: copy the file's
``table`` to ``m3kernels/ops/attention_table.json``. A result further than ``APART`` from FlashAttention-2's is not timed.
"""

import json
import statistics
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from m3kernels.ops._attention_backends import BACKENDS, Problem, mask_kind

APART = 0.01
SEQS = (4096, 16_384, 65_536)
# shares of eight packed documents
DOCUMENTS = (3, 1, 7, 2, 5, 4, 6, 4)
IMAGES = (1024, 2500, 4096, 700, 3600, 1900, 2304, 256)


def _lengths(total: int) -> list[int]:
    lengths = [total * share // sum(DOCUMENTS) for share in DOCUMENTS]
    return [*lengths[:-1], total - sum(lengths[:-1])]


def _problem(lengths: list[int] | None, seq: int, causal: bool, window: int, dim: int) -> Problem:
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    longest = seq if lengths is None else max(lengths)
    return Problem(cu, cu, None, longest, longest, causal, window, dim**-0.5, False)


def cells():
    """(name, seq, batch, heads, kv_heads, head_dim, problem, pairs of query and key that are seen)"""
    for seq in SEQS:
        batch = max(1, 16_384 // seq)
        yield f"causal {seq}", seq, batch, 32, 8, 128, _problem(None, seq, True, 0, 128), batch * seq * seq / 2
        lengths = _lengths(batch * seq)
        pairs = sum(n * n for n in lengths) / 2
        yield f"packed {seq}", batch * seq, 1, 32, 8, 128, _problem(lengths, seq, True, 0, 128), pairs
        w = min(4096, seq // 2)
        yield f"window {seq}", seq, batch, 32, 8, 128, _problem(None, seq, True, w, 128), batch * (seq * w - w * w / 2)
    pairs = sum(n * n for n in IMAGES)
    yield "images", sum(IMAGES), 1, 16, 16, 64, _problem(list(IMAGES), 0, False, 0, 64), pairs


def _apart(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def _timed(run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def measure(runs: dict, seconds: float = 0.15) -> dict[str, float]:
    """Median milliseconds of each, in turns, one behind the other so that the host's work is hidden."""
    for run in runs.values():
        run()
    warm = [_timed(run) for run in runs.values()]
    torch.cuda.synchronize()
    slowest = max(start.elapsed_time(end) for start, end in warm)
    rounds = [
        {name: _timed(run) for name, run in runs.items()} for _ in range(max(5, min(20, int(1e3 * seconds / slowest))))
    ]
    torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in (r[name] for r in rounds)) for name in runs}


def run_cell(seq: int, batch: int, heads: int, kv_heads: int, dim: int, problem: Problem) -> dict[str, dict]:
    """direction -> backend -> milliseconds, or why there are none."""
    make = lambda n: torch.randn(batch, seq, n, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    q, k, v, dout = make(heads), make(kv_heads), make(kv_heads), make(heads)
    out, lse = BACKENDS["flash"].forward(q, k, v, problem)
    right = {"forward": (out,), "backward": BACKENDS["flash"].backward(dout, q, k, v, out, lse, problem)}
    found: dict[str, dict] = {}
    for direction in right:
        runs, found[direction] = {}, {}
        for name, backend in BACKENDS.items():
            reason = backend.missing(q.device) or backend.cannot(direction, q, k, problem)
            if not reason:
                given = (q, k, v, problem) if direction == "forward" else (dout, q, k, v, out, lse, problem)
                call = getattr(backend, direction)
                try:
                    results = call(*given)[: 1 if direction == "forward" else 3]
                    worst = max(_apart(a, b) for a, b in zip(results, right[direction]))
                    reason = "" if worst <= APART else f"WRONG: {worst:.2g} from FlashAttention-2"
                except Exception as error:  # a backend's failure is a result
                    reason = f"{type(error).__name__}: {str(error)[:200]}"
            if reason:
                found[direction][name] = reason
            else:
                runs[name] = lambda call=call, given=given: call(*given)
        found[direction] |= measure(runs)
    return found


def main(path: str) -> None:
    torch.manual_seed(0)
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    rows, table = [], []
    for name, seq, batch, heads, kv_heads, dim, problem, pairs in tqdm([*cells()], desc="attention"):
        found = run_cell(seq, batch, heads, kv_heads, dim, problem)
        shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
        rows.append({"case": name, **shape, "pairs": pairs, "ms": found})
        order = {
            d: [*sorted((b for b, ms in f.items() if not isinstance(ms, str)), key=f.get)] for d, f in found.items()
        }
        table.append(
            {"capability": capability, "mask": mask_kind(problem), "head_dim": dim, "seq": problem.longest_k, **order}
        )
        for direction, products in (("forward", 2), ("backward", 5)):
            flops = products * 2 * pairs * heads * dim
            said = {b: f"{flops / ms / 1e9:.0f}" for b, ms in found[direction].items() if not isinstance(ms, str)}
            print(f"{name} {direction}, TFLOP/s: {said}", flush=True)
        torch.cuda.empty_cache()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    with open(path, "w") as file:
        json.dump({"machine": machine, "rows": rows, "table": table}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
