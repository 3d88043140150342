"""Tables of the ops: README's compact one, and the two of docs/benchmarks.md. Captions, numbers and cells for all."""

from m3kernels.bench.cases import CASES, OPS
from m3kernels.bench.ops import GEMM_CEILING
from m3kernels.bench.peers import OURS, TITLES
from m3kernels.bench.rows import (
    Group,
    Source,
    Time,
    fastest,
    groups,
    is_ours,
    number,
    op_time,
    peer_title,
    share_of_limit,
    time_of,
)
from m3kernels.bench.spec import BOTH

COLUMNS = ("eager", "torch.compile", "liger")
NAMES = {
    "rms_norm": "RMSNorm",
    "add_rms_norm": "residual add + RMSNorm",
    "rotary": "rotary + query scale",
    "swiglu": "SwiGLU",
    "linear_cross_entropy": "linear cross-entropy",
    "attention": "attention",
    "lora_linear": "LoRA linear",
    "dora_linear": "DoRA linear",
    "fp8_linear": "linear, FP8 weight",
    "fp8_lora_linear": "LoRA linear, FP8 weight",
}
BY_HAND = "Liger has no Ministral 3 patch"
Key = tuple[str, str, str]


def op_groups(rows: list[dict]) -> dict[Key, Group]:
    """(op, label, direction) -> peer -> row, in the benchmark's order; shapes that it no longer has come last."""
    found = {key[1:]: group for key, group in groups(rows).items()}
    order = [(case.op, case.label, direction) for case in CASES for direction in OPS[case.op].directions]
    return {key: found[key] for key in [*order, *found] if key in found}


def apart(found: dict[Key, Group]) -> dict[Key, Group]:
    """Without forward+backward of a shape that has each by itself: for where there is little room."""
    shapes = {key[:2] for key in found if key[2] != BOTH}
    return {key: group for key, group in found.items() if key[2] != BOTH or key[:2] not in shapes}


def spread(time: Time | None) -> str:
    """``median (p20–p80)``."""
    if time is None:
        return "–"
    if time.p20 is None or time.p80 is None:
        return number(time.median)
    return f"{number(time.median)} ({number(time.p20)}–{number(time.p80)})"


def escape(text: str) -> str:
    """One line that a Markdown table and an HTML page can hold."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def markdown(titles: list[str], lines: list[list[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * left + "---:|" * (len(titles) - left)]
    return "\n".join(head + ["| " + " | ".join(line) + " |" for line in lines])


def milliseconds(ms: float) -> str:
    """Three significant digits, never fewer than the whole milliseconds."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1}f}"


def cell(row: dict | None, best: dict | None = None) -> str:
    """One time: bold if it is ``best``, † if from Python, ≈ if imprecise; what became of it, or –, without one."""
    if row is None or row["status"] == "missing":
        return "–"
    time = time_of(row)
    if time is None:
        return row["status"]
    text = milliseconds(time.median) + ("†" if time.clock == "python" else "")
    text = f"**{text}**" if row is best else text
    if row["status"] == "imprecise" and row.get("error_over_eager") is not None:
        return f"{text} ≈{row['error_over_eager']:.0f}×"
    return text if row["status"] == "ok" else f"{text} ({row['status']})"


def quickest(group: Group) -> dict | None:
    timed = [r for r in group.values() if time_of(r) is not None]
    return min(timed, key=lambda r: time_of(r).median, default=None)


def title(key: Key) -> str:
    op, label, direction = key
    return f"{op_name(op)} {with_direction(label, op, direction)}"


def op_name(op: str) -> str:
    return NAMES.get(op, op.replace("_", " "))


def with_direction(label: str, op: str, direction: str, between: str = ", ") -> str:
    """The direction goes without saying where an op has one only."""
    only = op in OPS and OPS[op].directions == (direction,)
    return label if only else f"{label}{between}{direction}"


def other_cell(group: Group, best: dict | None, columns: tuple[str, ...] = COLUMNS) -> str:
    """The best of the peers without a column of their own, named; where none has a time, what became of them."""
    others = tuple(p for p in group if p not in columns and not is_ours(p))
    other = fastest(group, ours=False, among=others)
    if other is not None:
        return f"{cell(other, best)} ({peer_title(other['peer'])})"
    return ", ".join(f"{cell(group[p])} ({peer_title(p)})" for p in others if group[p]["status"] != "missing") or "–"


def share(row: dict | None) -> str:
    percent = None if row is None else share_of_limit(row)
    return "–" if percent is None else f"{percent:.0f} %"


def times(key: Key, group: Group) -> list[str]:
    """Title, the peers' times, ours, our share of the limit."""
    best, ours = quickest(group), group.get(OURS)
    cells = [title(key), *(cell(group.get(peer), best) for peer in COLUMNS)]
    return cells + [other_cell(group, best), cell(ours, best), share(ours)]


def memory(group: Group) -> str:
    """Ours in GiB above the inputs, and eager's for comparison."""
    ours, eager = group.get(OURS), group.get("eager")
    if ours is None or ours.get("peak_bytes") is None:
        return ""
    text = f"{number(ours['peak_bytes'] / 2**30)} GiB"
    theirs = None if eager is None else eager.get("peak_bytes")
    return text if theirs is None else f"{text} (eager {number(theirs / 2**30)})"


