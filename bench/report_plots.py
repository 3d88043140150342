"""Which pictures there are, and what of the rows each one shows. No matplotlib here: see report_draw."""

from collections.abc import Callable
from dataclasses import dataclass

from m3kernels.bench.cases import OPS
from m3kernels.bench.report_draw import Bars, Dots, Entry, Lines, Panel
from m3kernels.bench.report_e2e import cell_title
from m3kernels.bench.report_tables import apart, op_groups, op_name, title, with_direction
from m3kernels.bench.rows import Group, baseline, groups, number, peak_gib, share_of_limit, time_of
from m3kernels.bench.spec import BOTH

# ops whose shapes differ by how much they move or compute, in this order
SCALING = ("rms_norm", "rotary", "attention")


@dataclass(frozen=True)
class Plot:
    """One picture of one suite; ``without`` is what the page says where no row is for it."""

    name: str
    suite: str
    title: str
    legend: str
    without: str
    panels: Callable[[list[dict]], list[Panel]]
    columns: int = 2


def _shown(group: Group) -> list[dict]:
    """A peer whose package is not there is in the tables; in a picture it would be an empty line each time."""
    return [row for row in group.values() if row["status"] != "missing"]


def roofline(rows: list[dict]) -> list[Panel]:
    """Achieved bytes/s or FLOP/s of every peer, with the limit that the row was measured against."""
    panels = []
    for column, unit in (("bytes", "TB/s"), ("flops", "TFLOP/s")):
        lines, limits = [], []
        for key, group in apart(op_groups(rows)).items():
            row = next(iter(group.values()))
            if not _limits(row, column):
                continue
            # per millisecond in 1e9 is per second in 1e12
            work = row[column] / 1e9
            lines.append((title(key), _values(group, lambda r, work=work: work / time_of(r).median)))
            limits.append(work / row["limit_ms"])
        if lines:
            what = (
                "bytes that the op must move, over its time" if column == "bytes" else "FLOPs of the op, over its time"
            )
            panels.append(Dots(what, unit, lines, limits))
    return panels


def _limits(row: dict, column: str) -> bool:
    """Whether bytes or FLOPs are what limits the op: an op with FLOPs is limited by those."""
    return bool(row.get("limit_ms") and row.get(column)) and (column == "flops" or not row.get("flops"))


def speed(rows: list[dict]) -> list[Panel]:
    """Speed-up over eager, a panel an op."""
    panels: dict[str, list] = {}
    for (op, label, direction), group in apart(op_groups(rows)).items():
        base = baseline(group)
        if base is None:
            continue
        found = [(row, _over(base, row)) for row in _shown(group) if row is not base]
        entries = [Entry(r["peer"], v, r["status"] if v is None else f"{number(v)}×") for r, v in found]
        if entries:
            panels.setdefault(op, []).append((with_direction(label, op, direction, "\n"), entries))
    return [Bars(op_name(op), "times as fast as eager", lines, 1.0, True) for op, lines in panels.items()]


def _over(base: dict, row: dict) -> float | None:
    """Speed-up, None without a time."""
    return None if time_of(row) is None else time_of(base).median / time_of(row).median


def memory(rows: list[dict]) -> list[Panel]:
    """Peak memory of the ops that are about memory: of forward and backward together where that was run."""
    panels: dict[str, list] = {}
    found = op_groups(rows)
    for (op, label, direction), group in found.items():
        if direction != BOTH and (op, label, BOTH) in found:
            continue
        if op in OPS and OPS[op].report_memory and any(peak_gib(row) is not None for row in group.values()):
            panels.setdefault(op, []).append((with_direction(label, op, direction, "\n"), _values(group, peak_gib)))
    return [Bars(op_name(op), "peak GiB above the inputs", lines) for op, lines in panels.items()]


def _values(group: Group, value: Callable[[dict], float | None]) -> list[Entry]:
    found = [(row, value(row) if time_of(row) is not None else None) for row in _shown(group)]
    return [Entry(r["peer"], v, _fate(r) if v is None else number(v)) for r, v in found]


def _fate(row: dict) -> str:
    return "–" if row["status"] == "ok" else row["status"]


