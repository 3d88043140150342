"""The decode bench: generation of Ministral 3 at real shapes with random weights, beside its peers, checked first.

    python -m m3kernels.bench.decode [--size 3b 8b] [--peers NAME ...] [--quick] [--out FILE.jsonl] [--seconds N]

Time is read inside ``generate()``, by an event that a logits processor records after every forward: between two of them
lies one token of every row, with whatever host time the GPU waits for. Of our engine it is read between bursts of tokens
(bench/decode_engine.py). A cell without new tokens is the vision tower alone. A peer's logits, for tokens that are forced upon
all peers, must equal Hugging Face's before it is timed. Peers run one after another, since graphs and cache of a compiled
one stay in memory. Needs a CUDA GPU; without one it says so and exits 2.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from m3kernels.bench import decode_engine, measure, model_run
from m3kernels.bench.decode_cells import CELLS, Cell, make_images, make_tokens
from m3kernels.bench.decode_engine import Engine
from m3kernels.bench.model_run import FAILED, OK, SKIPPED, WRONG
from m3kernels.bench.model_shapes import PAD_TOKEN, SIZES, build, decode_bytes, weight_bytes
from m3kernels.bench.peers import OURS
from m3kernels.bench.train_peers import Part, become, ours, own_attributes

HF = "hf"
# logits of the prompt and of so many forced tokens are compared
FORCED = 8
# of the vision tower for each repeat
TOWER_CALLS = 5
# the first tokens of a compiled generate() record its CUDA graphs for the new cache
SETTLING = 4
# Measured on narrow models of 26 and 40 layers: two bf16 evaluations of the logits (hf with SDPA, hf with eager attention,
# a static cache, m3kernels) are up to 0.08 apart in the worst step; q scaled by 1.07 0.45, no rotary 1.4.
BOUND = 0.2
# weights of 3 bits behind the point are another model's; what this one may not be is unrelated: that is 1.4
FP8_BOUND = 0.6


@dataclass(frozen=True)
class Peer:
    """One way to generate.

    Attributes:
        parts: what a model is turned into.
        static: with a static cache, with which ``generate()`` itself compiles the decoding forward (reduce-overhead).
        engine: ours instead of ``generate()``.
        bound: of the logits' error; quantised weights are another model's.
    """

    parts: tuple[Part, ...] = ()
    static: bool = False
    engine: Engine | None = None
    bound: float = BOUND


PEERS: dict[str, Peer] = {
    HF: Peer(),
    "hf+compile": Peer(static=True),
    OURS: Peer((ours,)),
    f"{OURS}+compile": Peer((ours,), static=True),
    f"{OURS}+engine": Peer(engine=Engine()),
    f"{OURS}+engine+fp8": Peer(engine=Engine(fp8=True), bound=FP8_BOUND),
    f"{OURS}+engine+kv8": Peer(engine=Engine(kv_dtype="fp8"), bound=FP8_BOUND),
}


class Forced(LogitsProcessor):
    """Makes ``generate()`` take the given tokens (steps, batch), and keeps the first logits, fp32."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.logits, self.step = tokens, [], 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step <= FORCED:
            self.logits.append(scores.clone())
        forced = torch.full_like(scores, -math.inf).scatter_(1, self.tokens[self.step][:, None], 0.0)
        self.step += 1
        return forced


class Stopwatch(LogitsProcessor):
    """Marks the moment when each token's logits are there: on the GPU's clock, or on the host's without one."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.mark()

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.mark()
        return scores

    def intervals(self) -> list[float]:
        """Milliseconds: to the first token, then from each to the next."""
        if self.device.type != "cuda":
            return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:])]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]


@dataclass
class Entry:
    """One peer in one cell."""

    peer: str
    status: str = OK
    reason: str = ""
    logits: Tensor | None = None
    error: float | None = None
    agreement: float | None = None
    first: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    graphs: int | None = None
    skipped_graphs: int | None = None


def compile_counts() -> tuple[int, int]:
    """(graphs that dynamo has made, functions that inductor has refused a CUDA graph) so far in this process."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]


def generate(
    model: nn.Module, cell: Cell, prompt: Tensor, processor: LogitsProcessor, static: bool, pictures: dict[str, Tensor]
) -> None:
    """``cell.new_tokens`` tokens through transformers' own loop."""
    model.generate(
        prompt,
        **pictures,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=cell.new_tokens,
        do_sample=False,
        cache_implementation="static" if static else "dynamic",
        logits_processor=LogitsProcessorList([processor]),
        # one that is never drawn: the check for it is part of every real loop
        eos_token_id=model.config.get_text_config().vocab_size,
        pad_token_id=PAD_TOKEN,
    )


