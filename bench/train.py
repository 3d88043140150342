"""The training bench: steps of Ministral 3 at real shapes with random weights, beside its peers, checked first.

    python -m m3kernels.bench.train [--size 3b 8b] [--peers NAME ...] [--quick] [--out FILE.jsonl] [--seconds N]

A step is forward and backward without an optimizer. All peers of a cell run on one model instance and one batch; each
peer's loss and gradients must equal Hugging Face's before it is timed. Needs a CUDA GPU; without one it says so, exits 2.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from m3kernels.bench import measure, model_run
from m3kernels.bench.model_run import FAILED, OK, OOM, SKIPPED, WRONG
from m3kernels.bench.model_shapes import SIZES, adapt, build, make_batch, step_flops, weight_bytes
from m3kernels.bench.ops import GEMM_CEILING
from m3kernels.bench.train_peers import PEERS, attention_of, become, default_peers, loss_by_chunks
from m3kernels.patching.api import unwrap

HF = "hf"
FULL = measure.Budget(seconds=5, rounds=2)
QUICK = measure.Budget(seconds=1.5, rounds=2)
SAMPLE = 1 << 14
# Measured on narrow models of the real depth (26 to 40 layers, vision, LoRA, DoRA; S 256 to 8192): two bf16 evaluations of
# one step (hf with SDPA, hf with eager attention, m3kernels) differ by up to 1e-3 in the loss, 8e-3 in the norm of all
# gradients and 0.16 in the worst parameter's gradient. Random weights predict nothing, so loss and norm forgive what is
# plainly wrong: labels off by one move them by 2e-3 and 1e-2. The gradients do not: labels off by one and no rotary 1.5,
# a wrong row of the rotary table 1.2, q scaled by 1.07 0.54.
BOUND = {"loss": 2e-3, "grad_norm": 2e-2, "grad": 0.25}


@dataclass(frozen=True)
class Cell:
    """One step: which model, trained how ("full", "lora", "dora"), on ``batch`` rows of ``seq`` tokens."""

    size: str
    modality: str
    mode: str
    seq: int
    recompute: bool = False
    batch: int = 1
    quick: bool = False

    @property
    def label(self) -> str:
        return f"{self.size} {self.modality} {self.mode} S{self.seq}" + (" recomputed" if self.recompute else "")


# in the order of running: cells of one model beside each other, which then is built once
CELLS: tuple[Cell, ...] = (
    Cell("3b", "text", "full", 4096, quick=True),
    Cell("3b", "text", "full", 8192),
    Cell("3b", "text", "full", 8192, recompute=True),
    Cell("3b", "text", "full", 32768, recompute=True),
    Cell("3b", "text", "lora", 4096, quick=True),
    Cell("3b", "text", "lora", 8192, recompute=True),
    Cell("3b", "text", "lora", 32768, recompute=True),
    Cell("3b", "text", "dora", 4096),
    Cell("3b", "vision", "full", 4096, quick=True),
    Cell("3b", "vision", "lora", 4096),
    Cell("8b", "text", "full", 4096),
    Cell("8b", "text", "full", 8192),
    Cell("8b", "text", "full", 8192, recompute=True),
    Cell("8b", "text", "lora", 4096),
    Cell("8b", "text", "lora", 8192, recompute=True),
    Cell("8b", "text", "lora", 32768, recompute=True),
    Cell("8b", "text", "dora", 4096),
    Cell("8b", "vision", "full", 4096),
    Cell("8b", "vision", "lora", 4096),
    Cell("14b", "text", "full", 4096, recompute=True),
    Cell("14b", "text", "lora", 4096),
    Cell("14b", "text", "lora", 8192, recompute=True),
)


@dataclass(frozen=True)
class Seen:
    """What a step gave: the loss, the norm of all gradients (fp32), and up to ``SAMPLE`` elements of each, in fp32."""

    loss: float
    grad_norm: float
    samples: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Errors:
    """Relative distances from Hugging Face; ``grad``: of the worst parameter's gradient, ``worst``. NaN is infinite."""

    loss: float
    grad_norm: float
    grad: float
    worst: str

    def verdict(self) -> tuple[str, str]:
        """(OK, "") or (WRONG, what is over its bound)."""
        over = [name for name, bound in BOUND.items() if not getattr(self, name) <= bound]
        said = [f"{name} is {getattr(self, name):.2g} from hf, over {BOUND[name]:g}" for name in over]
        return (WRONG, "; ".join(said) + (f" ({self.worst})" if "grad" in over else "")) if over else (OK, "")


@dataclass
class Entry:
    """One peer in one cell."""

    peer: str
    status: str = OK
    reason: str = ""
    attention: str | None = None
    seen: Seen | None = None
    errors: Errors | None = None
    peak_bytes: int | None = None
    samples: list[float] = field(default_factory=list)

    def fail(self, error: Exception) -> None:
        self.status, self.reason = model_run.outcome(error)


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def trial(model: nn.Module, batch: dict[str, Tensor]) -> measure.Trial:
    return measure.Trial(lambda: step(model, batch), lambda: model.zero_grad(set_to_none=True))


