"""AdamW over the trained parameters: fp32 master weights, weight decay of matrices alone, state that is there from the start.

Where FSDP2 shards the model its parameters are the masters: it gathers them in bf16. Without it the parameters are bf16,
each beside a master of its own, into whose fp32 gradient every backward adds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m3kernels.models.finetune.adamw_stochastic import StochasticAdamW
from m3kernels.models.finetune.config import FinetuneError, OptimizerConfig


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
            targets, sources = zip(*((_part(p), _part(m)) for p, m in self.copies))
            torch._foreach_copy_(targets, sources)

    def fill_gradients(self) -> None:
        """Zeros where a step had no use of a parameter, as the vision tower has none without images.

        Then every layout does the same: under data parallelism another rank may have had an image.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def with_masters(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype | None) -> Trained:
    """Masters of trained parameters.

    Args:
        parameters: trained ones by name, in the masters' dtype.
        dtype: what parameters are cast to, beside masters that keep the values; None leaves them their own masters.
    """
    masters, copies = {}, []
    for name, parameter in parameters.items():
        if dtype is None or parameter.dtype == dtype:
            masters[name] = parameter
            continue
        master = nn.Parameter(parameter.detach())
        parameter.data = parameter.detach().to(dtype)
        parameter.register_post_accumulate_grad_hook(_adds_to(master))
        masters[name] = master
        copies.append((parameter, master))
    return Trained(masters, tuple(copies))


def _adds_to(master: nn.Parameter):
    def move(parameter: nn.Parameter) -> None:
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return move


def make_optimizer(trained: Trained, config: OptimizerConfig, *, stochastic: bool, seed: int) -> torch.optim.Optimizer:
    """AdamW with its moments made: strict loads then find them whether or not a step was taken.

    Raises:
        FinetuneError: a library that is not there.
    """
    matrices = [p for p in trained.masters.values() if p.dim() > 1]
    vectors = [p for p in trained.masters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if stochastic:
        optimizer = StochasticAdamW(groups, **options, seed=seed)
    elif config.name == "adamw_8bit":
        optimizer = _eight_bit(groups, options, (*matrices, *vectors))
    else:
        optimizer = torch.optim.AdamW(groups, **options, fused=all(p.device.type == "cuda" for p in matrices) or None)
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = _moments(p, on_device=bool(group.get("fused")))
    return optimizer


def _moments(p: nn.Parameter, on_device: bool) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=_part(p).device if on_device else "cpu")
    like = {"memory_format": torch.preserve_format}
    return {"step": step, "exp_avg": torch.zeros_like(p, **like), "exp_avg_sq": torch.zeros_like(p, **like)}


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
