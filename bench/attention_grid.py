"""Attention's backends over lengths, masks and directions on this GPU.

    python -m m3kernels.bench.attention_grid [OUT.json]     measure; default: bench/results/<gpu>/<date>-<commit>-attention.json
    python -m m3kernels.bench.attention_grid --show FILE    its tables, which m3kernels bench report puts into docs/attention.md

Every backend's median, then ``auto`` (the public function) beside the other libraries in turns, with and without
flash-attn-4; decoding; and packed documents and images beside SDPA with the dense mask that transformers gives it. The file's
``table`` is the order that :mod:`m3kernels.ops._attention_backends` chooses by: copy it to
``m3kernels/ops/attention_table.json``. A result further than ``APART`` from FlashAttention-2's is not timed.
"""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from m3kernels.bench import measure, results
from m3kernels.ops import _attention_backends as backends
from m3kernels.ops._attention_backends import BACKENDS, CUDNN_AFTER, Problem, mask_kind
from m3kernels.ops.attention import attention
from m3kernels.ops.attention_decode import attention_decode

APART = 0.01
SEQS = (4096, 16_384, 65_536)
# shares of eight packed documents
DOCUMENTS = (3, 1, 7, 2, 5, 4, 6, 4)
IMAGES = (1024, 2500, 4096, 700, 3600, 1900, 2304, 256)
# (batch, keys) of decoding one token
CACHES = ((1, 4096), (1, 32_768), (1, 262_144), (16, 4096), (64, 4096))
LIBRARIES = ("flash", "cudnn", "fa4")
PRODUCTS = {"forward": 2, "backward": 5}