def observe(model: nn.Module, batch: dict[str, Tensor]) -> Seen:
    """One step's results; the gradients are gone afterwards."""
    model.zero_grad(set_to_none=True)
    loss = step(model, batch)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads.values()]
    # an odd stride, so that not all elements are of one column
    samples = {name: g.flatten()[:: g.numel() // SAMPLE | 1].float() for name, g in grads.items()}
    seen = Seen(loss.item(), torch.linalg.vector_norm(torch.stack(norms)).item(), samples)
    model.zero_grad(set_to_none=True)
    return seen


def compare(mine: Seen, truth: Seen) -> Errors:
    found = {name: _distance(mine.samples.get(name), sample) for name, sample in truth.samples.items()}
    worst = max(found, key=found.get)
    return Errors(_relative(mine.loss, truth.loss), _relative(mine.grad_norm, truth.grad_norm), found[worst], worst)


def _relative(value: float, reference: float) -> float:
    error = abs(value - reference) / abs(reference)
    return error if math.isfinite(error) else math.inf


def _distance(mine: Tensor | None, reference: Tensor) -> float:
    if mine is None:
        return math.inf
    off, size = torch.linalg.vector_norm(mine - reference).item(), torch.linalg.vector_norm(reference).item()
    if not math.isfinite(off):
        return math.inf
    return off / size if size else (0.0 if off == 0 else math.inf)


def recompute(base: nn.Module, on: bool) -> None:
    """Non-reentrant checkpointing of every layer; transformers 5.24 calls it activation checkpointing."""
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    switch = getattr(base, f"{name}_checkpointing_{'enable' if on else 'disable'}")
    switch(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}} if on else {})


def reference_of(hf: Entry, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Seen | None, str]:
    """(what to compare with, its name): hf's step; where only its logits do not fit, the same with the loss by chunks."""
    if hf.seen is not None or hf.status != OOM:
        return hf.seen, HF
    try:
        with become(model, (loss_by_chunks,)):
            return observe(model, batch), "hf, loss by chunks"
    except Exception:  # then hf's own failure is the reason that its rows and everyone else's give
        return None, HF
    finally:
        model_run.free(unwrap(model).device)


def enter(peer: str, model: nn.Module, batch: dict[str, Tensor], truth: Seen | None, gpu: measure.Gpu) -> Entry:
    """One peer's step, checked, and its peak memory if that is right; ``truth`` is None for hf itself."""
    me = Entry(peer)
    try:
        with become(model, PEERS[peer]):
            me.attention = attention_of(model, *batch["input_ids"].shape)
            me.seen = observe(model, batch)
            me.errors = compare(me.seen, truth or me.seen)
            me.status, me.reason = me.errors.verdict()
            if me.status == OK:
                me.peak_bytes = gpu.peak_bytes(trial(model, batch))
    except Exception as error:  # a peer's failure is a result, not the end of the run
        me.fail(error)
    model.zero_grad(set_to_none=True)
    model_run.free(gpu.device)
    return me


def contenders(
    model: nn.Module, batch: dict[str, Tensor], gpu: measure.Gpu, chosen: tuple[str, ...], deadline: float | None
) -> tuple[list[Entry], str]:
    """(everyone in reporting order, what they were compared with); hf always runs, since the others must equal it."""
    hf = enter(HF, model, batch, None, gpu)
    truth, reference = reference_of(hf, model, batch)
    entered = [hf]
    for peer in PEERS:
        if peer not in chosen or peer == HF:
            continue
        if truth is None:
            entered.append(Entry(peer, FAILED, f"hf gave nothing to compare with: {hf.reason or hf.status}"))
        elif model_run.late(deadline):
            entered.append(Entry(peer, SKIPPED, "the time was over"))
        else:
            entered.append(enter(peer, model, batch, truth, gpu))
    return entered, reference


def time_entries(
    entered: list[Entry], model: nn.Module, batch: dict[str, Tensor], gpu: measure.Gpu, budget: measure.Budget
) -> None:
    """Milliseconds of steps, the peers taking turns; the first step of a turn fills the allocator and is not kept."""
    ready = [me for me in entered if me.status == OK]
    for _ in range(budget.rounds):
        for me in ready:
            model_run.free(gpu.device)
            try:
                with become(model, PEERS[me.peer]):
                    first, _ = gpu.python_sample(trial(model, batch))
                    calls = budget.calls_a_round(first, 2, 8)
                    me.samples += [gpu.python_sample(trial(model, batch))[0] for _ in range(calls)]
            except Exception as error:  # a peer's failure is a result, not the end of the run
                me.fail(error)
            model.zero_grad(set_to_none=True)
        ready = [me for me in ready if me.status == OK]


