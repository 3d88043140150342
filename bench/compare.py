"""Two result files row by row: what of ours became slower, larger, less exact, wrong or missing.

    m3kernels bench compare [BASE] NEW [--fail-over 5%] [--peer NAME]... [--force]

Without BASE it is the newest file in the store of the same GPU. Rows are paired by what they measure and by peer. Rows of
``m3kernels`` decide (``--peer`` names others); the peers' code is the same in both runs, so how far their times moved is
printed as the noise between the two. What fails, with exit code 1:

- slower: the median grew by more than ``--fail-over`` and the new p20 is above the old p80. The second holds back noise of
  rows that scatter more than the limit (host time, kernels of a few microseconds); a row without a spread goes by its
  medians. Times on two clocks are not compared: device time where both have it, else the time from Python.
- graph: a device time that could be captured before and cannot now, since the call then synchronises or allocates anew.
- memory: the peak grew by more than ``--fail-over`` and by more than 1 MiB, which is as fine as the allocator counts
  small tensors. It has no spread: it repeats to the byte.
- error: it grew by more than ``--fail-over`` and is above what cannot be told from rounding: eager's own error for an op,
  half of its bound for a model. Below that, less exact is not worse. One that is no longer known fails too.
- first token (decoding): its median grew by more than twice ``--fail-over``; it has no spread.
- compiled (decoding): more graphs were traced, or more functions refused a CUDA graph.
- status: ok before, now WRONG, failed, missing, oom or skipped.
- vanished: in BASE and not in NEW, though NEW ran its suite; in a ``--quick`` run beside a full one it is only listed.

Of an op whose device time is captured, host time is not compared here: that is the ``host`` suite's.

New rows are listed. Exit code 2: a file cannot be read, nothing can be paired, or the GPUs differ and ``--force`` was not
given: milliseconds of two GPUs do not compare, and neither do their GEMMs' roundings.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from m3kernels.bench import results
from m3kernels.bench.report_e2e import cell_title
from m3kernels.bench.report_tables import spread, title
from m3kernels.bench.rows import EVERYONE, TIMED, cell, is_ours, number, op_time, peak_gib, peer_title, time_of

MIB = 2.0**-10
Rows = dict[tuple, dict]


@dataclass(frozen=True)
class Pair:
    """One row in both files; ``failed`` names what fails, ``notes`` what does not and is worth a word."""

    base: dict
    new: dict
    change: float | None = None
    memory: float | None = None
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def threshold(text: str) -> float:
    """``5%`` or ``0.05``.

    Raises:
        argparse.ArgumentTypeError: neither, negative, or a bare number of 1 and more, which could mean either.
    """
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < (10 if percent else 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 5% or 0.05")
    return value


def identified(rows: list[dict]) -> Rows:
    """(cell, peer) -> row; what is about a whole cell is nobody's row."""
    return {(*cell(row), row["peer"]): row for row in rows if row["kind"] != "error" and row["peer"] != EVERYONE}


def name(row: dict) -> str:
    """A row in words."""
    where = cell(row)
    if row["kind"] == "row":
        text = title(where[1:])
    elif row["kind"] == "host":
        text = f"host {row['what']}, {row['pass']}"
    else:
        text = cell_title(where)
    return f"{text}, {peer_title(row['peer'])}"


def pair(base: dict, new: dict, limit: float) -> Pair:
    """Judges one row of both files."""
    if new["status"] not in TIMED or base["status"] not in TIMED:
        return _by_status(base, new)
    failed, notes = [], []
    change, slower = _slower(base, new, limit)
    if slower == "slower":
        failed.append(slower)
    elif slower:
        notes.append(slower)
    if base.get("graph_ms") is not None and new.get("graph_ms") is None:
        failed.append(f"graph: no longer captured ({new.get('graph_reason') or 'no reason given'})")
    memory = _growth(peak_gib(base), peak_gib(new))
    if memory is not None and memory > limit and peak_gib(new) - peak_gib(base) > MIB:
        failed.append(f"memory: {number(peak_gib(base))} to {number(peak_gib(new))} GiB")
    failed += _errors(base, new, limit) + _first_token(base, new, limit) + _recorded(base, new)
    return Pair(base, new, change, memory, failed, notes)


