"""What GPUs do in a step, from a trace of torch's profiler: collectives, how much of them runs beside compute, and waiting."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

Span = tuple[float, float]
# in the names of NCCL's kernels; copies between GPUs by cudaMemcpy are no kernels, and not counted
COLLECTIVE = "nccl"


def trace(step: Callable[[], object]) -> dict[str, float]:
    """One step under the profiler: see :func:`shares`. All ranks call it."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return shares(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def shares(events: Iterable[dict]) -> dict[str, float]:
    """Of a chrome trace's kernels.

    Returns:
        milliseconds from the first kernel's begin to the last one's end (``device_ms``), in which a collective ran
        (``nccl_ms``), with compute beside it (``nccl_hidden_ms``), and in which nothing ran (``idle_ms``); and how many
        ``kernels`` there were.
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    spans = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in kernels]
    if not spans:
        return {}
    sends = [COLLECTIVE in event["name"].lower() for event in kernels]
    collectives = united([span for span, send in zip(spans, sends) if send])
    compute = united([span for span, send in zip(spans, sends) if not send])
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    microseconds = {
        "device_ms": whole,
        "nccl_ms": length(collectives),
        "nccl_hidden_ms": length(common(collectives, compute)),
        "idle_ms": whole - length(united(spans)),
    }
    return {key: value / 1e3 for key, value in microseconds.items()} | {"kernels": len(kernels)}


def united(spans: Sequence[Span]) -> list[Span]:
    """The same times without overlaps, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def common(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """Times that are in both; each without overlaps and in order."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)
