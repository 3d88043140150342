"""AdamW whose bf16 weights are rounded stochastically: no fp32 copy of them, and no update is lost on average.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g²        w = round(w (1 - lr wd) - lr m̂ / (sqrt(v̂) + eps))

A value between two neighbouring bf16 numbers goes to either with a chance that its distance gives: its expectation is itself.
Moments are fp32. Random bits come from a generator of seed, step and parameter, the same on every rank: a resumed run draws
the same, and what is whole on several ranks stays equal.
"""

import torch
from torch import Tensor

CHUNK = 2**24  # elements that go through at once: the fp32 temporaries of a whole embedding would be gigabytes


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 to bf16; NaN and Inf stay what they are."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = (x.view(torch.int32) + noise).bitwise_and_(-65536)
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW of bf16 parameters, plain or DTensors.

    Args:
        params, lr, betas, eps, weight_decay: as ``torch.optim.AdamW``.
        seed: of the random bits.
    """

    def __init__(
        self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0, seed: int = 0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        for group in self.param_groups:
            for p in group["params"]:
                moment = torch.zeros_like(p, dtype=torch.float32)
                self.state[p] = {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": torch.zeros_like(moment)}

    @torch.no_grad()
    def step(self) -> None:
        which = 0
        for group in self.param_groups:
            for p in group["params"]:
                which += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
                generator = torch.Generator(parts[0].device)
                generator.manual_seed(hash((self.seed, int(state["step"]), which)) % 2**63)
                for chunk in zip(*(part.view(-1).split(CHUNK) for part in parts)):
                    _update(*chunk, int(state["step"]), group, generator)


def _update(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, group: dict, generator: torch.Generator) -> None:
    beta1, beta2 = group["betas"]
    grad = grad.float()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    exact = p.float().mul_(1 - group["lr"] * group["weight_decay"])
    exact.addcdiv_(m, divisor, value=-group["lr"] / (1 - beta1**step))
    p.copy_(round_stochastically(exact, generator) if p.dtype == torch.bfloat16 else exact)
