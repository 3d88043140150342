"""Rows of result files: what identifies one, which peers are ours, what is compared, and a section's file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from m3kernels.bench import results
from m3kernels.bench.cases import OPS
from m3kernels.bench.peers import OURS, TITLES

# kind of row: the fields that name a cell; with the peer they name a row
CELLS = {
    "row": ("op", "label", "direction"),
    "host": ("what", "pass"),
    "train": ("size", "modality", "mode", "seq", "batch", "recompute"),
    "decode": ("size", "batch", "prompt", "new_tokens", "images"),
}
# who a row is about where a whole cell was skipped or broke
EVERYONE = "all"
# the baseline of a cell, which speed-ups are measured against
BASELINES = ("eager", "hf")
# a row with any other status has no time that counts, whatever its columns hold
TIMED = ("ok", "imprecise")
PARTS = {"hf": "HF", "liger": "Liger parts", "compile": "torch.compile", "fa2": "FA2", "fa4": "FA4", "cudnn": "cuDNN"}
PARTS |= {
    "compile-whole": "torch.compile of all",
    "static": "static cache",
    "sdpa": "SDPA",
    "kv8": "FP8 cache",
    "fp8": "FP8 weights",
}

Cell = tuple
Group = dict[str, dict]


@dataclass(frozen=True)
class Time:
    """Median, 20th and 80th percentile in ``unit``; ``clock``: what it was read from, which must agree to compare."""

    median: float
    p20: float | None
    p80: float | None
    unit: str
    clock: str


@dataclass(frozen=True)
class Source:
    """One section's rows, the file they come from, its header, and the cases that broke there."""

    suite: str
    path: Path
    head: dict
    rows: list[dict]
    broken: list[dict]

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def digest(self) -> str:
        """Of the file's bytes: a picture carries it, so that one of other results is found without drawing it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]


def source(suite: str, path: Path) -> Source | None:
    """One suite's rows of a file, None where it holds none.

    Raises:
        ValueError, OSError: the file cannot be read.
    """
    head, rows = results.read(path)
    mine = [r for r in rows if r["kind"] == results.SUITES[suite]]
    broken = [r for r in rows if r["kind"] == "error" and suite_of_error(r) == suite]
    return Source(suite, path, head, mine, broken) if mine or broken else None


def sources(file: Path | None = None) -> dict[str, Source]:
    """Suite -> its rows, from ``file`` or each from the newest file that holds such rows; without any, absent."""
    found = {}
    for suite, kind in results.SUITES.items():
        path = file or results.newest(kind=kind)
        one = None if path is None else source(suite, path)
        if one is not None:
            found[suite] = one
    return found


def suite_of_error(row: dict) -> str:
    """Only ops give such rows: a model's cell that breaks is a row of its kind, of ``EVERYONE``."""
    return row.get("suite", "ops")


def cell(row: dict) -> Cell:
    """What a row measures, without who: (kind, fields...). A case that broke is a cell of its own kind."""
    if row["kind"] == "error":
        return "error", row.get("suite"), row.get("op"), row.get("label")
    return row["kind"], *(row.get(field) for field in CELLS[row["kind"]])


def groups(rows: list[dict]) -> dict[Cell, Group]:
    """cell -> peer -> row, in the order of the file."""
    found: dict[Cell, Group] = {}
    for row in rows:
        found.setdefault(cell(row), {})[row["peer"]] = row
    return found


def is_ours(peer: str) -> bool:
    """``m3kernels``, alone or with another package beside it (``m3kernels+fa4``)."""
    return peer.split("+")[0] == OURS


def peer_title(peer: str) -> str:
    """A peer's name for people; a combination (``hf+liger``) part by part."""
    if peer in TITLES:
        return TITLES[peer]
    return " + ".join(PARTS.get(part, part) for part in peer.split("+"))


def op_time(row: dict, python: bool = False) -> Time | None:
    """Device time where it was captured, else (or if asked) the time from Python.

    From Python for all peers of an op that some of them synchronise in: one line of a table compares one clock.
    """
    python = python or bool(row["op"] in OPS and OPS[row["op"]].no_graph)
    column = "python" if python or row.get("graph_ms") is None else "graph"
    if row["status"] not in TIMED or row.get(f"{column}_ms") is None:
        return None
    return Time(row[f"{column}_ms"], row.get(f"{column}_p20"), row.get(f"{column}_p80"), "ms", column)


def time_of(row: dict) -> Time | None:
    """The time that a row is compared by, None where it has none."""
    if row["kind"] == "row":
        return op_time(row)
    column, unit = {"host": ("us", "us"), "train": ("ms", "ms"), "decode": ("ms_per_token", "ms")}[row["kind"]]
    if row["status"] not in TIMED or row.get(column) is None:
        return None
    return Time(row[column], row.get("p20"), row.get("p80"), unit, column)


def share_of_limit(row: dict) -> float | None:
    """Per cent of the op's limit at the run's ceilings."""
    time = op_time(row)
    return None if time is None or row.get("limit_ms") is None else 100 * row["limit_ms"] / time.median


def peak_gib(row: dict) -> float | None:
    """Peak memory in GiB: of an op above its inputs, of a model in all."""
    if row.get("peak_bytes") is not None:
        return row["peak_bytes"] / 2**30
    return row.get("peak_gib")


def is_exact(peer: str) -> bool:
    """Whether a peer computes with the model's own weights and cache, not with quantised ones."""
    return not {"fp8", "kv8"} & set(peer.split("+"))


def fastest(group: Group, ours: bool, among: tuple[str, ...] | None = None) -> dict | None:
    """The fastest row of ours, or of the peers, on the model's own weights; ``among`` limits the peers."""
    timed = [r for p, r in group.items() if is_ours(p) == ours and is_exact(p) and time_of(r) is not None]
    if among is not None:
        timed = [r for r in timed if r["peer"] in among]
    return min(timed, key=lambda r: time_of(r).median, default=None)


def ours_in(group: Group) -> dict | None:
    """Our row: the fastest, or one that says why there is no time, or None where we do not take part."""
    return fastest(group, ours=True) or next((r for p, r in group.items() if is_ours(p)), None)


def baseline(group: Group) -> dict | None:
    return next((group[b] for b in BASELINES if b in group and time_of(group[b]) is not None), None)


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, whole numbers never cut; – for None."""
    if value is None:
        return "–"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}" if value else "0"
