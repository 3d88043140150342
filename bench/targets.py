"""What each row must reach, measured beside its peers on one H100, and whether a run reaches it.

Source: the project's ``targets.md``: "One H100 80GB HBM3, PyTorch 2.11.0+cu130, Triton 3.6.0, transformers 5.17.0,
liger-kernel 0.8.5, quack-kernels 0.6.5, cut-cross-entropy 25.1.1. Medians, bf16, random data and weights, L2 flushed
between repeats. [...] 'Limit' is bytes / 3.02 TB/s (measured copy) or FLOPs / 700 TFLOP/s (measured GEMM)." A "must" is
what has to be reached, a "goal" what we are after.

On an H100 the milliseconds themselves are compared. Another GPU has other absolute times, so there and here a bound is
also carried over in two ways, and neither is exact:

- fraction of the limit: (H100 limit / bound) against (this GPU's measured limit / our time). On a GPU with faster memory
  and the same processor (H200) this is the harder of the two: latencies do not shrink with the bytes' time.
- ratio to the best peer: (bound / the fastest peer's H100 time) against (our time / the fastest peer's in the same run),
  among the named peers that ran; the fastest need not be the same one. Peers' H100 backward times at 8,192 rows were
  taken from Python and carry 50 to 100 us of host time, so against device times of a run this is harder than was meant.
"""

from dataclasses import dataclass, field

from m3kernels.bench.cases import CASES, OPS
from m3kernels.bench.peers import OURS
from m3kernels.bench.rows import Cell, Time, cell, number, op_time, ours_in, peak_gib
from m3kernels.bench.rows import time_of as time_of_row
from m3kernels.bench.spec import BOTH, Cost

H100_COPY_BYTES_S = 3.02e12
H100_GEMM_FLOPS_S = 700e12
DWEIGHT_ERROR_MUST = 1.5


@dataclass(frozen=True)
class Target:
    """One row of ``targets.md``: milliseconds (and GiB: of an op above its inputs, of a model in all) on the H100.

    ``cell`` is how :func:`rows.cell` begins for the rows that it is about.
    """

    cell: Cell
    must_ms: float
    goal_ms: float
    peers_ms: dict[str, float] = field(hash=False)
    must_gib: float | None = None
    goal_gib: float | None = None

    def limit_ms(self, row: dict | None = None) -> float | None:
        """The H100's limit; of a training step or a token it is known from a row's own FLOPs or bytes only."""
        if self.cell[0] == "row":
            case = next(c for c in CASES if (c.op, c.label) == self.cell[1:3])
            return OPS[case.op].cost(case.shape, self.cell[3]).limit_ms(H100_COPY_BYTES_S, H100_GEMM_FLOPS_S)
        if row is None:
            return None
        cost = Cost(bytes=row.get("bytes_per_token") or 0, flops=row.get("flops") or 0)
        return cost.limit_ms(H100_COPY_BYTES_S, H100_GEMM_FLOPS_S) or None

    def must_fraction(self) -> float:
        """The share of the H100's limit that reaching ``must`` meant there."""
        return self.limit_ms() / self.must_ms


def _peers(eager: float, compiled: float | None, liger: float | None, **other: float) -> dict[str, float]:
    known = {"eager": eager, "torch.compile": compiled, "liger": liger} | other
    return {name: ms for name, ms in known.items() if ms is not None}


def _op(op: str, label: str, direction: str, must_ms: float, goal_ms: float, peers_ms: dict, *gib: float) -> Target:
    return Target(("row", op, label, direction), must_ms, goal_ms, peers_ms, *gib)


