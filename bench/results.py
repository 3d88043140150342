"""Result files: JSON lines of one run, a header (machine, versions, measured ceilings) first, then one row a measurement.

A file is ``results/<gpu>/<date>-<commit>.jsonl`` when it holds all suites, ``...-<suite>.jsonl`` when it holds one. Rows
have a ``kind``: ``row`` (an op), ``host``, ``train``, ``decode``, or ``error`` (a whole case broke).
"""

import itertools
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import m3kernels

RESULTS = Path(__file__).resolve().parent / "results"
# where runs of a package that is installed without its tree go
ELSEWHERE = Path("bench-results")
# suite: the kind of its rows
SUITES = {"ops": "row", "host": "host", "train": "train", "decode": "decode"}


def header(device: torch.device, ceilings: dict, quick: bool, suites: list[str], partial: bool = False) -> dict:
    """What a number means nothing without: the machine, the versions, the ceilings measured in the same run.

    ``partial``: only some ops, peers or cells were asked for.
    """
    import transformers
    import triton

    from m3kernels.bench import peers

    properties = torch.cuda.get_device_properties(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    versions |= {"transformers": transformers.__version__, "cuda": torch.version.cuda}
    return {
        "kind": "header",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "suites": suites,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions | {"cudnn": torch.backends.cudnn.version()},
        "peers": peers.peer_versions(),
        "quick": quick,
        "partial": partial,
        "ceilings": ceilings,
    }


def commit() -> str:
    """``M3K_COMMIT``, else what git says of this tree (``-dirty`` with uncommitted changes), else the package's version."""
    if os.environ.get("M3K_COMMIT"):
        return os.environ["M3K_COMMIT"]
    # an installed package may lie inside somebody else's repository
    said = _output("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty") if in_tree() else ""
    return said or m3kernels.__version__


def driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def in_tree() -> bool:
    """Whether this is a clone (or an editable install of one), with README.md and docs/ beside bench/."""
    return (RESULTS.parents[1] / "pyproject.toml").is_file()


def default_path(head: dict, ending: str = ".jsonl") -> Path:
    """Where a run's file goes by default: the store, ``./bench-results`` where the package is installed without its tree.

    A file of one suite has its name, and a second run of a day and commit gets a number: no run overwrites another's.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", head["gpu"].lower()).strip("-")
    suites = head["suites"]
    suffix = "" if set(suites) == set(SUITES) else "-" + "-".join(suites)
    folder = (RESULTS if in_tree() else ELSEWHERE) / slug
    name = f"{head['date'][:10]}-{head['commit']}{suffix}"
    taken = (folder / f"{name}{'' if n == 1 else f'.{n}'}{ending}" for n in itertools.count(1))
    return next(path for path in taken if not path.exists())


def stored() -> list[Path]:
    """All result files: the store's, and those that runs of an installed package left in ``./bench-results``."""
    stores = [RESULTS] if in_tree() else [RESULTS, ELSEWHERE]
    return sorted(path for store in stores for path in store.glob("*/*.jsonl"))


def read(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows of every kind). A line cut short by a timeout is left out if it is the last one.

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
        raise ValueError(f"{path}: the first line is not a header; it was not written by m3kernels bench")
    return parsed[0], parsed[1:]


def newest(results: Path | None = None, kind: str | None = None) -> Path | None:
    """The file with the latest date in its header, among those that hold rows of ``kind`` (any, if None).

    A run that was asked for some ops, peers or cells only stands for no suite and is passed over.
    """
    dated = []
    for path in stored() if results is None else sorted(results.glob("*/*.jsonl")):
        head, rows = read(path)
        if head.get("partial"):
            continue
        if kind is None or any(row["kind"] == kind for row in rows):
            dated.append((head["date"], str(path)))
    return Path(max(dated)[1]) if dated else None


class Writer:
    """Writes a run's file line by line, so that what is measured survives a timeout, and shows each row as it comes."""

    def __init__(self, path: Path, head: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, []
        self._file = path.open("w")
        self._line(head)

    def _line(self, row: dict) -> None:
        print(json.dumps(row, allow_nan=False), file=self._file, flush=True)

    def add(self, row: dict) -> None:
        self._line(row)
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()
