"""Launches of which all but the tensors is settled, for ops that the host issues in numbers.

Every launch binds, classifies and converts each of a kernel's arguments. Here that happens once: an op builds a launch for one
combination of shapes, strides, dtypes, numbers and device, keeps it (``functools.lru_cache`` over just these), and a call
brings addresses only. They are looked up anew every time: a tensor may move, be loaded into or be freed between two calls.
"""

import inspect
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from m3kernels.ops._common import NO_HOOKS, launch, launch_failed, launch_hooks

# launches kept of each kind, and encoded descriptors of each operand: both are rebuilt in less than a millisecond
KEPT = 512


class Blocks(Protocol):
    """How the copy engine sees a tensor: ``of`` describes it, for as long as it stands where it does."""

    start: int  # elements before its first

    def of(self, t: Tensor) -> object: ...


class Prepared:
    """One launch: its tensors come first among the kernel's arguments, then ``numbers``, then what ``meta`` gives.

    ``blocks``: for each tensor how it is described to the copy engine, or None for a pointer; left out where all are pointers.
    """

    def __init__(
        self,
        op: str,
        kernel,
        device: torch.device,
        grid: tuple[int, ...],
        numbers: tuple,
        meta: dict,
        blocks: tuple[Blocks | None, ...] = (),
    ):
        self.op, self.kernel, self.device, self.grid = op, kernel, device, grid
        self.numbers, self.meta, self.blocks = numbers, meta, blocks
        self.direct: Callable | None = None

    def __call__(self, *tensors: Tensor) -> None:
        direct = self.direct
        if direct is None:
            return self._by_triton(tensors)
        addresses = [t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        # what was compiled may take every address for a multiple of 16
        if bits & 15 or torch._C._cuda_getDevice() != self.index or launch_hooks() is not NO_HOOKS:
            return self._by_triton(tensors)
        if self.blocks:
            addresses = self._described(tensors, addresses)
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        try:
            direct(*self.programs, stream, *self.settled, *addresses, *self.tail)
        except Exception as error:
            raise launch_failed(self.op, tensors, self.grid, error) from error

    def _by_triton(self, tensors: tuple[Tensor, ...]) -> None:
        args = [b.of(t) if b else t for b, t in zip(self.blocks, tensors)] if self.blocks else tensors
        found = launch(self.op, self.kernel, self.grid, *args, *self.numbers, **self.meta)
        if found is not None and self.direct is None and not any(t.data_ptr() & 15 for t in tensors):
            self._settle(*found)

    def _settle(self, compiled, constexprs: tuple) -> None:
        """Keeps what Triton looks up at every launch; where it is not as in the known release, launches stay Triton's."""
        launcher = compiled.run
        call = getattr(launcher, "launch", None)
        if call is None or launcher.global_scratch_size or launcher.profile_scratch_size:
            return
        if self.blocks:
            # beneath the function that encodes every descriptor anew
            call = inspect.getclosurevars(call).nonlocals.get("launcher") if inspect.isfunction(call) else None
            described = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
            self.metadata = [next(described, None) if b else None for b in self.blocks]
            if call is None or any(b and m is None for b, m in zip(self.blocks, self.metadata)):
                return
            self.known: list[dict[int, list]] = [{} for _ in self.blocks]
        self.index = torch.cuda.current_device() if self.device.index is None else self.device.index
        self.programs = (*self.grid, 1, 1)[:3]
        self.settled = (
            *(compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None),
            *(compiled.packed_metadata, None, None, None),
        )
        self.tail = (*self.numbers, *constexprs)
        self.direct = call

    def _described(self, tensors: tuple[Tensor, ...], addresses: list[int]) -> list:
        """The arguments of pointers and descriptors; an encoded descriptor holds nothing but an address and what is settled."""
        args = []
        for i, address in enumerate(addresses):
            if self.blocks[i] is None:
                args.append(address)
                continue
            known = self.known[i]
            encoded = known.get(address)
            if encoded is None:
                from triton.backends.nvidia.driver import make_tensordesc_arg

                if len(known) >= KEPT:
                    known.clear()
                encoded = known[address] = make_tensordesc_arg(self.blocks[i].of(tensors[i]), self.metadata[i])
            args += encoded
        return args