def readme_ops(source: Source) -> str:
    """The compact table: the ops that we have, each direction by itself where it was."""
    titles = ["op and shape", "eager", "torch.compile", "Liger", "other best", "m3kernels", "% of limit", "peak memory"]
    lines = []
    for key, group in apart(op_groups(source.rows)).items():
        if OURS in group:
            op = OPS.get(key[0])
            lines.append([*times(key, group), memory(group) if op is None or op.report_memory else ""])
    return markdown(titles, lines)


def overview(source: Source) -> str:
    """Every shape with the best of its peers: times, host time, memory, error."""
    titles = ["op and shape", "eager", "torch.compile", "Liger", "other best", "m3kernels", "% of limit"]
    titles += ["host µs", "host µs, best peer", "peak memory", "error ÷ eager's"]
    lines = []
    for key, group in op_groups(source.rows).items():
        ours, peer = group.get(OURS, {}), fastest(group, ours=False)
        theirs = "–" if peer is None else f"{number(peer.get('host_us'))} ({peer_title(peer['peer'])})"
        line = [*times(key, group), number(ours.get("host_us")), theirs, memory(group) or "–"]
        lines.append([*line, number(ours.get("error_over_eager"))])
    return markdown(titles, lines)


def every_peer(source: Source) -> str:
    """One table an op: every peer with both clocks and their spread; what failed stands there with its reason."""
    titles = ["shape", "peer", "device ms", "from Python ms", "host µs", "% of limit", "peak MiB", "error ÷ eager's"]
    tables: dict[str, list[list[str]]] = {}
    for (op, label, direction), group in op_groups(source.rows).items():
        for i, row in enumerate(group.values()):
            where = "" if i else with_direction(label, op, direction)
            tables.setdefault(op, []).append([where, *_peer_line(row)])
    parts = []
    for op, lines in tables.items():
        parts += [f"#### {op_name(op)}", markdown([*titles, "status"], lines, left=2)]
        parts += [uncaptured([r for r in source.rows if r["op"] == op])]
    return "\n\n".join(part for part in parts if part)


def _peer_line(row: dict) -> list[str]:
    device, python = op_time(row), op_time(row, python=True)
    device = None if device is None or device.clock == "python" else device
    mib = None if row.get("peak_bytes") is None else row["peak_bytes"] / 2**20
    line = [peer_title(row["peer"]), spread(device), spread(python), number(row.get("host_us")), share(row)]
    return [*line, number(mib), number(row.get("error_over_eager")), status(row)]


def status(row: dict) -> str:
    """What became of a row, with the reason; and that it writes into its inputs, which the others do not."""
    text = f"{row['status']}: {row['reason']}" if row.get("reason") else row["status"]
    if row.get("overwrites"):
        text += f"; writes into {', '.join(row['overwrites'])}"
    return escape(text)


def uncaptured(rows: list[dict]) -> str:
    """Why rows with a time have no device time, each reason once with its peers."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.get("graph_reason"):
            peers = reasons.setdefault(row["graph_reason"], [])
            peers += [] if peer_title(row["peer"]) in peers else [peer_title(row["peer"])]
    return "\n".join(f"No device time of {', '.join(p)}: {escape(reason)}." for reason, p in reasons.items())


def machine(source: Source, before: Source | None = None) -> str:
    """GPU, driver, versions, date, commit, file, and whether it was a quick run; the file of ``before`` is known."""
    if before is not None and before.path == source.path:
        return "the same machine, in the same run"
    head = source.head
    versions = head.get("versions", {})
    libraries = [f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name)]
    peers = head.get("peers", {})
    libraries += [f"{peer_title(p)} {v}" for p, v in peers.items() if not v.startswith("missing")]
    return (
        f"one {head['gpu']} (driver {head.get('driver') or 'unknown'}), bf16, {', '.join(libraries)}; {head['date'][:10]}, "
        f"commit {head['commit']}, `{source.name}`" + (", a `--quick` run" if head.get("quick") else "")
    )


def absent(source: Source) -> str:
    names = [TITLES.get(p, p) for p, v in source.head.get("peers", {}).items() if v.startswith("missing")]
    return f"; not importable: {', '.join(names)}" if names else ""


def copy_rate(source: Source) -> str:
    return f"{source.head['ceilings']['copy_bytes_s'] / 1e12:.2f} TB/s"


def gemm_rate(source: Source) -> str:
    """Of the GEMM that FLOPs are held against."""
    rates = source.head["ceilings"]["gemm_flops_s"]
    return f"{rates.get(GEMM_CEILING, max(rates.values())) / 1e12:.0f} TFLOP/s"


def ops_caption(source: Source) -> str:
    return (
        f"Milliseconds on {machine(source)}. Medians of device time (CUDA graph, cold L2), peers interleaved, each checked "
        f"against fp64 first; bold is the fastest. % of limit: bytes at the measured copy rate ({copy_rate(source)}) or FLOPs "
        f"at a bare GEMM's ({gemm_rate(source)}). † timed from Python with its host time; ≈n× is n times eager's own error; "
        f"– was not run or does not exist{absent(source)}. {BY_HAND}: its functions are called by hand."
    )


def broken(source: Source) -> str:
    """The cases that broke or were skipped as a whole, one a line."""
    lines = [f"{r.get('op', '')} {r.get('label', '')}".strip() + f": {escape(r['reason'])}" for r in source.broken]
    return "\n".join(f"- not measured: {line}" for line in lines)
