"""The op benchmark: every op beside its peers on one GPU, checked against fp64 first.

    python -m m3kernels.bench.ops [--op NAME ...] [--peers NAME ...] [--quick] [--out FILE.jsonl]

One row per (op, shape, direction, peer). Needs a CUDA GPU; without one it says so and exits 2.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m3kernels.bench import gate, measure, peers
from m3kernels.bench import rows as result_rows
from m3kernels.bench.cases import CASES, OPS, one_gemm_dweight
from m3kernels.bench.spec import BOTH, Case, Op, Shape, Tensors

SEED = 20260801
FULL = measure.Budget(seconds=0.25, rounds=5)
QUICK = measure.Budget(seconds=0.1, rounds=3)
GEMM_CEILING = "8192x4096x131072"


@dataclass
class Data:
    """One case's inputs, output gradients and fp64 answers; never written after they are made."""

    inputs: Tensors
    grads: Tensors
    reference: Tensors


@dataclass
class Contender:
    """One peer on one case: its own copies of the inputs, its errors against fp64, and which copies it overwrites."""

    name: str
    status: str = gate.OK
    reason: str = ""
    function: peers.Function | None = None
    inputs: Tensors = field(default_factory=dict)
    grads: Tensors = field(default_factory=dict)
    errors: dict[str, gate.Error] = field(default_factory=dict)
    overwrites: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def restore(self) -> None:
        # .data: the peer wrote behind autograd's back too, and saved tensors must not look modified
        for _, mine, pristine in self.overwrites:
            mine.data.copy_(pristine)


def make_data(case: Case, device: torch.device) -> Data:
    op = OPS[case.op]
    g = torch.Generator(device).manual_seed(SEED)
    inputs = op.inputs(case.shape, device, g)
    grads = {}
    for name, like in op.outputs.items():
        if isinstance(like, tuple):
            size = [case.shape[dimension] for dimension in like]
            grads[name] = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(generator=g)
        elif like is not None:
            grads[name] = torch.empty_like(inputs[like]).normal_(generator=g)
    return Data(inputs, grads, op.reference(case.shape, inputs, grads))


def differentiate(op: Op, shape: Shape, outputs: tuple[Tensor, ...], inputs: Tensors, grads: Tensors, keep: bool):
    given = [grads[n] for n in op.outputs] if grads else None
    return torch.autograd.grad(outputs, [inputs[n] for n in op.wrt(shape)], given, retain_graph=keep)


def run_once(op: Op, shape: Shape, function: peers.Function, inputs: Tensors, grads: Tensors) -> Tensors:
    """Outputs by name and gradients as ``d<input>``; scratch memory is filled with NaN first, to expose what is unwritten."""
    poison = [torch.full_like(t, math.nan) for t in inputs.values() if t.is_floating_point()]
    poison += [torch.full_like(t, math.nan) for t in grads.values()]
    del poison
    outputs = function(inputs)
    results = {n: o.detach() for n, o in zip(op.outputs, outputs)}
    # a peer's backward may write into its outputs' memory
    results = {n: o.clone() for n, o in results.items()}
    found = differentiate(op, shape, outputs, inputs, grads, keep=False)
    return results | {f"d{n}": d for n, d in zip(op.wrt(shape), found)}


def enter(name: str, build: Callable, case: Case, data: Data) -> Contender:
    """Builds a peer, runs it once on its own copies and measures its distance from fp64."""
    op, me = OPS[case.op], Contender(name)
    wrt = op.wrt(case.shape)
    try:
        me.function = build(case.shape, data.inputs)
        me.inputs = {n: t.detach().clone().requires_grad_(n in wrt) for n, t in data.inputs.items()}
        me.grads = {n: t.clone() for n, t in data.grads.items()}
        results = run_once(op, case.shape, me.function, me.inputs, me.grads)
    except ImportError as error:
        return Contender(name, "missing", measure.reason(error))
    except Exception as error:  # a peer's failure is a result, not the end of the run
        return Contender(name, "failed", measure.reason(error))
    me.errors = gate.distances(results, data.reference)
    for what, group, pristine in (("", me.inputs, data.inputs), ("grad of ", me.grads, data.grads)):
        for n, t in group.items():
            if not torch.equal(t.detach(), pristine[n]):
                me.overwrites.append((what + n, t, pristine[n]))
    me.reason = dtype_error(op, results, data.inputs)
    me.status = gate.WRONG if me.reason else gate.OK
    me.restore()
    return me