def _attention(batch: int, seq: int, must: tuple, goal: tuple, **peers: tuple) -> tuple[Target, Target]:
    """Causal attention, 32/8 heads x 128; the source has (forward, backward) TFLOP/s, of our own kernel for must and goal."""
    label, found = f"causal B{batch} S{seq} 32/8x128", []
    for i, (direction, products) in enumerate((("forward", 2), ("backward", 5))):
        gflop = 1e-9 * products * batch * 32 * seq**2 * 128
        others = {peer: gflop / rates[i] for peer, rates in peers.items()}
        found.append(_op("attention", label, direction, gflop / must[i], gflop / goal[i], others))
    return tuple(found)


def _adapter(op: str, width: int, out: int, must: float, goal: float, *, peft: tuple, compiled: tuple) -> tuple:
    """8,192 rows, rank 16; must and goal are multiples of the bare product, which is taken at the limit's GEMM rate."""
    bare_ms = 1e3 * 2 * 8192 * width * out / H100_GEMM_FLOPS_S
    return tuple(
        _op(op, f"8192 {width}->{out} r16", d, must * bare_ms, goal * bare_ms, {"peft": p, "peft+compile": c})
        for d, p, c in zip(("forward", "backward"), peft, compiled)
    )


_TRAINED, _FROZEN = "8192x131072 h4096 trained", "8192x131072 h4096 frozen"
_S8, _S32, _SWIGLU = "S8192 32/8x128", "S32768 32/8x128", "8192x14336"

TARGETS: tuple[Target, ...] = (
    _op("rms_norm", "8192x4096", "forward", 0.055, 0.050, _peers(0.528, 0.068, 0.071, torch=0.060, quack=0.051)),
    _op("rms_norm", "8192x4096", "backward", 0.120, 0.086, _peers(1.228, 0.243, 0.183, torch=0.165, quack=0.50)),
    _op("rms_norm", "32768x5120", "forward", 0.235, 0.228, _peers(2.51, 0.225, 0.244, quack=0.228)),
    _op("rms_norm", "32768x5120", "backward", 0.454, 0.39, _peers(5.80, None, 0.581, quack=0.454)),
    _op("add_rms_norm", "8192x4096", "forward", 0.098, 0.093, _peers(0.599, 0.097, 0.095, quack=0.095)),
    _op("add_rms_norm", "8192x4096", "backward", 0.20, 0.115, _peers(1.344, 0.380, 0.317, quack=0.407)),
    _op("rotary", _S8, "forward", 0.09, 0.066, _peers(0.711, 0.096, 0.356)),
    _op("rotary", _S8, "backward", 0.12, 0.066, _peers(0.923, 0.56, 0.267)),
    _op("rotary", _S32, "forward", 0.25, 0.235, _peers(2.67, 0.242, 0.599)),
    _op("rotary", _S32, "backward", 0.30, 0.235, _peers(3.50, None, 0.577)),
    _op("swiglu", _SWIGLU, "forward", 0.24, 0.24, _peers(0.393, 0.236, 0.238)),
    _op("swiglu", _SWIGLU, "backward", 0.40, 0.40, _peers(0.700, 0.393, 0.394)),
    _op("linear_cross_entropy", _TRAINED, BOTH, 40, 36, _peers(52.9, 38.8, 65.5, cce=161), 1.4, 1.3),
    _op("linear_cross_entropy", _FROZEN, BOTH, 28, 24.5, _peers(40.8, 26.3, 31.6, cce=88), 0.35, 0.3),
    *_attention(4, 4096, (450, 257), (540, 380), flex=(383, 322), fa2=(332, 274), cudnn=(558, 445), fa4=(606, 523)),
    *_attention(1, 16384, (530, 280), (620, 430), fa2=(339, 320), cudnn=(584, 514), fa4=(677, 601)),
    *_adapter("lora_linear", 4096, 14336, 1.16, 1.05, peft=(1.75, 1.67), compiled=(1.67, 1.69)),
    *_adapter("lora_linear", 3072, 9216, 1.05, 1.02, peft=(0.923, 0.891), compiled=(0.918, 0.879)),
    *_adapter("dora_linear", 4096, 14336, 1.2, 1.10, peft=(3.21, 3.10), compiled=(1.75, 1.92)),
)