def bench_cell(
    cell: Cell,
    model: nn.Module,
    gpu: measure.Gpu,
    ceilings: dict,
    budget: measure.Budget,
    chosen: tuple[str, ...],
    deadline: float | None = None,
) -> Iterator[dict]:
    """The rows of one cell, on its model."""
    batch = make_batch(SIZES[cell.size], cell.modality, cell.batch, cell.seq, gpu.device)
    recompute(unwrap(model), cell.recompute)
    # a compiled peer's graphs are of one shape; of many, dynamo gives up
    torch.compiler.reset()
    entered, reference = contenders(model, batch, gpu, chosen, deadline)
    time_entries(entered, model, batch, gpu, budget)
    weights = weight_bytes(model)
    for me in entered:
        yield row_of(cell, me, weights, reference, ceilings)
    torch.compiler.reset()
    model_run.free(gpu.device)


def base_row(cell: Cell, peer: str, status: str, reason: str) -> dict:
    """A row in which nothing is known but who and why."""
    row = {"kind": "train", **asdict(cell), "peer": peer, "status": status, "reason": reason}
    del row["quick"]
    unknown = ("ms", "p20", "p80", "tokens_per_s", "mfu", "peak_gib", "weights_gib", "loss", "loss_error")
    row |= dict.fromkeys(
        (*unknown, "grad_norm", "grad_norm_error", "grad_error", "grad_worst", "attention", "reference")
    )
    flops = step_flops(SIZES[cell.size], cell.modality, cell.mode, cell.batch, cell.seq).total
    return row | {"samples": 0, "flops": flops, "bound": BOUND}


def row_of(cell: Cell, me: Entry, weights: int, reference: str, ceilings: dict) -> dict:
    row = base_row(cell, me.peer, me.status, me.reason)
    row |= {"attention": me.attention, "weights_gib": weights / 2**30, "reference": reference}
    if me.seen is not None:
        row |= {"loss": _finite(me.seen.loss), "grad_norm": _finite(me.seen.grad_norm)}
    if me.errors is not None:
        row |= {"loss_error": _finite(me.errors.loss), "grad_norm_error": _finite(me.errors.grad_norm)}
        row |= {"grad_error": _finite(me.errors.grad), "grad_worst": me.errors.worst}
    if me.peak_bytes is not None:
        row["peak_gib"] = (me.peak_bytes + weights) / 2**30
    if me.status == OK:
        stats = measure.Stats.of(me.samples)
        seconds = 1e-3 * stats.median
        row |= {"ms": stats.median, "p20": stats.p20, "p80": stats.p80, "samples": stats.samples}
        row["tokens_per_s"] = cell.batch * cell.seq / seconds
        row["mfu"] = row["flops"] / seconds / ceilings["gemm_flops_s"][GEMM_CEILING]
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cells_of(size: tuple[str, ...], quick: bool, only: str = "") -> list[Cell]:
    return model_run.chosen_cells(CELLS, size, quick, only)


def _model_of(cell: Cell) -> tuple[str, str, str]:
    return cell.size, cell.modality, cell.mode


def bench_train(
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
        quick: few cells, few repeats, and without ``peers`` the four peers that matter most.
        peers: who takes part beside hf; None for all that run unasked.
        deadline: of ``time.monotonic()``; a cell that would begin later is one row, ``skipped``.
        only: only cells with this in their label, like "text lora" or "S8192".
    """
    chosen = default_peers(quick) if peers is None else peers
    budget = QUICK if quick else FULL

    def make(cell: Cell) -> nn.Module:
        return adapt(build(SIZES[cell.size], cell.modality, gpu.device), cell.mode).train()

    def run(cell: Cell, model: nn.Module) -> Iterator[dict]:
        return bench_cell(cell, model, gpu, ceilings, budget, chosen, deadline)

    cells = cells_of(size, quick, only)
    yield from model_run.run_cells(cells, _model_of, make, run, base_row, gpu.device, deadline)


def show(row: dict) -> str:
    """A row as one line of the running log; WRONG, missing, oom and failed stand where the time would."""
    where = f"{row['size']} {row['modality']} {row['mode']} S{row['seq']}" + (" recomputed" if row["recompute"] else "")
    head = f"train {where:<32} {row['peer']:<20}"
    if row["ms"] is None:
        return f"{head} {row['status']}: {row['reason']}"
    line = f"{head} {row['ms']:8.1f} ms ({row['p20']:.1f} to {row['p80']:.1f})  {row['tokens_per_s']:7.0f} tokens/s"
    line += f"  {100 * row['mfu']:5.1f} %  peak {row['peak_gib']:5.1f} GiB  {row['attention']}"
    return (
        f"{line}  off hf: loss {row['loss_error']:.0e} norm {row['grad_norm_error']:.0e} grad {row['grad_error']:.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line of this bench by itself."""
    from m3kernels.bench.run import main_of

    return main_of("train", argv)


if __name__ == "__main__":
    sys.exit(main())