def _by_status(base: dict, new: dict) -> Pair:
    reason = f"{base['status']} before, now {new['status']}" + (f": {new['reason']}" if new.get("reason") else "")
    if base["status"] in TIMED:
        return Pair(base, new, failed=[f"status: {reason}"])
    return Pair(base, new, notes=[reason])


def _times(base: dict, new: dict):
    """Both times on one clock, None where there is none that both have."""
    found = time_of(base), time_of(new)
    if base["kind"] == "row" and None not in found and found[0].clock != found[1].clock:
        found = op_time(base, python=True), op_time(new, python=True)
    return None if None in found else found


def _slower(base: dict, new: dict, limit: float) -> tuple[float | None, str]:
    """(change of the median, "slower", a note, or nothing)."""
    times = _times(base, new)
    if times is None:
        return None, "no time on a clock that both have"
    before, after = times
    change = after.median / before.median - 1
    if change <= limit:
        return change, ""
    apart = after.p20 is None or before.p80 is None or after.p20 > before.p80
    return change, "slower" if apart else "slower, but within the spread"


def _growth(base: float | None, new: float | None) -> float | None:
    if base is None or new is None:
        return None
    return new / base - 1 if base else float("inf") if new else 0.0


def _errors(base: dict, new: dict, limit: float) -> list[str]:
    failed = []
    for column, floor in error_floors(new).items():
        before, after = base.get(column), new.get(column)
        if before is not None and after is None:
            failed.append(f"error: {column} {before:.3g} before, now unknown")
        if None not in (before, after) and after > floor and after > (1 + limit) * before:
            failed.append(f"error: {column} {before:.3g} to {after:.3g}")
    return failed


def _first_token(base: dict, new: dict, limit: float) -> list[str]:
    """Time to first token is measured once a call and has no spread: twice the limit, by its median."""
    growth = _growth(base.get("ttft_ms"), new.get("ttft_ms"))
    if growth is None or growth <= 2 * limit:
        return []
    return [f"first token: {number(base['ttft_ms'])} to {number(new['ttft_ms'])} ms"]


def _recorded(base: dict, new: dict) -> list[str]:
    """A compiled decoding that is traced more often, or whose CUDA graphs are refused, is another thing than before."""
    columns = ("graphs", "cudagraph_skips")
    pairs = [(c, base.get(c), new.get(c)) for c in columns]
    return [f"compiled: {c} {was} to {now}" for c, was, now in pairs if None not in (was, now) and now > was]


def error_floors(row: dict) -> dict[str, float]:
    """The columns of a row's errors, and up to where one is not worse than another."""
    if row["kind"] == "row":
        return {"error_over_eager": 1.0, "dweight_error_over_one_gemm": 1.0}
    return {f"{name}_error": bound / 2 for name, bound in (row.get("bound") or {}).items()}


@dataclass(frozen=True)
class Comparison:
    """Two files' rows: those in both, the vanished ones (with whether that fails and why not), and the new ones."""

    pairs: list[Pair]
    vanished: list[tuple[dict, bool, str]]
    added: list[dict]

    def failures(self, decides) -> int:
        """How many rows fail; ``decides``: peer -> whether its rows count."""
        rows = [pair.new for pair in self.pairs if pair.failed] + [row for row, fails, _ in self.vanished if fails]
        return sum(decides(row["peer"]) for row in rows)


