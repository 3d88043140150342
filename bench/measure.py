"""Timing on one GPU: cold L2, peers interleaved, in-graph device time beside time from Python, memory, ceilings.

Everything runs on one side stream, so that autograd's backward can be captured into a CUDA graph where its forward ran.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Trial:
    """What is timed: ``run`` and, outside the clock, ``prepare``, which restores inputs that the peer overwrites."""

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Stats:
    """Milliseconds: median, 20th and 80th percentile; how many samples."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> "Stats":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[1], deciles[7], len(samples))


@dataclass(frozen=True)
class Budget:
    """``seconds`` of timing for one peer in one mode, spread over ``rounds`` in which the peers take turns."""

    seconds: float
    rounds: int

    def calls_a_round(self, call_ms: float, least: int, most: int) -> int:
        return max(least, min(most, int(1e3 * self.seconds / (self.rounds * max(call_ms, 1e-3)))))


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round, in another order each: near its power limit a GPU favours what follows a lighter kernel."""
    order, names = random.Random(0), list(names)
    for _ in range(rounds):
        yield from order.sample(names, len(names))


class Gpu:
    """One GPU's stream, flush buffer and clocks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.in_graph_events = True
        self.in_graph_events = self._in_graph_events_work()

    def flush_l2(self) -> None:
        self._flush.zero_()

    def python_sample(self, trial: Trial) -> tuple[float, float]:
        """(ms, host us) of one call on an idle GPU with a cold L2: host work before the first kernel is inside."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        trial.prepare()
        self.flush_l2()
        torch.cuda.synchronize(self.device)
        start.record()
        begun = time.perf_counter()
        kept = trial.run()
        host = time.perf_counter() - begun
        end.record()
        torch.cuda.synchronize(self.device)
        del kept
        return start.elapsed_time(end), 1e6 * host

    def time_python(self, trials: dict[str, Trial], budget: Budget) -> dict[str, tuple[Stats, float] | str]:
        """Per peer (times, median host us), the peers taking turns; a peer that raises gives the reason instead."""
        samples: dict[str, list] = {name: [] for name in trials}
        failed: dict[str, str] = {}
        for name, trial in trials.items():
            try:
                estimate = min(self.python_sample(trial)[0] for _ in range(3))
                samples[name] = [budget.calls_a_round(estimate + 0.3, 5, 15)]
            except Exception as error:  # a peer's failure is a result, not the end of the run
                failed[name] = reason(error)
        calls = {name: s.pop() for name, s in samples.items() if s}
        with _no_gc():
            for name in turns(calls, budget.rounds):
                samples[name] += [self.python_sample(trials[name]) for _ in range(calls[name])]
        timed = {
            n: (Stats.of([ms for ms, _ in samples[n]]), statistics.median(us for _, us in samples[n])) for n in calls
        }
        return timed | failed

    def capture(self, trial: Trial, calls: int) -> tuple[torch.cuda.CUDAGraph, list]:
        """A graph of ``calls`` x (prepare, flush, event, run, event); without in-graph events, of one bare run."""
        graph, events = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph, stream=self.stream):
            if not self.in_graph_events:
                trial.run()
            else:
                for _ in range(calls):
                    start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
                    trial.prepare()
                    self.flush_l2()
                    start.record()
                    trial.run()
                    end.record()
                    events.append((start, end))
        return graph, events

    def graph_samples(self, graph: torch.cuda.CUDAGraph, events: list, trial: Trial) -> list[float]:
        """Device milliseconds out of one replay."""
        if events:
            graph.replay()
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) for start, end in events]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        trial.prepare()
        self.flush_l2()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end)]

    def time_graphs(self, trials: dict[str, Trial], budget: Budget) -> dict[str, Stats | str]:
        """Device time per peer, replayed in turns; a peer that cannot be captured gives the reason instead."""
        graphs, out, samples = {}, {}, {}
        for name, trial in trials.items():
            try:
                estimate = self.python_sample(trial)[0]
                graphs[name] = self.capture(trial, calls=8 if estimate < 3 else 3)
                first = self.graph_samples(*graphs[name], trial)
                # what a replay costs is its ops and, for each, the flush and prepare beside it
                replays = budget.calls_a_round((statistics.median(first) + 0.3) * len(first), 2, 6)
                samples[name] = (replays, [])
            except Exception as error:  # a peer's failure is a result, not the end of the run
                graphs.pop(name, None)
                out[name] = reason(error)
        with _no_gc():
            for name in turns(samples, budget.rounds):
                replays, found = samples[name]
                for _ in range(replays):
                    found += self.graph_samples(*graphs[name], trials[name])
        return out | {name: Stats.of(found) for name, (_, found) in samples.items()}

    def peak_bytes(self, trial: Trial) -> int:
        """Peak of allocated memory above what was allocated before one call: results, saved tensors, scratch."""
        trial.prepare()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = trial.run()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kept
        return peak

    def ceilings(self) -> dict[str, object]:
        """The two measured limits: copy bytes/s (read + written, 2 GiB) and bf16 GEMM FLOP/s on two of our shapes."""
        source = torch.randint(-128, 127, (2 << 30,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        copy_ms = self._warm_median(lambda: target.copy_(source))
        gemm = {}
        for m, k, n in ((8192, 4096, 14336), (8192, 4096, 131072)):
            a = torch.randn(m, k, dtype=torch.bfloat16, device=self.device)
            b = torch.randn(n, k, dtype=torch.bfloat16, device=self.device)
            out = torch.empty(m, n, dtype=torch.bfloat16, device=self.device)
            gemm[f"{m}x{k}x{n}"] = 2 * m * k * n / (1e-3 * self._warm_median(lambda: torch.mm(a, b.T, out=out)))  # noqa: B023
        small = torch.zeros(1, device=self.device)
        floor = self.time_graphs({"one element": Trial(lambda: small.fill_(1.0))}, Budget(0.05, 2))["one element"]
        return {
            "copy_bytes_s": 2 * source.numel() / (1e-3 * copy_ms),
            "gemm_flops_s": gemm,
            # what the clock reads for a kernel that does nothing: part of every graph time below
            "event_floor_us": None if isinstance(floor, str) else 1e3 * floor.median,
        }

    def _warm_median(self, run: Callable[[], object]) -> float:
        samples = []
        for i in range(13):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            samples += [start.elapsed_time(end)] if i >= 3 else []
        return statistics.median(samples)

    def _in_graph_events_work(self) -> bool:
        """Tried once: timing events inside a graph must agree with a plain measurement of the same 512 MB copy."""
        with torch.cuda.stream(self.stream):
            source = torch.zeros(256 << 20, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            trial = Trial(lambda: target.copy_(source))
            plain = self._warm_median(trial.run)
            try:
                inside = statistics.median(self.graph_samples(*self.capture(trial, calls=5), trial))
            except Exception:  # no such events on this platform: replays are timed from outside
                return False
        return 0.5 * plain < inside < 1.5 * plain


class _no_gc:
    def __enter__(self):
        gc.collect()
        gc.disable()

    def __exit__(self, *_):
        gc.enable()


def reason(error: Exception) -> str:
    """One line: the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
