"""README's table and the roofline picture, from the newest result file.

    python -m m3kernels.bench.report [--check] [--file FILE.jsonl] [--musts]

Rewrites README.md between ``<!-- bench:ops -->`` and ``<!-- /bench:ops -->`` and draws docs/bench-ops.svg. ``--check``
writes nothing and exits 1 when the README differs from what the file gives.
"""

import argparse
import json
import sys
from pathlib import Path

from m3kernels.bench import targets
from m3kernels.bench.cases import BOTH, CASES, OPS
from m3kernels.bench.peers import OURS, TITLES
from m3kernels.bench.targets import time_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- bench:ops -->", "<!-- /bench:ops -->"
COLUMNS = ("eager", "torch.compile", "liger")
NAMES = {
    "rms_norm": "RMSNorm",
    "add_rms_norm": "residual add + RMSNorm",
    "rotary": "rotary + query scale",
    "swiglu": "SwiGLU",
    "linear_cross_entropy": "linear cross-entropy",
}
Group = dict[str, dict]


def newest(results: Path = RESULTS) -> Path | None:
    """The result file with the latest date in its header; None if there is no result at all."""
    dated = [(read(path)[0]["date"], str(path)) for path in sorted(results.glob("*/*.jsonl"))]
    return Path(max(dated)[1]) if dated else None


def read(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows). A line cut short by a timeout is left out if it is the last one.

    Raises:
        ValueError: the file does not begin with a header, or a line inside it is broken.
    """
    lines = path.read_text().splitlines()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    if not parsed or parsed[0].get("kind") != "header":
        raise ValueError(f"{path}: the first line is not a header; it was not written by m3kernels.bench.ops")
    return parsed[0], [row for row in parsed[1:] if row["kind"] == "row"]


def groups(rows: list[dict]) -> dict[tuple[str, str, str], Group]:
    """(op, label, direction) -> peer -> row, in the benchmark's order."""
    found: dict[tuple[str, str, str], Group] = {}
    for case in CASES:
        for direction in OPS[case.op].directions:
            key = (case.op, case.label, direction)
            group = {r["peer"]: r for r in rows if (r["op"], r["label"], r["direction"]) == key}
            if group:
                found[key] = group
    return found


def best_peer(group: Group, among: tuple[str, ...] | None = None) -> dict | None:
    """The fastest row that is not ours; ``among`` limits the peers."""
    timed = [r for p, r in group.items() if p != OURS and (among is None or p in among) and time_of(r) is not None]
    return min(timed, key=time_of, default=None)


def milliseconds(ms: float) -> str:
    """Three significant digits, never fewer than the whole milliseconds."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1}f}"


def cell(row: dict | None, fastest: bool = False) -> str:
    """One time: bold if the fastest of its line, † if from Python, ≈ if imprecise; WRONG, failed or – without one."""
    if row is None or row["status"] == "missing":
        return "–"
    if time_of(row) is None:
        return row["status"]
    text = milliseconds(time_of(row)) + ("" if row["graph_ms"] is not None else "†")
    text = f"**{text}**" if fastest else text
    return text if row["status"] == "ok" else f"{text} ≈{row['error_over_eager']:.0f}×"


def _is(row: dict | None, fastest: dict | None) -> bool:
    return row is not None and row is fastest


def title(key: tuple[str, str, str]) -> str:
    op, label, direction = key
    return f"{NAMES[op]} {label}" + ("" if direction == BOTH else f", {direction}")


def other_cell(group: Group, fastest: dict | None) -> str:
    """The best of the peers without a column of their own, named; where none has a time, what became of them."""
    others = tuple(p for p in group if p not in COLUMNS and p != OURS)
    best = best_peer(group, others)
    if best is not None:
        return f"{cell(best, best is fastest)} ({TITLES[best['peer']]})"
    fates = [f"{cell(group[p])} ({TITLES[p]})" for p in others if group[p]["status"] != "missing"]
    return ", ".join(fates) or "–"


def table_line(key: tuple[str, str, str], group: Group) -> str:
    timed = [r for r in group.values() if time_of(r) is not None]
    fastest = min(timed, key=time_of, default=None)
    ours = group.get(OURS)
    share = "–" if ours is None or ours.get("percent_of_limit") is None else f"{ours['percent_of_limit']:.0f} %"
    cells = [title(key), *(cell(group.get(peer), _is(group.get(peer), fastest)) for peer in COLUMNS)]
    cells += [other_cell(group, fastest), cell(ours, _is(ours, fastest)), share, memory(key[0], group)]
    return "| " + " | ".join(cells) + " |"


def memory(op: str, group: Group) -> str:
    """Ours, and eager's for comparison, in GiB above the inputs, for ops that are about memory."""
    ours, eager = group.get(OURS), group.get("eager")
    if not OPS[op].report_memory or ours is None or ours["peak_bytes"] is None:
        return ""
    text = f"{ours['peak_bytes'] / 2**30:.2f} GiB"
    return text if eager is None or eager["peak_bytes"] is None else f"{text} (eager {eager['peak_bytes'] / 2**30:.1f})"


