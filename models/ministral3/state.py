"""Weights in memory by runtime name, whole or sharded over ranks, and one rank that reads them while all gather."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3kernels.models.ministral3.files import CheckpointError
from m3kernels.models.ministral3.merging import PARTS, is_adapter, merged_weight
from m3kernels.models.ministral3.shards import part_of, whole_of
from m3kernels.models.ministral3.weights import EMBEDDING, HEAD, runtime_name

Result = TypeVar("Result")


class StateDict:
    """A model or a state dict in memory, by runtime name; a head that is the embedding itself is left out.

    A model's adapters are merged into the weights that are read; the model itself stays as it is.

    Attributes:
        names: runtime names.
        config: the dict of the ``config.json`` that a native model came from, None where none is known.
        folder: where such a model was read from, None if it was not.
        sharded: whether any tensor is a DTensor, so that every rank has to take part in reading it.
    """

    def __init__(self, state: Mapping[str, Tensor] | nn.Module):
        self.config: dict | None = getattr(getattr(state, "config", None), "hf", None)
        self.folder: Path | None = getattr(state, "source", None)
        # a state dict's adapters stay tensors by name: what they count is not in it
        self._scalings: dict[str, float] = {}
        if isinstance(state, nn.Module):
            if any(getattr(module, "is_quantized_linear", False) for module in state.modules()):
                raise CheckpointError(
                    "the model's weights are in FP8 for generation and are not saved: load it without quantize= and save "
                    "that, or keep the checkpoint it came from"
                )
            layers = ((n, m) for n, m in state.named_modules() if getattr(m, "is_adapted_linear", False))
            self._scalings = {f"{name}.weight": layer.scaling for name, layer in layers}
            state = state.state_dict()
        self._tensors = {runtime_name(name): tensor for name, tensor in state.items()}
        if len(self._tensors) < len(state):
            raise CheckpointError("the state dict holds the same tensor under the names of two layouts")
        if _same(self._tensors.get(EMBEDDING), self._tensors.get(HEAD)):
            del self._tensors[HEAD]
        self.names = [name for name in self._tensors if not (self._scalings and is_adapter(name))]
        self.sharded = any(hasattr(tensor, "full_tensor") for tensor in self._tensors.values())
        self._leads = False

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if self._leads and any(hasattr(tensor, "full_tensor") for tensor in self._parts(name)):
            _tell(("read", name))
        return self.gather(name)[index or ()].to("cpu", dtype)

    def gather(self, name: str) -> Tensor:
        """The whole tensor where it lies; of a sharded one every rank has to call this."""
        whole = [whole_of(tensor) for tensor in self._parts(name)]
        if name not in self._scalings:
            return whole[0]
        weight, a, b, *magnitude = whole
        return merged_weight(weight, a, b, magnitude[0] if magnitude else None, self._scalings[name])

    def _parts(self, name: str) -> list[Tensor]:
        """A tensor, and of an adapted layer's weight the parts of the adapter."""
        parts = [name]
        if name in self._scalings:
            parts += [name.removesuffix("weight") + part for part in PARTS]
        return [self._tensors[part] for part in parts if part in self._tensors]

    def led(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns, which reads from here on the first rank alone; the others gather what it reads.

        Every rank calls this, and none returns before ``function`` has.

        Raises:
            CheckpointError: on the other ranks, where ``function`` raised on the first; there its own exception goes on.
        """
        if dist.get_rank() > 0:
            return self._follow()
        self._leads = True
        try:
            result = function()
        except Exception as error:
            said = str(error) if isinstance(error, CheckpointError) else f"rank 0 failed: {error!r}"
            # where another rank is gone this fails as well: what came first is what counts
            with contextlib.suppress(Exception):
                _tell(("failed", said))
            raise
        finally:
            self._leads = False
        _tell(("done", result))
        return result

    def _follow(self):
        while True:
            said = [None]
            dist.broadcast_object_list(said, src=0)
            what, value = said[0]
            if what == "done":
                return value
            if what == "failed":
                raise CheckpointError(value)
            self.gather(value)


def _tell(said: tuple[str, object]) -> None:
    dist.broadcast_object_list([said], src=0)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors, sharded ones by their local part, are one memory."""
    if a is None or b is None:
        return False
    a, b = (part_of(tensor) for tensor in (a, b))
    return a.data_ptr() == b.data_ptr() != 0