def errors_of(me: Contender, direction: str, op: Op) -> dict[str, gate.Error]:
    """What a direction is judged by: forward rows by the outputs, backward rows by the gradients, others by both."""
    return {n: e for n, e in me.errors.items() if direction == BOTH or (n in op.outputs) == (direction == "forward")}


def verdict(me: Contender, eager: Contender, direction: str, op: Op) -> gate.Verdict:
    """One direction's status."""
    if me.status != gate.OK:
        return gate.Verdict(me.status, me.reason)
    if not eager.errors:
        return gate.Verdict("unchecked", f"eager gave nothing to compare with: {eager.reason}")
    mine = errors_of(me, direction, op)
    if me is eager:
        return gate.judge_eager(mine)
    return gate.judge(mine, eager.errors, strict=me.name == peers.OURS)


def dtype_error(op: Op, results: Tensors, inputs: Tensors) -> str:
    """Outputs and gradients have their input's dtype; a loss may have any."""
    expected = {n: inputs[like].dtype for n, like in op.outputs.items() if isinstance(like, str)}
    expected |= {n: inputs[n[1:]].dtype for n in results if n not in op.outputs}
    return "; ".join(f"{n} is {results[n].dtype}, not {d}" for n, d in expected.items() if results[n].dtype != d)


def trial(me: Contender, case: Case, direction: str) -> measure.Trial:
    op = OPS[case.op]
    if direction == "forward":
        return measure.Trial(lambda: me.function(me.inputs), me.restore)
    if direction == "backward":
        me.restore()
        outputs = me.function(me.inputs)
        me.restore()
        return measure.Trial(lambda: differentiate(op, case.shape, outputs, me.inputs, me.grads, True), me.restore)
    return measure.Trial(
        lambda: differentiate(op, case.shape, me.function(me.inputs), me.inputs, me.grads, False), me.restore
    )


def contenders(case: Case, data: Data, chosen: tuple[str, ...]) -> dict[str, Contender]:
    """Everyone who takes part, in reporting order; eager always runs, since it sets the bound for the others."""
    entered: dict[str, Contender] = {}
    for name in peers.ORDER:
        build = peers.PEERS[case.op].get(name)
        if build is not None and (name in chosen or name == "eager"):
            entered[name] = enter(name, build, case, data)
    return entered


def bench_case(case: Case, gpu: measure.Gpu, budget: measure.Budget, ceilings: dict, chosen: tuple[str, ...]):
    """Yields the rows of one case."""
    op, data = OPS[case.op], make_data(case, gpu.device)
    entered = contenders(case, data, chosen)
    one_gemm = None
    if "dweight" in data.reference and case.op == "linear_cross_entropy":
        one_gemm = gate.distance(one_gemm_dweight(data.inputs), data.reference["dweight"]).relative
    data.reference.clear()
    for direction in op.directions:
        rows = {name: base_row(case, direction, me, entered["eager"], one_gemm) for name, me in entered.items()}
        ready = {}
        for name, me in entered.items():
            if rows[name]["status"] in (gate.OK, gate.IMPRECISE):
                try:
                    ready[name] = trial(me, case, direction)
                    rows[name]["peak_bytes"] = gpu.peak_bytes(ready[name])
                except Exception as error:  # a peer's failure is a result, not the end of the run
                    ready.pop(name, None)
                    rows[name] |= {"status": "failed", "reason": measure.reason(error)}
        time_rows(rows, ready, op, gpu, budget)
        cost = op.cost(case.shape, direction)
        limit = cost.limit_ms(ceilings["copy_bytes_s"], ceilings["gemm_flops_s"][GEMM_CEILING])
        for row in rows.values():
            row |= {"bytes": cost.bytes, "flops": cost.flops, "limit_ms": limit}
            row["percent_of_limit"] = result_rows.share_of_limit(row)
            yield row
        del ready
        torch.cuda.empty_cache()


def guarded_case(case: Case, *args):
    """``bench_case``; what breaks a whole case (no memory for its inputs, say) is one ``error`` line, not the end."""
    try:
        yield from bench_case(case, *args)
    except Exception as error:
        yield {"kind": "error", "op": case.op, "label": case.label, "reason": measure.reason(error)}


