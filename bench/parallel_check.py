"""Training over several processes beside training in one, by the trainer itself.

    torchrun --nproc-per-node=2 -m m3kernels.bench.parallel_check [OUT.ndjson]      # GPUs over NCCL; without any, CPUs over gloo

At every tp x dp that the processes make: all weights, LoRA and DoRA in fp64 against one process, and in bf16 with the kernels
beside the spread that bf16 has itself; checkpoints that another layout goes on from; a rank that is killed (kill -9) under
torchrun --max-restarts. A line of JSON a check; exit status 1 where one failed.
"""

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from m3kernels.bench.parallel_runs import (
    ALONE,
    SAVED,
    STEPS,
    Layout,
    Runs,
    alone,
    layouts,
    prepare,
    run_name,
    shared_meshes,
)
from m3kernels.bench.results import commit
from m3kernels.models.finetune import run as running
from m3kernels.models.finetune import trainer
from m3kernels.models.finetune.process import process_group

SCHEMES = ("none", "lora", "dora")
PRECISIONS = ("fp64", "bf16_mixed")
# DoRA's parameters are LoRA's and the magnitudes
RESHARDED = ("none", "dora")
FP64 = 1e-10
# beyond twice the spread: one rounding of bf16, where one process is nearer to fp64 by luck
BF16 = 2.0**-9
# where a tensor is zeros
TINY = 1e-30
WAIT_S = 120.0
KILLED_LOG = "killed.log"


@dataclass(frozen=True)
class Check:
    """A line of the result.

    Attributes:
        error: a relative difference; infinite where a run failed, and ``note`` says why.
        seconds: of the run.
    """

    what: str
    layout: str
    error: float
    bound: float
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.bound

    def row(self) -> dict:
        # JSON has no infinity
        error = self.error if math.isfinite(self.error) else None
        return {"kind": "parallel check", **asdict(self), "error": error, "passed": self.passed}

    def __str__(self) -> str:
        told = "passed" if self.passed else "FAILED"
        sizes = f"{self.error:8.1e} of {self.bound:.1e} {self.seconds:6.1f} s"
        return f"{told}  {self.what:<27} {self.layout:<33} {sizes}  {self.note}".rstrip()


class Checks:
    """Compares runs, and tells each comparison at once: a time limit leaves those before it."""

    def __init__(self, runs: Runs, out: Path | None):
        self.runs, self.out = runs, out
        self.found: list[Check] = []

    def weights(self, what: str, scheme: str, where: str, name: str, wanted: str | None = None) -> None:
        """The fp64 weights of a run beside those of ``wanted``: one process's by default."""
        wanted = wanted or run_name(scheme, "fp64", ALONE)
        self.add(f"{what}, {scheme}", where, name, lambda: self.weights_error(name, wanted), FP64)

    def weights_error(self, name: str, wanted: str) -> float:
        found, exact = self.runs.weights(name), self.runs.weights(wanted)
        # torch's max, which NaN gets through
        errors = [(found[key] - x).abs().max() / x.abs().max().clamp(min=TINY) for key, x in exact.items()]
        return float(torch.stack(errors).max())

    def numbers(self, scheme: str, where: str, name: str) -> None:
        """Loss and gradient norm of a run's first step in bf16 beside one process's, whose distance from fp64 is the measure."""
        exact, alone = (run_name(scheme, precision, ALONE) for precision in PRECISIONS)
        for key in ("loss", "grad_norm"):
            spread = self.first_error(alone, exact, key)
            note = f"bf16 beside fp64 in one process: {spread:.1e}"
            error = lambda key=key: self.first_error(name, alone, key)  # noqa: E731
            bound = BF16 + (2 * spread if math.isfinite(spread) else 0)
            self.add(f"bf16 {key}, {scheme}", where, name, error, bound, note)

    def first_error(self, name: str, wanted: str, key: str) -> float:
        """Of the step whose weights are the same; infinite where a run has not all steps."""
        try:
            found, exact = (self.runs.seen(run, key) for run in (name, wanted))
        except OSError:
            return math.inf
        if not len(found) == len(exact) == STEPS:
            return math.inf
        return abs(found[0] - exact[0]) / abs(exact[0])

    def add(self, what: str, where: str, name: str, error: Callable[[], float], bound: float, note: str = "") -> None:
        why = self.runs.failed.get(name)
        try:
            found = math.inf if why else error()
        except KeyError as missing:
            # of a run on another rank alone, which said there what it raised
            found, why = math.inf, f"{type(missing).__name__}: {missing}"
        check = Check(what, where, found, bound, self.runs.seconds.get(name, 0.0), why or note)
        self.found.append(check)
        print(check, flush=True)
        if self.out is not None:
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(check.row() | environment()) + "\n")

    def status(self) -> int:
        """The exit status, after a last line."""
        failed = sum(not check.passed for check in self.found)
        print(f"{len(self.found) - failed} of {len(self.found)} passed", flush=True)
        return 1 if failed else 0


