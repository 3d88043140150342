"""A run's process: its group and device, signals that ask it to stop, and a watch that ends it when nothing moves."""

import contextlib
import datetime
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from m3kernels.models.finetune.config import FinetuneError

# launchers such as srun and torchrun both pass a SIGTERM on: a second one so soon is the same
REPEATED_S = 5.0
# what a rank that ends the run gives the others to write their stacks: a lost connection ends them
LEFT_TO_OTHERS_S = 5.0
# collectives wait longer than the watch, whose message says more
BEYOND_WATCH_S = 20.0
# until gloo's threads are idle
THREADS_REST_S = 0.2


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def process_group(timeout_minutes: float, device: str = "auto") -> Iterator[Process]:
    """The default process group: torchrun's, one of a single process without it, or the one that there is already.

    ``device``: "auto", "cuda" or "cpu".

    A restart of torchrun's (``--max-restarts``) gets a store of its own: its agent keeps the addresses of the processes that
    died, and gloo would wait for them.
    """
    if dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size(), _device(device))
        return
    device = _device(device)
    # a gradient norm over two dimensions of the mesh takes two small collectives: nothing that a user could change
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes, seconds=BEYOND_WATCH_S)
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"m3kernels-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    options = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)
    try:
        yield Process(rank, size, device)
    finally:
        _end_group()


def _end_group() -> None:
    """Destroys the groups and gives gloo's threads the time to let go of the last tensors.

    One that frees a tensor of Python's while the interpreter ends aborts the process: "terminate called without an active
    exception", exit code -6, after a run that went well. Joining them would wait for what a dead rank never sends.
    """
    dist.destroy_process_group()
    time.sleep(THREADS_REST_S)


def _device(kind: str) -> torch.device:
    if kind == "cuda" and not torch.cuda.is_available():
        raise FinetuneError(f"train.device is cuda, but torch {torch.__version__} sees no GPU: take auto or cpu")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


class StopSignals:
    """SIGTERM and SIGINT as a wish to save and exit, asked for between steps; a second one ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # only the main thread may; elsewhere (a notebook's executor) the run goes without
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
            # no handler of Python's would run while a collective waits for ever
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # print could be what was interrupted
            with contextlib.suppress(OSError):
                os.write(2, f"{self.received}: saving, then exiting; once more exits at once\n".encode())
        elif time.monotonic() - self._at > REPEATED_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Watch:
    """Ends the process with the stacks of its threads when nothing was done for too long.

    Args:
        seconds: from one :meth:`beat` to the next at most.
        path: where the stacks are written besides standard error.
    """

    def __init__(self, seconds: float, path: Path, rank: int):
        self.seconds, self.path, self.rank = seconds, path, rank
        self._last, self._doing = time.monotonic(), "the start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="m3kernels-watch")

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()

    def beat(self, doing: str) -> None:
        """Something was done; ``doing``: what comes next."""
        self._last, self._doing = time.monotonic(), doing

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last < self.seconds:
                continue
            print(
                f"rank {self.rank}: nothing for {self.seconds:.0f} s in {self._doing} (train.timeout_minutes); "
                f"stacks follow and are in {self.path}",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(sys.__stderr__)
            with contextlib.suppress(OSError), open(self.path, "w") as file:
                file.write(f"rank {self.rank}, in {self._doing}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            # left by an exception meanwhile: that is how the process ends
            if not self._stop.wait(min(LEFT_TO_OTHERS_S, self.seconds)):
                os._exit(1)
            return