def compare(base: tuple[dict, list[dict]], new: tuple[dict, list[dict]], limit: float) -> Comparison:
    """Pairs two files as :func:`results.read` gives them."""
    before, after = identified(base[1]), identified(new[1])
    pairs = [pair(before[key], after[key], limit) for key in before if key in after]
    vanished = [(row, *_vanished(row, base[0], new)) for key, row in before.items() if key not in after]
    return Comparison(pairs, vanished, [row for key, row in after.items() if key not in before])


def _vanished(row: dict, base_head: dict, new: tuple[dict, list[dict]]) -> tuple[bool, str]:
    """(whether it fails, why or why not)."""
    head, rows = new
    if row["kind"] not in kinds(head, rows):
        return False, "its suite was not run"
    if head.get("quick") and not base_head.get("quick"):
        return False, "a --quick run measures fewer"
    for other in rows:
        if other["kind"] == "error":
            suite = results.SUITES.get(other.get("suite")) == row["kind"]
            whole = suite or (other.get("op"), other.get("label")) == (row.get("op"), row.get("label"))
        else:
            whole = other["peer"] == EVERYONE and cell(other) == cell(row)
        if whole:
            return True, f"the whole cell: {other['reason']}"
    return True, "not in NEW"


def kinds(head: dict, rows: list[dict]) -> set[str]:
    """The kinds of row that a run was to give: by its suites; files from before suites have what they hold."""
    suites = head.get("suites")
    return {results.SUITES[s] for s in suites} if suites else {r["kind"] for r in rows} - {"error"}