@torch.no_grad()
def run_tower(me: Entry, cell: Cell, model: nn.Module, truth: Tensor | None, repeats: int) -> None:
    """The images' features by ``get_image_features``, or by our own model's tower, in place of logits and tokens."""
    pictures = make_images(cell, model.device)
    if PEERS[me.peer].static:
        raise ImportError("generate() compiles no vision tower")
    if PEERS[me.peer].engine is not None:
        features = decode_engine.tower(model, pictures["pixel_values"], cell.images)
    else:

        def features() -> Tensor:
            found = model.get_image_features(**pictures)
            found = getattr(found, "pooler_output", found)
            return torch.cat(list(found)) if not isinstance(found, Tensor) else found

    me.logits = features().float()[None]
    judge(me, me.logits if truth is None else truth)
    for _ in range(repeats * TOWER_CALLS if me.status == OK else 0):
        watch = Stopwatch(model.device)
        features()
        watch.mark()
        me.tokens += watch.intervals()


def run_peer(
    me: Entry, cell: Cell, model: nn.Module, tokens: tuple[Tensor, Tensor], truth: Tensor | None, repeats: int
) -> None:
    """Logits, their check, and the times of ``repeats`` calls; what compiles does so for the logits."""
    static, engine, (prompt, forced) = PEERS[me.peer].static, PEERS[me.peer].engine, tokens
    if static and cell.images:
        raise ImportError("compiled generation is measured after text alone")
    pictures = make_images(cell, prompt.device)
    if engine is not None:
        generator, prompts = engine.open(model), decode_engine.prompts_of(prompt, pictures)
        me.logits = decode_engine.forced_logits(generator, prompts, forced[:FORCED])
        judge(me, me.logits if truth is None else truth)
        for _ in range(repeats if me.status == OK else 0):
            first, times = decode_engine.timed(generator, prompts, cell.new_tokens, Stopwatch(prompt.device))
            me.first.append(first)
            me.tokens += times
        return
    watched, before = Forced(forced), compile_counts()
    generate(model, cell, prompt, watched, static, pictures)
    me.logits = torch.stack(watched.logits)
    judge(me, me.logits if truth is None else truth)
    if me.status == OK and static and "_compiled_call" not in vars(model):
        me.status, me.reason = FAILED, f"generate() did not compile on {prompt.device.type}"
    for _ in range(repeats if me.status == OK else 0):
        watch = Stopwatch(prompt.device)
        generate(model, cell, prompt, watch, static, pictures)
        first, *rest = watch.intervals()
        me.first.append(first)
        me.tokens += rest[SETTLING:]
    if static:
        me.graphs, me.skipped_graphs = (now - then for now, then in zip(compile_counts(), before))


def judge(me: Entry, truth: Tensor) -> None:
    """Errors of the logits (steps, batch, vocab) beside hf's, the worst step deciding."""
    off = torch.linalg.vector_norm(me.logits - truth, dim=(1, 2)) / torch.linalg.vector_norm(truth, dim=(1, 2))
    me.error = off.max().item()
    me.agreement = (me.logits.argmax(-1) == truth.argmax(-1)).float().mean().item()
    if not me.error <= PEERS[me.peer].bound:
        me.status, me.reason = WRONG, f"logits are {me.error:.2g} from hf's, over {PEERS[me.peer].bound:g}"


def enter(
    peer: str,
    cell: Cell,
    model: nn.Module,
    tokens: tuple[Tensor, Tensor],
    truth: Tensor | None,
    gpu: measure.Gpu,
    repeats: int,
) -> Entry:
    """One peer from patch to unpatch; ``truth`` is None for hf itself."""
    me = Entry(peer)
    try:
        # generate() leaves its compiled forward and the longest cache so far on the model
        with ExitStack() as stack:
            stack.enter_context(become(model, PEERS[peer].parts))
            stack.enter_context(own_attributes(model))
            if cell.new_tokens:
                run = measure.Trial(lambda: run_peer(me, cell, model, tokens, truth, repeats))
            else:
                run = measure.Trial(lambda: run_tower(me, cell, model, truth, repeats))
            me.peak_bytes = gpu.peak_bytes(run)
    except Exception as error:  # a peer's failure is a result, not the end of the run
        me.status, me.reason = model_run.outcome(error)
    torch.compiler.reset()
    model_run.free(gpu.device)
    return me


def bench_cell(
    cell: Cell,
    model: nn.Module,
    gpu: measure.Gpu,
    ceilings: dict,
    chosen: tuple[str, ...],
    repeats: int,
    deadline: float | None = None,
) -> Iterator[dict]:
    """The rows of one cell, on its model, as each peer is done; hf always runs, since the others must equal it."""
    weights, hf = weight_bytes(model), None
    tokens = make_tokens(cell, SIZES[cell.size], gpu.device)
    for peer in PEERS:
        if peer != HF and peer not in chosen:
            continue
        if hf is not None and hf.logits is None:
            me = Entry(peer, FAILED, f"hf gave nothing to compare with: {hf.reason or hf.status}")
        elif hf is not None and model_run.late(deadline):
            me = Entry(peer, SKIPPED, "the time was over")
        else:
            me = enter(peer, cell, model, tokens, None if hf is None else hf.logits, gpu, repeats)
        hf = hf or me
        yield row_of(cell, me, weights, ceilings)


