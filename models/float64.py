"""An fp64 model in fp64 throughout: what transformers does in fp32 whatever the dtype, lifted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    """Does in fp64 what a model does in fp32 whatever its dtype: norms, rotary tables, softmax, loss."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        lifted = {torch.float32: torch.float64}
        args = [lifted.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: lifted.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def float64_islands() -> Iterator[None]:
    """Inside, transformers' own fp32 islands run in fp64, so that an fp64 model is fp64 throughout."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