def _step(mode: str, seq: int, must: tuple, goal: tuple, **peers_ms: float) -> Target:
    """A training step of the 3B text model, batch 1; recomputed (gradient checkpointing) from S 8192 on."""
    named = {name.replace("_", "+"): ms for name, ms in peers_ms.items()}
    where = ("train", "3b", "text", mode, seq, 1, seq > 4096)
    return Target(where, must[0], goal[0], named, must[1], goal[1])


MODEL_TARGETS: tuple[Target, ...] = (
    _step("full", 4096, (175, 17.3), (152, 15), hf=229, hf_liger=207, hf_compile_fa4=190, hf_liger_fa4=214),
    _step("lora", 4096, (155, 16.6), (126, 14), hf=234, hf_liger=210, hf_compile_fa4=177, hf_liger_fa4=207),
    _step("full", 8192, (450, 14), (390, 30), hf=616, hf_liger=507),
    _step("lora", 8192, (440, 9), (375, 25), hf=653, hf_liger=520),
    _step("full", 32768, (2950, 17), (2560, 40), hf=3823, hf_liger=3301, hf_liger_fa4=3071),
    _step("lora", 32768, (3000, 16), (2500, 40), hf=3870, hf_liger=3352, hf_liger_fa4=3154),
    Target(("decode", "3b", 1, 512), 3.4, 2.67, {"hf": 34.7, "hf+compile": 5.57}),
    Target(("decode", "3b", 1, 16384), 4.5, 3.4, {"hf": 27.0}),
    Target(("decode", "3b", 16, 512), 5, 3.4, {"hf": 27.8, "hf+compile": 9.15}),
)


@dataclass(frozen=True)
class Check:
    """One term of a verdict: what was measured and what the must and the goal allow, each None where not set."""

    term: str
    measured: float
    must: float | None
    goal: float | None = None
    at_least: bool = False

    def holds(self, bound: float | None) -> bool | None:
        if bound is None:
            return None
        return self.measured >= bound if self.at_least else self.measured <= bound


@dataclass(frozen=True)
class Verdict:
    """How one row of ours stands to its must and its goal; ``checks`` by term: ms, limit, ratio, memory, dweight."""

    target: Target
    status: str
    checks: dict[str, Check] = field(default_factory=dict, hash=False)
    best_peer: str | None = None
    time: Time | None = None

    def _must(self, term: str) -> bool | None:
        return None if term not in self.checks else self.checks[term].holds(self.checks[term].must)

    @property
    def fraction_holds(self) -> bool | None:
        return self._must("limit")

    @property
    def ratio_holds(self) -> bool | None:
        return self._must("ratio")

    def missed(self, which: str) -> list[str]:
        """The terms in which ``must`` or ``goal`` is missed."""
        return self._terms(which, False)

    def held(self, which: str) -> list[str]:
        return self._terms(which, True)

    def _terms(self, which: str, answer: bool) -> list[str]:
        return [term for term, check in self.checks.items() if check.holds(getattr(check, which)) is answer]