def op_scaling(rows: list[dict]) -> list[Panel]:
    """Share of the limit by size, for ops that were measured at several."""
    panels = []
    found: dict[tuple[str, str], dict[str, Group]] = {}
    for (op, label, direction), group in apart(op_groups(rows)).items():
        if op in SCALING:
            found.setdefault((op, direction), {})[label] = group
    for (op, direction), by_label in found.items():
        labels = sorted(by_label, key=lambda label: _limit(by_label[label]))
        if len(labels) > 1:
            series = _series([by_label[label] for label in labels], share_of_limit)
            panels.append(Lines(f"{op_name(op)}, {direction}", "% of the measured limit", labels, series))
    return panels


def _limit(group: Group) -> float:
    return max(row.get("limit_ms") or 0.0 for row in group.values())


def _series(by_size: list[Group], value: Callable[[dict], float | None]) -> dict[str, list[tuple[float | None, bool]]]:
    peers = dict.fromkeys(peer for group in by_size for peer in group)
    points = {
        p: [(value(g[p]) if p in g and time_of(g[p]) else None, _hollow(g.get(p))) for g in by_size] for p in peers
    }
    return {peer: found for peer, found in points.items() if any(y is not None for y, _ in found)}


def _hollow(row: dict | None) -> bool:
    return bool(row and row.get("recompute"))


def train_scaling(rows: list[dict]) -> list[Panel]:
    """Tokens a second by sequence length; where a length was run both ways, the faster one."""
    found: dict[tuple, dict[int, Group]] = {}
    for (_, size, modality, mode, seq, batch, _), group in groups(rows).items():
        if size is None or seq is None:
            continue
        best = found.setdefault((size, modality, mode, batch), {}).setdefault(seq, {})
        for peer, row in group.items():
            if peer not in best or (row.get("tokens_per_s") or 0) > (best[peer].get("tokens_per_s") or 0):
                best[peer] = row
    panels = []
    for (size, modality, mode, batch), by_seq in found.items():
        order = sorted(by_seq)
        series = _series([by_seq[seq] for seq in order], lambda row: row.get("tokens_per_s"))
        if len(order) > 1 and series:
            name = f"{str(size).upper()} {modality}, {mode}, batch {batch}"
            panels.append(Lines(name, "tokens/s", [f"S{seq}" for seq in order], series))
    return panels


def _model_bars(rows: list[dict], values: tuple[tuple[str, Callable[[dict], float | None]], ...]) -> list[Panel]:
    """A panel a quantity, with the cells as groups."""
    found = groups(rows)
    panels = []
    for unit, value in values:
        lines = [(_wrapped(key), _values(group, value)) for key, group in found.items() if _shown(group)]
        if any(entry.value is not None for _, entries in lines for entry in entries):
            panels.append(Bars(unit, unit, lines))
    return panels


def _wrapped(key: tuple) -> str:
    first, *others = cell_title(key).split(", ")
    half = (len(others) + 1) // 2
    return "\n".join(part for part in (first, ", ".join(others[:half]), ", ".join(others[half:])) if part)


def train_bars(rows: list[dict]) -> list[Panel]:
    return _model_bars(rows, (("tokens/s", lambda r: r.get("tokens_per_s")), ("peak GiB", peak_gib)))


def decode_bars(rows: list[dict]) -> list[Panel]:
    share = ("% of the copy rate", lambda r: None if r.get("bandwidth_share") is None else 100 * r["bandwidth_share"])
    return _model_bars(rows, (("ms a token", lambda r: r.get("ms_per_token")), share))


_FATES = "What has no value says why."
PLOTS = (
    Plot(
        "ops-roofline",
        "ops",
        "Achieved rate of each op",
        "The black bar is the ceiling measured in the same run; a rate over it beats a plain copy or a bare GEMM.",
        "no row with its bytes or FLOPs and a limit.",
        roofline,
        columns=1,
    ),
    Plot("ops-speed", "ops", "Speed-up over eager", f"Logarithmic. {_FATES}", "no op was timed beside eager.", speed),
    Plot("ops-memory", "ops", "Peak memory of ops", _FATES, "no op that is about memory was run.", memory),
    Plot(
        "ops-scaling",
        "ops",
        "Share of the limit by size",
        "Sizes by what they move or compute.",
        "no op was run at more than one size.",
        op_scaling,
    ),
    Plot("train", "train", "Training step", _FATES, "no step was timed.", train_bars),
    Plot(
        "train-scaling",
        "train",
        "Training by sequence length",
        "Hollow: activations recomputed.",
        "no cell was run at more than one length.",
        train_scaling,
    ),
    Plot("decode", "decode", "Decoding", _FATES, "no token was timed.", decode_bars),
)