@functools.cache
def environment() -> dict[str, str]:
    """What the checks ran on."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    backend = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if on_gpu else "gloo"
    return {"device": device, "backend": backend, "torch": torch.__version__, "commit": commit()}


def named(layout: Layout) -> str:
    return "one process" if layout == ALONE else f"tp {layout[0]} x dp {layout[1]}"


def run_all(runs: Runs, schemes: list[str], checks: Checks | None) -> None:
    """Every run on every rank; of them one has ``checks``."""
    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    resharded = [scheme for scheme in schemes if scheme in RESHARDED]
    # each rank some of them
    own = list(itertools.product(schemes, PRECISIONS))[rank::ranks]
    alone(runs, [("whole", scheme, precision, ALONE) for scheme, precision in own])
    # ranks may come from runs of unequal length
    with process_group(10), shared_meshes():
        dist.barrier()
        for scheme, layout in itertools.product(schemes, layouts(ranks)):
            # both ways of the trainer to hold weights of other data-parallel ranks
            for kept in (False, True) if layout[1] > 1 else (False,):
                name = runs.whole(scheme, "fp64", layout, kept)
                if checks:
                    checks.weights("fp64 weights", scheme, named(layout) + (", kept" if kept else ""), name)
            name = runs.whole(scheme, "bf16_mixed", layout)
            if checks:
                checks.numbers(scheme, named(layout), name)
        for scheme, pair in itertools.product(resharded, itertools.permutations([ALONE, *layouts(ranks)], 2)):
            if pair[1] != ALONE:
                name = runs.reshard(scheme, *pair)
                if checks:
                    checks.weights("checkpoint", scheme, " to ".join(map(named, pair)), name)
    if checks:
        pairs = list(itertools.product(resharded, layouts(ranks)))
        names = alone(runs, [("reshard", scheme, layout, ALONE) for scheme, layout in pairs])
        for (scheme, layout), name in zip(pairs, names):
            checks.weights("checkpoint", scheme, f"{named(layout)} to {named(ALONE)}", name)


# a rank that is killed


def killed_layout(ranks: int) -> Layout:
    """With tensor parallelism, and data parallelism where there are ranks for both."""
    return layouts(ranks)[min(1, len(layouts(ranks)) - 1)]


def start_killed(runs: Runs, ranks: int) -> subprocess.Popen:
    """torchrun with a run whose last rank is killed in its third step, once."""
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node={ranks} --max-restarts=1"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "MASTER_", "RANK"))}
    # survivors wait for the dead one in a kernel, deaf to SIGTERM
    env |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    words = ["-m", "m3kernels.bench.parallel_check", "--killed", str(runs.folder)]
    with open(runs.folder / KILLED_LOG, "w") as log:
        return subprocess.Popen([*command.split(), *words], env=env, stdout=log, stderr=subprocess.STDOUT)


def run_killed(runs: Runs, tp: int) -> None:
    """That run, in one of its processes."""
    original, last = running.run_step, os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def dies(*args):
        *_, step, _ = args
        if last and step == SAVED and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    with mock.patch.object(running, "run_step", dies):
        trainer.finetune(runs.config("killed", "none", "fp64", tp, "checkpoint.save_interval=1"))


def check_killed(runs: Runs, checks: Checks, started: subprocess.Popen, layout: Layout, began: float) -> None:
    started.wait()
    out = (runs.folder / KILLED_LOG).read_text()
    runs.seconds["killed"] = time.perf_counter() - began
    if started.returncode or "exitcode: -9" not in out or "resumed from" not in out:
        runs.failed["killed"] = f"exit status {started.returncode}; {' '.join(out.splitlines()[-3:])}"
        print(out, file=sys.stderr)
    checks.weights("kill -9 and restart", "none", named(layout), "killed", run_name("none", "fp64", layout))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="where a line of JSON for each check is appended")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument(
        "--no-kill", action="store_true", help="leave out the rank that is killed; it takes the longest"
    )
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    rank, ranks = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE"))
    if ranks < 2:
        command = "torchrun --nproc-per-node=2 -m m3kernels.bench.parallel_check"
        parser.error(f"needs several processes, and there is one: {command}")
    if args.killed:
        run_killed(Runs(args.killed), killed_layout(ranks)[0])
        return 0

    # the parent is torchrun, of all ranks
    runs, began = Runs(Path(tempfile.gettempdir()) / f"m3kernels-parallel-check-{os.getppid()}"), time.perf_counter()
    if rank:
        wait_for(runs.folder)
        run_all(runs, args.schemes, None)
        return 0
    prepare(runs.folder)
    checks, kills = Checks(runs, args.out), "none" in args.schemes and not args.no_kill
    killed = start_killed(runs, ranks) if kills else None
    run_all(runs, args.schemes, checks)
    if killed:
        check_killed(runs, checks, killed, killed_layout(ranks), began)
    shutil.rmtree(runs.folder)
    return checks.status()


def wait_for(folder: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not folder.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {folder} after {WAIT_S:.0f} s: see what rank 0 said")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