def judge(target: Target, rows: list[dict], ours: str = OURS, head: dict | None = None) -> Verdict | None:
    """A verdict from a run's rows, None where ours was not run.

    Args:
        ours: the peer of ops that is judged; of models it is the fastest of ours, with FA4 or without.
        head: the run's header; without it milliseconds are not compared.
    """
    group = {r["peer"]: r for r in rows if r["kind"] != "error" and cell(r)[: len(target.cell)] == target.cell}
    mine = group.get(ours) if target.cell[0] == "row" else ours_in(group)
    if mine is None:
        return None
    time = time_of_row(mine)
    if time is None:
        return Verdict(target, mine["status"])
    checks = {}
    if head is not None and "H100" in head["gpu"]:
        checks["ms"] = Check("ms", time.median, target.must_ms, target.goal_ms)
    limit, share = target.limit_ms(mine), share_of_limit(mine, time)
    if limit is not None and share is not None:
        checks["limit"] = Check("limit", share, limit / target.must_ms, limit / target.goal_ms, True)
    peer, ratio = _best_ratio(target, mine, group)
    if peer is not None:
        theirs = min(ms for p, ms in target.peers_ms.items() if p in group and time_of_row(group[p]) is not None)
        checks["ratio"] = Check("ratio", ratio, target.must_ms / theirs, target.goal_ms / theirs)
    if peak_gib(mine) is not None and target.must_gib is not None:
        checks["memory"] = Check("memory", peak_gib(mine), target.must_gib, target.goal_gib)
    if mine.get("dweight_error_over_one_gemm") is not None:
        checks["dweight"] = Check("dweight", mine["dweight_error_over_one_gemm"], DWEIGHT_ERROR_MUST)
    return Verdict(target, mine["status"], checks, peer, time)


def share_of_limit(row: dict, time: Time) -> float | None:
    """Of this GPU's measured limit: of an op its row's limit, of a model its FLOPs or bytes at the measured rates."""
    if row["kind"] == "row":
        return row["limit_ms"] / time.median
    return row.get("mfu" if row["kind"] == "train" else "bandwidth_share")


def _best_ratio(target: Target, mine: dict, group: dict[str, dict]) -> tuple[str | None, float | None]:
    """The fastest peer of this run that the target names, and our time over its: device times where both have them."""
    ratios = {}
    for peer in target.peers_ms:
        row = group.get(peer)
        if row is None or time_of_row(row) is None:
            continue
        clocks = {time_of_row(mine).clock, time_of_row(row).clock}
        pair = (time_of_row(mine), time_of_row(row)) if len(clocks) == 1 else (op_time(mine, True), op_time(row, True))
        ratios[peer] = pair[0].median / pair[1].median
    peer = max(ratios, key=ratios.get, default=None)
    return peer, ratios.get(peer)


def _holds(value: bool | None) -> str:
    return {None: "–", True: "holds", False: "MISSED"}[value]


def verdicts(rows: list[dict], head: dict | None = None) -> list[tuple[Target, Verdict | None]]:
    """Every target of the kinds of row that there are, with its verdict; None where ours was not run."""
    kinds = {row["kind"] for row in rows}
    return [(t, judge(t, rows, head=head)) for t in (*TARGETS, *MODEL_TARGETS) if t.cell[0] in kinds]


def table(rows: list[dict], head: dict | None = None) -> str:
    """One line per target that this run touched: must and measured in every term, and what of the goal is missed."""
    lines = [
        "",
        "must (from one H100): measured of bound, by share of the limit, ratio to the best peer of this run, ...",
    ]
    for target, verdict in verdicts(rows, head):
        if verdict is not None:
            lines.append(f"{' '.join(str(part) for part in target.cell[1:]):<64} {_line(verdict)}")
    return "\n".join(lines)


def _line(verdict: Verdict) -> str:
    if not verdict.checks:
        return verdict.status
    parts = [
        f"{show(c, c.measured)} of {show(c, c.must, verdict)} {_holds(c.holds(c.must))}"
        for c in verdict.checks.values()
    ]
    missed = verdict.missed("goal")
    return " | ".join([*parts, f"goal missed by {', '.join(missed)}" if missed else "goal reached"])


def show(check: Check, value: float | None, verdict: Verdict | None = None) -> str:
    """A measured value or a bound with its unit."""
    if value is None:
        return "–"
    unit = {"limit": f"{100 * value:.1f} %", "ratio": f"{value:.3f}", "memory": f"{number(value)} GiB"}
    text = unit.get(check.term, number(value))
    if check.term == "ratio" and verdict is not None:
        return f"{text} x {verdict.best_peer}"
    return {"ms": f"{text} ms", "dweight": f"{text} dweight error"}.get(check.term, text)