def caption(head: dict, path: Path) -> str:
    versions = ", ".join(f"{name} {head['versions'][name]}" for name in ("torch", "triton", "transformers"))
    present = {p: v for p, v in head["peers"].items() if not v.startswith("missing")}
    libraries = "".join(f", {TITLES[p]} {v}" for p, v in present.items())
    copy, gemm = head["ceilings"]["copy_bytes_s"] / 1e12, max(head["ceilings"]["gemm_flops_s"].values()) / 1e12
    absent = [TITLES[p] for p in head["peers"] if p not in present]
    return (
        f"Milliseconds on one {head['gpu']} (driver {head['driver']}), bf16, {versions}{libraries}; {head['date'][:10]}, "
        f"commit {head['commit']}, `{path.parent.name}/{path.name}`"
        + (", a `--quick` run" if head.get("quick") else "")
        + ". Medians of device time (CUDA graph, cold L2), peers interleaved, each checked against fp64 first; bold is "
        f"the fastest. % of limit: bytes at the measured copy rate ({copy:.2f} TB/s) or FLOPs at a bare GEMM's "
        f"(up to {gemm:.0f} TFLOP/s). † timed from Python with its host time; ≈n× is n times eager's own error; "
        "– was not run or does not exist" + (f"; not importable: {', '.join(absent)}." if absent else ".")
    )


def render(path: Path) -> str:
    """The README's section: table and caption."""
    head, rows = read(path)
    titles = ["op and shape", "eager", "torch.compile", "Liger", "other best", "m3kernels", "% of limit", "peak memory"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    lines += [table_line(key, group) for key, group in groups(rows).items()]
    return "\n".join([*lines, "", caption(head, path)])


def section(readme: str) -> str:
    """What stands between the two markers.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no place for the table: put {BEGIN} and {END} on lines of their own")
    return readme.split(BEGIN, 1)[1].split(END, 1)[0].strip()


def insert(readme: str, text: str) -> str:
    section(readme)
    before, after = readme.split(BEGIN, 1)[0], readme.split(END, 1)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def draw(path: Path, target: Path) -> None:
    """Share of the limit for ours and the best peer, one pair of bars a row; the same bytes for the same file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    head, rows = read(path)
    lines = [(k, g) for k, g in groups(rows).items() if OURS in g and time_of(g[OURS]) is not None]
    style = {"svg.hashsalt": "m3kernels", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 0.8 + 0.42 * len(lines)), layout="constrained")
        for i, (_, group) in enumerate(lines):
            peer = best_peer(group)
            axes.barh(i - 0.19, group[OURS]["percent_of_limit"], 0.36, color="#d9480f")
            if peer is not None:
                axes.barh(i + 0.19, peer["percent_of_limit"], 0.36, color="#868e96")
                name = TITLES.get(peer["peer"], peer["peer"])
                axes.text(peer["percent_of_limit"] + 0.5, i + 0.19, name, va="center", fontsize=7)
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [title(key) for key, _ in lines])
        axes.invert_yaxis()
        axes.set_xlim(0, 115)
        axes.set_xlabel(f"% of the measured copy or GEMM rate, {head['gpu']} (orange: m3kernels, grey: best peer)")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="svg", metadata={"Date": None})
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m m3kernels.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README differs")
    parser.add_argument("--file", type=Path, help="default: the newest under bench/results")
    parser.add_argument("--musts", action="store_true", help="print which targets hold, and write nothing")
    args = parser.parse_args(argv)
    path = args.file or newest()
    if path is None:
        print(f"no result file under {RESULTS}: run python -m m3kernels.bench.ops on a GPU first", file=sys.stderr)
        return 2
    if args.musts:
        print(targets.table(read(path)[1]))
        return 0
    readme = ROOT / "README.md"
    try:
        text, old = render(path), readme.read_text()
        new = insert(old, text)
    except (OSError, ValueError) as error:
        print(f"cannot update {readme}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if old != new:
            print(f"README.md differs from {path}: run python -m m3kernels.bench.report", file=sys.stderr)
        return int(old != new)
    readme.write_text(new)
    try:
        draw(path, ROOT / "docs" / "bench-ops.svg")
    except ImportError:
        print("matplotlib is not installed: docs/bench-ops.svg was not drawn", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
