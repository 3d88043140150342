"""What each row must reach, measured beside its peers on one H100, and whether a run reaches it.

Source: the project's ``targets.md``: "One H100 80GB HBM3, PyTorch 2.11.0+cu130, Triton 3.6.0, transformers 5.17.0,
liger-kernel 0.8.5, quack-kernels 0.6.5, cut-cross-entropy 25.1.1. Medians, bf16, random data and weights, L2 flushed
between repeats. [...] 'Limit' is bytes / 3.02 TB/s (measured copy) or FLOPs / 700 TFLOP/s (measured GEMM)."

Another GPU has other absolute times, so a must is carried over in two ways, and neither is exact:

- fraction of the limit: (H100 limit / must) against (this GPU's measured limit / our time). On a GPU with faster memory
  and the same processor (H200) this is the harder of the two: latencies do not shrink with the bytes' time.
- ratio to a peer: (must / that peer's H100 time) against (our time / its time in the same run). Peers' H100 backward
  times carry host time, so a device-only time here flatters neither side evenly.
"""

from dataclasses import dataclass, field

from m3kernels.bench.cases import BOTH, CASES, OPS

H100_COPY_BYTES_S = 3.02e12
H100_GEMM_FLOPS_S = 700e12
DWEIGHT_ERROR_MUST = 1.5


@dataclass(frozen=True)
class Target:
    """One row of ``targets.md``: milliseconds (and GiB above the inputs) on the H100."""

    op: str
    label: str
    direction: str
    must_ms: float
    goal_ms: float
    peers_ms: dict[str, float] = field(hash=False)
    must_gib: float | None = None
    goal_gib: float | None = None

    def limit_ms(self) -> float:
        case = next(c for c in CASES if (c.op, c.label) == (self.op, self.label))
        return OPS[self.op].cost(case.shape, self.direction).limit_ms(H100_COPY_BYTES_S, H100_GEMM_FLOPS_S)

    def must_fraction(self) -> float:
        """The share of the H100's limit that reaching ``must`` meant there."""
        return self.limit_ms() / self.must_ms


def _peers(eager: float, compiled: float | None, liger: float | None, **other: float) -> dict[str, float]:
    known = {"eager": eager, "torch.compile": compiled, "liger": liger} | other
    return {name: ms for name, ms in known.items() if ms is not None}


_TRAINED, _FROZEN = "8192x131072 h4096 trained", "8192x131072 h4096 frozen"
_S8, _S32, _SWIGLU = "S8192 32/8x128", "S32768 32/8x128", "8192x14336"

TARGETS: tuple[Target, ...] = (
    Target("rms_norm", "8192x4096", "forward", 0.055, 0.050, _peers(0.528, 0.068, 0.071, torch=0.060, quack=0.051)),
    Target("rms_norm", "8192x4096", "backward", 0.120, 0.086, _peers(1.228, 0.243, 0.183, torch=0.165, quack=0.50)),
    Target("rms_norm", "32768x5120", "forward", 0.235, 0.228, _peers(2.51, 0.225, 0.244, quack=0.228)),
    Target("rms_norm", "32768x5120", "backward", 0.454, 0.39, _peers(5.80, None, 0.581, quack=0.454)),
    Target("add_rms_norm", "8192x4096", "forward", 0.098, 0.093, _peers(0.599, 0.097, 0.095, quack=0.095)),
    Target("add_rms_norm", "8192x4096", "backward", 0.20, 0.115, _peers(1.344, 0.380, 0.317, quack=0.407)),
    Target("rotary", _S8, "forward", 0.09, 0.066, _peers(0.711, 0.096, 0.356)),
    Target("rotary", _S8, "backward", 0.12, 0.066, _peers(0.923, 0.56, 0.267)),
    Target("rotary", _S32, "forward", 0.25, 0.235, _peers(2.67, 0.242, 0.599)),
    Target("rotary", _S32, "backward", 0.30, 0.235, _peers(3.50, None, 0.577)),
    Target("swiglu", _SWIGLU, "forward", 0.24, 0.24, _peers(0.393, 0.236, 0.238)),
    Target("swiglu", _SWIGLU, "backward", 0.40, 0.40, _peers(0.700, 0.393, 0.394)),
    Target("linear_cross_entropy", _TRAINED, BOTH, 40, 36, _peers(52.9, 38.8, 65.5, cce=161), 1.4, 1.3),
    Target("linear_cross_entropy", _FROZEN, BOTH, 28, 24.5, _peers(40.8, 26.3, 31.6, cce=88), 0.35, 0.3),
)


