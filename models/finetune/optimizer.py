"""AdamW over the trained parameters: fp32 master weights, weight decay of matrices alone, state that is there from the start.

Where FSDP2 shards the model its parameters are the masters: it gathers them in bf16. Without it the parameters are bf16,
each beside a master of its own. That master's gradient is the bf16 one of the first backward, read as it is by a step of
one forward; from the second backward on it is their sum in fp32.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from m3kernels.models.finetune.adamw import FusedAdamW, gradient_norm
from m3kernels.models.finetune.config import FinetuneError, OptimizerConfig
from m3kernels.models.ministral3.shards import become, part_of


@dataclass(frozen=True)
class Trained:
    """What the optimizer steps.

    Attributes:
        masters: by the name of the parameter that each belongs to; the parameter itself where it has no other master.
        copies: parameter and master, where these are two.
    """

    masters: dict[str, nn.Parameter]
    copies: tuple[tuple[nn.Parameter, nn.Parameter], ...]

    @torch.no_grad()
    def write_back(self) -> None:
        """Parameters from their masters, after a step or a load."""
        if self.copies:
            targets, sources = zip(*((part_of(p), part_of(m)) for p, m in self.copies))
            torch._foreach_copy_(targets, sources)

    def take_masters(self) -> None:
        """Parameters become their masters, for what is written after the last step: no more is rounded than must be."""
        for parameter, master in self.copies:
            become(parameter, master.detach())

    def fill_gradients(self) -> None:
        """Zeros where a step had no use of a parameter, as the vision tower has none without images.

        Then every layout does the same: under data parallelism another rank may have had an image.
        """
        dtypes = {master: parameter.dtype for parameter, master in self.copies if master.grad_dtype is None}
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master, dtype=dtypes.get(master))

    def gradient_norm(self) -> Tensor:
        """0-dim, over all ranks; every master must have a gradient."""
        return gradient_norm(self.masters.values())

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None


def with_masters(
    parameters: Mapping[str, nn.Parameter], dtype: torch.dtype | None, *, narrow_gradients: bool = True
) -> Trained:
    """Masters of trained parameters.

    Args:
        parameters: trained ones by name, in the masters' dtype.
        dtype: what parameters are cast to, beside masters that keep the values; None leaves them their own masters.
        narrow_gradients: a master's gradient is in ``dtype`` until a second comes; False makes all of the master's dtype.
    """
    masters, copies = {}, []
    for name, parameter in parameters.items():
        if dtype is None or parameter.dtype == dtype:
            masters[name] = parameter
            continue
        master = nn.Parameter(parameter.detach())
        if narrow_gradients:
            master.grad_dtype = None
        become(parameter, parameter.detach().to(dtype))
        parameter.register_post_accumulate_grad_hook(_adds_to(master))
        masters[name] = master
        copies.append((parameter, master))
    return Trained(masters, tuple(copies))


def _adds_to(master: nn.Parameter):
    def move(parameter: nn.Parameter) -> None:
        if master.grad is None:
            master.grad = parameter.grad.to(master.grad_dtype or parameter.grad.dtype)
        elif master.grad.dtype != master.dtype:
            master.grad = master.grad.to(master.dtype).add_(parameter.grad)
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return move


def make_optimizer(trained: Trained, config: OptimizerConfig, *, seed: int) -> torch.optim.Optimizer:
    """AdamW of ``trained``, with ``seed`` for rounding bf16 masters.

    Raises:
        FinetuneError: a library that is not there.
    """
    matrices = [p for p in trained.masters.values() if p.dim() > 1]
    vectors = [p for p in trained.masters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.name == "adamw_8bit":
        return _eight_bit(groups, options, (*matrices, *vectors))
    copies = {master: parameter for parameter, master in trained.copies}
    return FusedAdamW(groups, **options, seed=seed, copies=copies)


@torch.no_grad()
def ready_step(trained: Trained, optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> Callable[[], None]:
    """What clips gradients of that norm to ``max_norm`` (0: not), steps the masters, writes their copies, drops the gradients.

    To be called, or not, once it is known that ``norm`` is finite; the optimizer's tables are made before.
    """
    if isinstance(optimizer, FusedAdamW):
        update = optimizer.ready(factor=(max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else None)
    else:
        update = partial(_clip_and_step, trained, optimizer, norm, max_norm)

    def take() -> None:
        update()
        trained.zero_grad()

    return take


def _clip_and_step(trained: Trained, optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(trained.masters.values(), max_norm, norm)
    optimizer.step()
    trained.write_back()


def _eight_bit(groups: list[dict], options: dict, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if any(hasattr(p, "to_local") or p.device.type != "cuda" for p in parameters):
        raise FinetuneError("optimizer.name=adamw_8bit runs on one GPU, without tensor or data parallelism: take adamw")
    try:
        import bitsandbytes
    except ImportError as error:
        raise FinetuneError("optimizer.name=adamw_8bit needs bitsandbytes: pip install it, or take adamw") from error
    return bitsandbytes.optim.AdamW8bit(groups, **options)


def set_step(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Tells AdamW how many steps it has taken, after its moments were loaded."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
