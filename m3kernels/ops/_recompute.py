"""What a backward computes again instead of keeping: cheap outputs, and everything around an attention whose output is kept."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_active = threading.local()


class _Forgotten:
    """Tensors of a forward that are not kept, by where they lie, and how to make them again."""

    def __init__(self):
        self.again: dict[tuple, Callable[[], Tensor]] = {}
        self.alive: list[Tensor] = []  # until the forward is over nothing else may lie there

    def pack(self, tensor: Tensor):
        again = self.again.get(_place(tensor))
        return tensor if again is None or not tensor.is_contiguous() else (again, tensor.shape)

    @staticmethod
    def unpack(packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again, shape = packed
        with torch.no_grad():
            return again().view(shape)


def _place(tensor: Tensor) -> tuple:
    # the version: what was changed in place since is not what would be made again
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version


@contextmanager
def forgetting() -> Iterator[None]:
    """Operations inside keep none of the tensors given to :func:`forget` for their backward."""
    table, before = _Forgotten(), getattr(_active, "table", None)
    _active.table = table
    try:
        with torch.autograd.graph.saved_tensors_hooks(table.pack, table.unpack):
            yield
    finally:
        _active.table = before
        table.again, table.alive = {}, []


def forget(tensor: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """Inside :func:`forgetting`: whoever saves ``tensor`` for a backward calls ``again`` there instead. Returns it."""
    table = getattr(_active, "table", None)
    if table is not None and tensor.numel() and torch.is_grad_enabled():
        table.again[_place(tensor)] = again
        table.alive.append(tensor)
    return tensor


class KeptOutputs:
    """Outputs of the attentions of one checkpointed function: kept by its first run, given back by later ones."""

    def __init__(self):
        self._outputs: list[tuple[Tensor, ...]] = []
        self._complete = False
        self._next = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, attention keeps or gives back."""
        before = getattr(_active, "kept", None)
        _active.kept, self._next = self, 0
        try:
            yield
            self._complete = True
        finally:
            _active.kept = before

    @property
    def any(self) -> bool:
        """Whether an attention has kept something."""
        return bool(self._outputs)

    def take(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if self._complete:
            self._next += 1
            # as new tensors: autograd would refuse to be given the same ones again as outputs
            return tuple(x.detach() for x in self._outputs[self._next - 1])
        self._outputs.append(compute())
        return tuple(x.detach() for x in self._outputs[-1])


def kept_or(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``compute()``, or what an earlier run of a function under :class:`KeptOutputs` computed in its place."""
    kept = getattr(_active, "kept", None)
    return compute() if kept is None else kept.take(compute)