@dataclass(frozen=True)
class Verdict:
    """How one row of ours stands to its must. ``ratios``: peer -> (ratio that the must allows, ratio measured here)."""

    target: Target
    status: str
    fraction: float | None = None
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    peak_gib: float | None = None
    dweight_error: float | None = None

    @property
    def fraction_holds(self) -> bool | None:
        return None if self.fraction is None else self.fraction >= self.target.must_fraction()

    @property
    def best_peer(self) -> str | None:
        """The fastest peer of this run that the target names: the one we are measured against."""
        return max(self.ratios, key=lambda peer: self.ratios[peer][1], default=None)

    @property
    def ratio_holds(self) -> bool | None:
        if self.best_peer is None:
            return None
        allowed, measured = self.ratios[self.best_peer]
        return measured <= allowed

    @property
    def memory_holds(self) -> bool | None:
        if self.peak_gib is None or self.target.must_gib is None:
            return None
        return self.peak_gib <= self.target.must_gib

    @property
    def dweight_holds(self) -> bool | None:
        return None if self.dweight_error is None else self.dweight_error <= DWEIGHT_ERROR_MUST


def time_of(row: dict) -> float | None:
    """Milliseconds that a row is compared by: device time where it was captured, else from Python."""
    return row["graph_ms"] if row["graph_ms"] is not None else row["python_ms"]


def judge(target: Target, rows: list[dict], ours: str = "m3kernels") -> Verdict | None:
    """A verdict from a run's rows, None where ours was not run. Device times where both have them, else from Python."""
    group = {r["peer"]: r for r in rows if (r["op"], r["label"], r["direction"]) == _key(target)}
    if ours not in group:
        return None
    mine = group[ours]
    if time_of(mine) is None:
        return Verdict(target, mine["status"])
    ratios = {}
    for peer, h100_ms in target.peers_ms.items():
        row = group.get(peer)
        if row is None or time_of(row) is None:
            continue
        column = "graph_ms" if mine["graph_ms"] is not None and row["graph_ms"] is not None else "python_ms"
        ratios[peer] = (target.must_ms / h100_ms, mine[column] / row[column])
    return Verdict(
        target,
        mine["status"],
        fraction=mine["limit_ms"] / time_of(mine),
        ratios=ratios,
        peak_gib=None if mine["peak_bytes"] is None else mine["peak_bytes"] / 2**30,
        dweight_error=mine.get("dweight_error_over_one_gemm"),
    )


def _key(target: Target) -> tuple[str, str, str]:
    return target.op, target.label, target.direction


def _holds(value: bool | None) -> str:
    return {None: "–", True: "holds", False: "MISSED"}[value]


def table(rows: list[dict]) -> str:
    """One line per target that this run touched: must and measured, in both terms."""
    lines = [
        "",
        "must (from one H100), by fraction of the limit | by ratio to the best peer of this run | memory, dweight",
    ]
    for target in TARGETS:
        verdict = judge(target, rows)
        if verdict is None:
            continue
        name = f"{target.op} {target.label} {target.direction}"
        if verdict.fraction is None:
            lines.append(f"{name:<66} {verdict.status}")
            continue
        line = f"{name:<66} {100 * verdict.fraction:5.1f} % of {100 * target.must_fraction():5.1f} %"
        line += f" {_holds(verdict.fraction_holds):<6} |"
        if verdict.best_peer is not None:
            allowed, measured = verdict.ratios[verdict.best_peer]
            line += f" {measured:.3f} of {allowed:.3f} x {verdict.best_peer} {_holds(verdict.ratio_holds)}"
        if verdict.memory_holds is not None:
            line += f" | {verdict.peak_gib:.2f} of {target.must_gib} GiB {_holds(verdict.memory_holds)}"
        if verdict.dweight_holds is not None:
            line += (
                f", dweight error {verdict.dweight_error:.2f} of {DWEIGHT_ERROR_MUST} {_holds(verdict.dweight_holds)}"
            )
        lines.append(line)
    return "\n".join(lines)