def drift(comparison: Comparison, decides) -> str:
    """How far the times of the rows that do not decide lie apart: the noise of the two runs."""
    changes = [p.change for p in comparison.pairs if p.change is not None and not decides(p.new["peer"])]
    if not changes:
        return "no peer was timed in both runs, so their noise is not known"
    middle = statistics.median(changes)
    return (
        f"noise: the peers' times moved by {_percent(middle)} (median of {len(changes)} rows, from {_percent(min(changes))} "
        f"to {_percent(max(changes))})"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"


def heads(base: dict, new: dict) -> list[str]:
    """What the two runs do not share: GPU, driver, versions, length of the run."""
    pairs = {"GPU": (base["gpu"], new["gpu"]), "driver": (base.get("driver"), new.get("driver"))}
    pairs["--quick"] = bool(base.get("quick")), bool(new.get("quick"))
    for group in ("versions", "peers"):
        names = dict.fromkeys([*base.get(group, {}), *new.get(group, {})])
        pairs |= {n: (base.get(group, {}).get(n), new.get(group, {}).get(n)) for n in names}
    return [f"{what} differs: {old}, now {now}" for what, (old, now) in pairs.items() if old != now]


def table(comparison: Comparison, decides) -> str:
    """The rows that decide, failures and the worst change first; then peers whose status changed, vanished and new rows."""
    ours = sorted((p for p in comparison.pairs if decides(p.new["peer"])), key=_badness, reverse=True)
    lines = [f"{'':<4} {'change':>8} {'memory':>8}  {'before':<28} {'now':<28} row"] if ours else []
    lines += [_line(p) for p in ours]
    for p in comparison.pairs:
        if not decides(p.new["peer"]) and p.base["status"] != p.new["status"]:
            lines.append(
                f"     peer {name(p.new)}: {p.base['status']}, now {p.new['status']} {p.new.get('reason', '')}".rstrip()
            )
    for row, fails, why in comparison.vanished:
        if decides(row["peer"]):
            lines.append(f"{'FAIL' if fails else '':<4} vanished: {name(row)} ({why})")
    lines += [f"     new: {name(row)} ({row['status']})" for row in comparison.added if decides(row["peer"])]
    gone = sum(not decides(row["peer"]) for row, _, _ in comparison.vanished)
    added = sum(not decides(row["peer"]) for row in comparison.added)
    lines += [f"     of the peers {gone} rows vanished and {added} are new"] if gone or added else []
    return "\n".join(lines)


def _badness(p: Pair) -> tuple[bool, float]:
    return bool(p.failed), max(p.change if p.change is not None else 0.0, p.memory or 0.0)


def _line(p: Pair) -> str:
    times = [f"{spread(time)} {time.unit}" for time in _times(p.base, p.new) or ()] or ["–", "–"]
    text = f"{'FAIL' if p.failed else '':<4} {_percent(p.change):>8} {_percent(p.memory):>8}"
    text += f"  {times[0]:<28} {times[1]:<28} {name(p.new)}"
    remarks = "; ".join([*p.failed, *p.notes])
    return f"{text}: {remarks}" if remarks else text


def accepted(new_path: Path, head: dict, rows: list[dict]) -> Path | None:
    """The file in the store to compare with: same GPU, not NEW itself, a full run unless NEW is quick.

    Of those the one that shares most kinds of row with NEW, then the newest.
    """
    candidates = []
    for path in results.stored():
        other, theirs = results.read(path)
        if other.get("partial"):
            continue
        same = path.resolve() == new_path.resolve() or other["gpu"] != head["gpu"]
        if same or (other.get("quick") and not head.get("quick")):
            continue
        shared = {r["kind"] for r in theirs} & {r["kind"] for r in rows} - {"error"}
        if shared:
            candidates.append((len(shared), other["date"], str(path)))
    return Path(max(candidates)[2]) if candidates else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="m3kernels bench compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    # one argument: an optional positional before a required one cannot stand on both sides of an option
    add(
        "files",
        nargs="+",
        type=Path,
        metavar="[BASE] NEW",
        help="BASE: default the newest in the store of the same GPU",
    )
    add("--fail-over", type=threshold, default=0.05, metavar="SHARE", help="5%% or 0.05 (the default)")
    add("--peer", action="append", metavar="NAME", help="whose rows decide; may be repeated (default: m3kernels)")
    add("--force", action="store_true", help="compare runs of different GPUs")
    args = parser.parse_intermixed_args(argv)
    if len(args.files) > 2:
        parser.error(f"takes one or two files, got {len(args.files)}")
    *base, args.new = args.files
    args.base = base[0] if base else None
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 when a row fails, 2 when there is nothing that can be compared."""
    args = parse(argv)
    try:
        new = results.read(args.new)
        path = args.base or accepted(args.new, *new)
        if path is None:
            return _refuse(f"no other result of a {new[0]['gpu']} under {results.RESULTS}: name a BASE")
        base = results.read(path)
        compared = compare(base, new, args.fail_over)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    except KeyError as error:
        return _refuse(f"a row or header has no {error}: not written by this version of m3kernels bench")
    if base[0]["gpu"] != new[0]["gpu"] and not args.force:
        return _refuse(
            f"BASE is from a {base[0]['gpu']}, NEW from a {new[0]['gpu']}; --force compares them all the same"
        )
    decides = (lambda peer: peer in args.peer) if args.peer else is_ours
    known = {row["peer"] for _, rows in (base, new) for row in rows if "peer" in row}
    if unknown := set(args.peer or ()) - known:
        return _refuse(f"no row of peer {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if not any(decides(p.new["peer"]) for p in compared.pairs) and not compared.failures(decides):
        return _refuse(f"{path} and {args.new} have no row in common that decides")
    for which, where, head in (("BASE", path, base[0]), ("NEW", args.new, new[0])):
        print(f"{which:<4} {where} ({head['gpu']}, {head['date'][:10]}, commit {head['commit']})")
    print("\n".join([*heads(base[0], new[0]), drift(compared, decides), "", table(compared, decides)]))
    failed, paired = compared.failures(decides), sum(decides(p.new["peer"]) for p in compared.pairs)
    print(f"\n{failed} rows failed; {paired} are in both files; allowed: {_percent(args.fail_over)}")
    return int(failed > 0)


def _refuse(why: str) -> int:
    print(f"m3kernels bench compare: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
