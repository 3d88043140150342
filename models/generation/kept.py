"""A model's generator from call to call, while the model lives and its parameters are the same."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from m3kernels.models.generation.engine import Generator


@dataclass(frozen=True)
class Kept:
    """A generator, and what tells whether it still is its model's."""

    fingerprint: tuple
    generator: Generator


# an attribute of the model would be copied and saved along; nothing in a value may refer to its key
_kept: "weakref.WeakKeyDictionary[nn.Module, Kept]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def generator_of(model: nn.Module, fingerprint: tuple, make: Callable[[], Generator]) -> Generator:
    """The model's generator, made where there is none with this fingerprint, without what its last call computed."""
    # threads that begin together share one
    with _lock:
        kept = _kept.get(model)
        if kept is None or kept.fingerprint != fingerprint:
            _kept.pop(model, None)
            kept = _kept[model] = Kept(fingerprint, make())
    # weights may have changed in place without a trace: through p.data, or by a kernel
    with kept.generator.lock:
        kept.generator.forget()
    return kept.generator
