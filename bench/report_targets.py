"""The table of targets that docs/benchmarks.md ends with: must, goal, measured, and which of them hold."""

from m3kernels.bench import targets
from m3kernels.bench.report_e2e import cell_title
from m3kernels.bench.report_tables import markdown, title
from m3kernels.bench.rows import Source, number, peer_title
from m3kernels.bench.targets import Check, Target, Verdict

NOTE = (
    "Must and goal are milliseconds on one H100 ([`bench/targets.py`](../bench/targets.py)). In brackets: what the must and "
    "the goal ask for. On an H100 the milliseconds count as well; on another GPU its memory and processor stand in another "
    "ratio, so a bound is carried over as a share of the limit and as a ratio to the best peer of the same run, and neither "
    "is exact: where they disagree, both answers stand there."
)
TITLES = {"ms": "ms", "limit": "% of limit", "ratio": "ratio", "memory": "memory", "dweight": "dweight error"}


def targets_table(found: dict[str, Source]) -> str:
    """One line per target: those of suites without results, and rows that were not run, say so."""
    titles = [
        "target",
        "must ms",
        "goal ms",
        "measured ms",
        "% of limit",
        "over the best peer",
        "memory GiB",
        "must",
        "goal",
    ]
    lines = []
    for suite, group in (("ops", targets.TARGETS), ("train", _of("train")), ("decode", _of("decode"))):
        source = found.get(suite)
        for target in group:
            verdict = None if source is None else targets.judge(target, source.rows, head=source.head)
            lines.append(_line(target, verdict))
    return "\n\n".join([NOTE, markdown(titles, lines)])


def _of(kind: str) -> list[Target]:
    return [target for target in targets.MODEL_TARGETS if target.cell[0] == kind]


def target_title(target: Target) -> str:
    if target.cell[0] == "row":
        return title(target.cell[1:])
    return cell_title(target.cell if target.cell[0] == "train" else (*target.cell, None, None))


def _line(target: Target, verdict: Verdict | None) -> list[str]:
    line = [target_title(target), number(target.must_ms), number(target.goal_ms)]
    if verdict is None:
        return [*line, "not run", "–", "–", "–", "–", "–"]
    if verdict.time is None:
        return [*line, verdict.status, "–", "–", "–", "**MISSED**", "missed"]
    ratio = _term(verdict.checks.get("ratio"))
    ratio = ratio if verdict.best_peer is None else f"{peer_title(verdict.best_peer)} {ratio}"
    line += [number(verdict.time.median), _term(verdict.checks.get("limit"), 100), ratio]
    line += [_term(verdict.checks.get("memory")), _outcome(verdict, "must", "held", "**MISSED**")]
    return [*line, _outcome(verdict, "goal", "reached", "missed")]


def _term(check: Check | None, scale: int = 1) -> str:
    """``measured (must, goal)``."""
    if check is None:
        return "–"
    sign = "≥" if check.at_least else "≤"
    bounds = [b for b in (check.must, check.goal) if b is not None]
    return f"{number(scale * check.measured)} ({sign} {', '.join(number(scale * b) for b in bounds)})"


def _outcome(verdict: Verdict, which: str, good: str, bad: str) -> str:
    """One word where all terms agree, else which term says what."""
    missed, held = verdict.missed(which), verdict.held(which)
    if not missed and not held:
        return "–"
    if not missed or not held:
        return bad if missed else good
    return f"{bad} by {', '.join(TITLES[t] for t in missed)}; {good} by {', '.join(TITLES[t] for t in held)}"