def base_row(cell: Cell, peer: str, status: str, reason: str) -> dict:
    """A row in which nothing is known but who and why."""
    row = {"kind": "decode", **asdict(cell), "peer": peer, "status": status, "reason": reason}
    del row["quick"]
    row["images"] = len(cell.images) or None
    unknown = ("ms_per_token", "p20", "p80", "ttft_ms", "tokens_per_s", "bandwidth_share", "peak_gib")
    row |= dict.fromkeys((*unknown, "logits_error", "argmax_agreement", "graphs", "cudagraph_skips"))
    needed = decode_bytes(SIZES[cell.size], cell.batch, cell.prompt + cell.new_tokens // 2)
    needed = needed if cell.new_tokens else None
    return row | {"samples": 0, "bytes_per_token": needed, "bound": {"logits": BOUND}}


def row_of(cell: Cell, me: Entry, weights: int, ceilings: dict) -> dict:
    """``ms_per_token`` and ``bytes_per_token`` are of a step, which is a token of every row of the batch.

    A compiled peer is one graph with no CUDA graph skipped; anything else ran partly in eager, and the counts say so.
    """
    row = base_row(cell, me.peer, me.status, me.reason) | {"graphs": me.graphs, "cudagraph_skips": me.skipped_graphs}
    for column, value in (("logits_error", me.error), ("argmax_agreement", me.agreement)):
        row[column] = value if value is not None and math.isfinite(value) else None
    if me.status == OK:
        stats = measure.Stats.of(me.tokens)
        row |= {"ms_per_token": stats.median, "p20": stats.p20, "p80": stats.p80, "samples": stats.samples}
        if cell.new_tokens:
            row |= {"ttft_ms": measure.Stats.of(me.first).median, "tokens_per_s": 1e3 * cell.batch / stats.median}
            row["bandwidth_share"] = row["bytes_per_token"] / (1e-3 * stats.median) / ceilings["copy_bytes_s"]
        row["peak_gib"] = (me.peak_bytes + weights) / 2**30
    return row


def cells_of(size: tuple[str, ...], quick: bool, only: str = "") -> list[Cell]:
    return model_run.chosen_cells(CELLS, size, quick, only)


def bench_decode(
    gpu: measure.Gpu,
    ceilings: dict,
    *,
    size: tuple[str, ...] = ("3b", "8b"),
    quick: bool = False,
    peers: tuple[str, ...] | None = None,
    deadline: float | None = None,
    only: str = "",
) -> Iterator[dict]:
    """Rows of every cell, as each is done.

    Args:
        size: which sizes.
        quick: few cells, few repeats.
        peers: who takes part beside hf; None for all.
        deadline: of ``time.monotonic()``; a cell that would begin later is one row, ``skipped``.
        only: only cells with this in their label, like "batch 16".
    """
    chosen, repeats = tuple(PEERS) if peers is None else peers, 2 if quick else 3

    def make(cell: Cell) -> nn.Module:
        return build(SIZES[cell.size], "vision" if cell.images else "text", gpu.device).eval()

    def run(cell: Cell, model: nn.Module) -> Iterator[dict]:
        return bench_cell(cell, model, gpu, ceilings, chosen, repeats, deadline)

    cells = cells_of(size, quick, only)
    yield from model_run.run_cells(
        cells, lambda cell: (cell.size, bool(cell.images)), make, run, base_row, gpu.device, deadline
    )


def show(row: dict) -> str:
    """A row as one line of the running log; WRONG, missing, oom and failed stand where the time would."""
    head = f"decode {row['size']} batch {row['batch']} prompt {row['prompt']}"
    head += f" images {row['images']}" if row["images"] else ""
    head = f"{head:<32} {row['peer']:<18}"
    if row["ms_per_token"] is None:
        return f"{head} {row['status']}: {row['reason']}"
    if not row["new_tokens"]:
        spread = f"({row['p20']:.2f} to {row['p80']:.2f})"
        return f"{head} {row['ms_per_token']:7.2f} ms a call {spread}  features off hf {row['logits_error']:.3f}"
    line = f"{head} {row['ms_per_token']:7.2f} ms a token ({row['p20']:.2f} to {row['p80']:.2f})"
    line += (
        f"  first {row['ttft_ms']:7.1f} ms  {row['tokens_per_s']:6.0f} tokens/s  {100 * row['bandwidth_share']:5.1f} %"
    )
    return f"{line}  peak {row['peak_gib']:5.1f} GiB  logits off hf {row['logits_error']:.3f}"


def main(argv: list[str] | None = None) -> int:
    """The command line of this bench by itself."""
    from m3kernels.bench.run import main_of

    return main_of("decode", argv)


if __name__ == "__main__":
    sys.exit(main())