@dataclass(frozen=True)
class Cell:
    """One case; ``lengths``: of packed sequences, ``window``: 0 for none."""

    name: str
    batch: int
    seq: int
    lengths: tuple[int, ...] = ()
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    causal: bool = True
    window: int = 0

    @functools.cached_property
    def cu_seqlens(self) -> Tensor | None:
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return ends.to("cuda", torch.int32) if self.lengths else None

    @property
    def longest(self) -> int:
        return max(self.lengths, default=self.seq)

    @property
    def problem(self) -> Problem:
        cu = self.cu_seqlens
        return Problem(cu, cu, None, self.longest, self.longest, self.causal, self.window, self.dim**-0.5, False)

    @property
    def pairs(self) -> float:
        """Pairs of query and key that are seen."""
        if self.window:
            return self.batch * (self.seq * self.window - self.window**2 / 2)
        square = sum(n * n for n in self.lengths) if self.lengths else self.batch * self.seq**2
        return square / 2 if self.causal else square

    def tensors(self) -> list[Tensor]:
        """q, k, v and out's gradient, (B, H, S, D) views of (B, S, H, D) memory."""
        shape = lambda n: (self.batch, self.seq, n, self.dim)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [torch.randn(shape(n), device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in counts]

    def tflops(self, direction: str, ms: float) -> float:
        return PRODUCTS[direction] * 2 * self.pairs * self.heads * self.dim / ms / 1e9


def _documents(total: int) -> tuple[int, ...]:
    lengths = [total * share // sum(DOCUMENTS) for share in DOCUMENTS]
    return *lengths[:-1], total - sum(lengths[:-1])


def cells() -> list[Cell]:
    found = []
    for seq in SEQS:
        batch = max(1, 16_384 // seq)
        found += [
            Cell(f"causal {seq}", batch, seq),
            Cell(f"packed, 8 documents of {batch * seq}", 1, batch * seq, _documents(batch * seq)),
            Cell(f"window {min(4096, seq // 2)} at {seq}", batch, seq, window=min(4096, seq // 2)),
        ]
    images = Cell("images", 1, sum(IMAGES), IMAGES, heads=16, kv_heads=16, dim=64, causal=False)
    # the packing of 4k and that of 16k are one case: the shorter batch has as many tokens
    return [*dict.fromkeys([*found, images])]


DENSE = (
    Cell("packed, 8 documents of 1,024", 1, 8192, (1024,) * 8),
    Cell("8 images of different sizes", 1, sum(IMAGES), IMAGES, heads=16, kv_heads=16, dim=64, causal=False),
)


def _timed(run: Callable) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def medians(runs: dict[str, Callable], seconds: float = 0.15) -> dict[str, float]:
    """Median milliseconds of each, in turns, one behind the other so that the host's work is hidden."""
    for run in runs.values():
        run()
    warm = [_timed(run) for run in runs.values()]
    torch.cuda.synchronize()
    slowest = max(start.elapsed_time(end) for start, end in warm)
    events = [
        (name, _timed(runs[name])) for name in measure.turns(runs, max(12, min(20, int(1e3 * seconds / slowest))))
    ]
    torch.cuda.synchronize()
    return {n: statistics.median(s.elapsed_time(e) for name, (s, e) in events if name == n) for n in runs}


def _apart(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def backends_of(cell: Cell) -> tuple[dict[str, dict[str, Callable]], dict[str, dict[str, str]]]:
    """direction -> backend -> its call, and -> why there is none. Results are compared with FlashAttention-2's first."""
    problem, (q, k, v, dout) = cell.problem, cell.tensors()
    out, lse = BACKENDS["flash"].forward(q, k, v, problem)
    right = {"forward": (out,), "backward": BACKENDS["flash"].backward(dout, q, k, v, out, lse, problem)}
    runs, reasons = {d: {} for d in right}, {d: {} for d in right}
    for direction in right:
        given = (q, k, v, problem) if direction == "forward" else (dout, q, k, v, out, lse, problem)
        for name, backend in BACKENDS.items():
            reason = backend.missing(q.device) or backend.cannot(direction, q, k, problem)
            if not reason:
                call = functools.partial(getattr(backend, direction), *given)
                try:
                    worst = max(_apart(a, b) for a, b in zip(call(), right[direction]))
                    reason = "" if worst <= APART else f"WRONG: {worst:.2g} from FlashAttention-2"
                    runs[direction][name] = call
                except Exception as error:  # a backend's failure is a result
                    reason = measure.reason(error)
            if reason:
                runs[direction].pop(name, None)
                reasons[direction][name] = reason
    return runs, reasons


def _public(cell: Cell) -> dict[str, Callable]:
    """Both directions of :func:`attention`, asked often enough that cuDNN is considered."""
    *leaves, dout = cell.tensors()
    leaves = [t.requires_grad_() for t in leaves]
    options = {"causal": cell.causal, "window": cell.window or None}
    if cell.lengths:
        options |= {"cu_seqlens_q": cell.cu_seqlens, "max_seqlen_q": cell.longest, "max_seqlen_k": cell.longest}
    call = functools.partial(attention, *leaves, **options, deterministic=False)
    out = call()
    backward = functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
    for _ in range(CUDNN_AFTER):
        call(), backward()
    return {"forward": call, "backward": backward}


def auto_beside(cell: Cell, runs: dict[str, dict[str, Callable]], without_fa4: bool) -> dict[str, dict[str, float]]:
    """direction -> milliseconds of ``auto`` and of the libraries, in one run."""
    fa4 = BACKENDS["fa4"]
    if without_fa4:
        BACKENDS["fa4"] = dataclasses.replace(fa4, missing=lambda device: "left out")
    try:
        public = _public(cell)
        return {
            d: medians(
                {"auto": public[d]}
                | {n: r for n, r in runs[d].items() if n in LIBRARIES and not (without_fa4 and n == "fa4")}
            )
            for d in runs
        }
    finally:
        BACKENDS["fa4"] = fa4


def decoding(gpu: measure.Gpu) -> list[dict]:
    """One new token over a full bf16 cache, 32/8 heads x 128: device time in a graph, and the rate at which the cache is read."""
    rows = []
    for batch, keys in tqdm(CACHES, desc="decoding"):
        q = torch.randn(batch, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, 8, keys, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
        right = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True)
        worst = _apart(attention_decode(q, k, v, lengths), right)
        trials = {
            "m3kernels": measure.Trial(lambda q=q, k=k, v=v, n=lengths: attention_decode(q, k, v, n)),
            "sdpa": measure.Trial(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        }
        timed = gpu.time_graphs(trials, measure.Budget(0.1, 3))
        row = {"batch": batch, "keys": keys, "bytes": 2 * k.numel() * 2, "apart": worst}
        rows.append(row | {"ms": {n: s if isinstance(s, str) else s.median for n, s in timed.items()}})
        if worst > APART:
            rows[-1]["ms"]["m3kernels"] = f"WRONG: {worst:.2g} apart"
    return rows


def _dense_mask(cell: Cell) -> Tensor:
    """(1, 1, S, S), as transformers makes it: additive for the Pixtral tower, boolean for packed text."""
    document = torch.repeat_interleave(torch.arange(len(cell.lengths)), torch.tensor(cell.lengths)).cuda()
    seen = document[:, None] == document[None, :]
    if cell.causal:
        return seen.tril()[None, None]
    low = torch.finfo(torch.bfloat16).min
    return torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill(~seen, low)[None, None]


def beside_dense(cell: Cell) -> dict[str, dict[str, float]]:
    """direction -> milliseconds of ours and of SDPA with a dense mask over keys and values that are repeated for each head."""
    q, k, v, dout = cell.tensors()
    leaves, mask, group = [t.requires_grad_() for t in (q, k, v)], _dense_mask(cell), cell.heads // cell.kv_heads

    def dense() -> Tensor:
        keys, values = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in leaves[1:])
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    ours, theirs = _public(cell), dense()
    grad = functools.partial(torch.autograd.grad, theirs, leaves, dout, retain_graph=True)
    return {
        "forward": medians({"m3kernels": ours["forward"], "sdpa, dense mask": dense}),
        "backward": medians({"m3kernels": ours["backward"], "sdpa, dense mask": grad}),
    }


def run(path: Path | None) -> Path:
    """Measures everything; the file is rewritten after every cell, so that a run that is cut keeps what it has."""
    torch.manual_seed(0)
    gpu = measure.Gpu(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(gpu.stream):
        head = results.header(gpu.device, gpu.ceilings(), False, ["attention"])
        path = path or results.default_path(head, ".json")
        found = {"machine": head, "rows": [], "decode": decoding(gpu), "dense": [], "table": []}
    backends.table = lambda: found["table"]
    for cell in tqdm(cells(), desc="attention"):
        runs, reasons = backends_of(cell)
        ms = {d: medians(runs[d]) for d in runs}
        order = {d: sorted(ms[d], key=ms[d].get) for d in runs}
        found["table"].append(
            {
                "capability": head["capability"],
                "mask": mask_kind(cell.problem),
                "head_dim": cell.dim,
                "seq": cell.longest,
            }
            | order
        )
        backends.ranking.cache_clear()
        row = dataclasses.asdict(cell) | {"pairs": cell.pairs, "ms": ms, "reasons": reasons}
        row |= {"auto": auto_beside(cell, runs, False), "auto without fa4": auto_beside(cell, runs, True)}
        found["rows"].append(row)
        for d in runs:
            print(f"{cell.name} {d}, TFLOP/s: " + ", ".join(f"{n} {cell.tflops(d, t):.0f}" for n, t in ms[d].items()))
        path.write_text(json.dumps(found, indent=1) + "\n")
        torch.cuda.empty_cache()
    for cell in DENSE:
        found["dense"].append(dataclasses.asdict(cell) | {"ms": beside_dense(cell)})
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(show(found))
    return path


def _cell(row: dict) -> Cell:
    names = [field.name for field in dataclasses.fields(Cell)]
    return Cell(**{n: tuple(row[n]) if n == "lengths" else row[n] for n in names})


def over_best(ms: dict[str, float]) -> float:
    """The time of ``auto`` over the fastest library's."""
    return ms["auto"] / min(t for n, t in ms.items() if n != "auto")


def show(found: dict) -> str:
    """The file's tables in Markdown."""
    lines = ["| | " + " | ".join(BACKENDS) + " | auto / best library | the same without FA4 |", "|---" * 8 + "|"]
    for row in found["rows"]:
        cell, rates = _cell(row), []
        for name in BACKENDS:
            both = [row["ms"][d].get(name) for d in PRODUCTS]
            rates.append(" / ".join("–" if t is None else f"{cell.tflops(d, t):.0f}" for d, t in zip(PRODUCTS, both)))
        ratios = [" / ".join(f"{over_best(row[k][d]):.2f}" for d in PRODUCTS) for k in ("auto", "auto without fa4")]
        lines.append(f"| {cell.name} | " + " | ".join([*rates, *ratios]) + " |")
    copy = found["machine"]["ceilings"]["copy_bytes_s"]
    lines += ["", f"A copy gave {copy / 1e12:.2f} TB/s in this run.", ""]
    lines += ["| decoding one token | µs | TB/s | of a copy | SDPA, µs |", "|---|---|---|---|---|"]
    for row in found["decode"]:
        ours, sdpa = (row["ms"][n] for n in ("m3kernels", "sdpa"))
        rate = None if isinstance(ours, str) else row["bytes"] / (1e-3 * ours)
        rates = "– | –" if rate is None else f"{rate / 1e12:.2f} | {100 * rate / copy:.0f} %"
        # no time: the reason
        times = [t if isinstance(t, str) else f"{1e3 * t:.1f}" for t in (ours, sdpa)]
        lines.append(f"| {row['batch']} x {row['keys']:,} keys | {times[0]} | {rates} | {times[1]} |")
    lines += ["", "| beside SDPA with a dense mask, ms | ours | SDPA | times as fast |", "|---|---|---|---|"]
    for row in found["dense"]:
        for direction, ms in row["ms"].items():
            ours, sdpa = ms["m3kernels"], ms["sdpa, dense mask"]
            lines.append(f"| {row['name']}, {direction} | {ours:.3f} | {sdpa:.3f} | {sdpa / ours:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--show"]:
        print(show(json.loads(Path(sys.argv[2]).read_text())))
    else:
        print("wrote", run(Path(sys.argv[1]) if sys.argv[1:] else None))