def time_rows(rows: dict, ready: dict[str, measure.Trial], op: Op, gpu: measure.Gpu, budget: measure.Budget) -> None:
    """Fills the time columns: from Python for all, in a graph for those that can be captured."""
    for name, timed in gpu.time_python(ready, budget).items():
        if isinstance(timed, str):
            rows[name] |= {"status": "failed", "reason": timed}
            ready.pop(name)
        else:
            stats, host_us = timed
            rows[name] |= {"python_ms": stats.median, "python_p20": stats.p20, "python_p80": stats.p80}
            rows[name] |= {"host_us": host_us, "python_samples": stats.samples}
    captured = {name: trial for name, trial in ready.items() if name not in op.no_graph}
    for name in ready.keys() - captured.keys():
        rows[name]["graph_reason"] = "not tried: it synchronises inside a call"
    for name, stats in gpu.time_graphs(captured, budget).items():
        if isinstance(stats, str):
            rows[name]["graph_reason"] = stats
        else:
            rows[name] |= {"graph_ms": stats.median, "graph_p20": stats.p20, "graph_p80": stats.p80}
            rows[name]["graph_samples"] = stats.samples


def base_row(case: Case, direction: str, me: Contender, eager: Contender, one_gemm: float | None) -> dict:
    """A row with everything but times."""
    judged = verdict(me, eager, direction, OPS[case.op])
    row = {"kind": "row", "op": case.op, "label": case.label, "direction": direction, "peer": me.name}
    row |= {"status": judged.status, "reason": judged.reason, "graph_ms": None, "python_ms": None, "graph_reason": None}
    row |= {"peak_bytes": None, "overwrites": [n for n, _, _ in me.overwrites]}
    mine, theirs = errors_of(me, direction, OPS[case.op]), errors_of(eager, direction, OPS[case.op])
    row["errors"] = {n: e.as_json() for n, e in mine.items()}
    row["eager_errors"] = {n: e.as_json() for n, e in theirs.items()}
    if mine and theirs:
        excess = gate.largest_excess(mine, theirs)
        row["error_over_eager"] = excess if math.isfinite(excess) else None
    if one_gemm is not None and "dweight" in me.errors:
        ratio = me.errors["dweight"].relative / one_gemm
        row["dweight_error_over_one_gemm"] = ratio if math.isfinite(ratio) else None
    return row


def show(row: dict) -> str:
    """A row as one line of the running log; WRONG, missing and failed stand where the time would."""
    if row["kind"] == "error":
        return f"{row['op']} {row['label']} broke: {row['reason']}"
    name = f"{row['op']} {row['label']} {row['direction']}"
    head = f"{name:<66} {row['peer']:<14}"
    if result_rows.op_time(row) is None:
        return f"{head} {row['status']}: {row['reason']}"
    graph = "graph      –    " if row["graph_ms"] is None else f"graph {row['graph_ms']:8.4f} ms"
    line = f"{head} {graph}  python {row['python_ms']:8.4f} ms  host {row['host_us']:5.0f} us"
    line += f"  {row['percent_of_limit']:5.1f} %  peak {row['peak_bytes'] / 2**20:8.1f} MiB"
    line += f"  error/eager {row['error_over_eager']:.2f}" if row.get("error_over_eager") is not None else ""
    if row.get("dweight_error_over_one_gemm") is not None:
        line += f"  dweight/one GEMM {row['dweight_error_over_one_gemm']:.2f}"
    return line + (f"  ({row['status']})" if row["status"] != gate.OK else "")


def bench_ops(
    gpu: measure.Gpu, ceilings: dict, *, ops: tuple[str, ...], chosen: tuple[str, ...], quick: bool, deadline: float
) -> Iterator[dict]:
    """Rows of every case of ``ops``; a case that would begin after ``deadline`` (``time.monotonic``) is one line that says so."""
    for case in CASES:
        if case.op not in ops or (quick and not case.quick):
            continue
        if time.monotonic() > deadline:
            yield {"kind": "error", "op": case.op, "label": case.label, "reason": "skipped: the time given was over"}
            continue
        with torch.cuda.stream(gpu.stream):
            yield from guarded_case(case, gpu, QUICK if quick else FULL, ceilings, chosen)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    from m3kernels.bench.run import main_of

    sys.exit(main_of("ops"))
