"""Result files: JSON lines of one run, a header (machine, versions, measured ceilings) first, then one row a measurement.

A file is ``results/<gpu>/<date>-<commit>.jsonl`` when it holds all suites, ``...-<suite>.jsonl`` when it holds one. Rows
have a ``kind``: ``row`` (an op), ``host``, ``train``, ``decode``, or ``error`` (a whole case broke).
"""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
# suite: the kind of its rows
SUITES = {"ops": "row", "host": "host", "train": "train", "decode": "decode"}


def header(device: torch.device, ceilings: dict, quick: bool, suites: list[str]) -> dict:
    """What a number means nothing without: the machine, the versions, the ceilings measured in the same run."""
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
        "ceilings": ceilings,
    }


def commit() -> str:
    """``M3K_COMMIT``, else what git says, else ``unknown``."""
    if os.environ.get("M3K_COMMIT"):
        return os.environ["M3K_COMMIT"]
    return _output("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD") or "unknown"


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


def default_path(head: dict) -> Path:
    """Where a run's file goes by default: the store, ``./bench-results`` where the package is installed without its tree.

    A file of one suite never overwrites one of all.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", head["gpu"].lower()).strip("-")
    suites = head["suites"]
    suffix = "" if set(suites) == set(SUITES) else "-" + "-".join(suites)
    store = RESULTS if in_tree() else Path("bench-results")
    return store / slug / f"{head['date'][:10]}-{head['commit']}{suffix}.jsonl"


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


def newest(results: Path = RESULTS, kind: str | None = None) -> Path | None:
    """The file with the latest date in its header, among those that hold rows of ``kind`` (any, if None)."""
    dated = []
    for path in sorted(results.glob("*/*.jsonl")):
        head, rows = read(path)
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
