"""AdamW of plain parameters or DTensors by the fused op, and the norm of their gradients over all ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3kernels.models.ministral3.shards import part_of
from m3kernels.ops import adamw, global_norm
from m3kernels.ops._common import TRITON_DTYPES, why_no_triton


def local_gradient(p: nn.Parameter) -> Tensor:
    """What of ``p.grad`` belongs to the rank's part of ``p``."""
    if hasattr(p, "to_local") and p.grad.placements != p.placements:
        return p.grad.redistribute(placements=p.placements).to_local()
    return part_of(p.grad)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients, over all ranks that hold parts of them.

    Args:
        parameters: plain or DTensors, all with gradients.

    Returns:
        0-dim fp32 (fp64 of fp64), a plain tensor, the same on every rank of a mesh.
    """
    # by the mesh and its dimensions that a parameter is split along: over the others it is the same on every rank
    alike: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        split = tuple(i for i, at in enumerate(p.placements) if not at.is_replicate()) if hasattr(p, "to_local") else ()
        alike.setdefault((p.device_mesh if split else None, split), []).append(local_gradient(p))
    norms = [global_norm(gradients) for gradients in alike.values()]
    squares = [norm.double().square() for norm in norms]
    for mesh in dict.fromkeys(mesh for mesh, _ in alike if mesh is not None):
        for dim in range(mesh.ndim):
            which = [i for i, (other, split) in enumerate(alike) if other == mesh and dim in split]
            if which and mesh.size(dim) > 1:
                part = torch.stack([squares[i] for i in which])
                dist.all_reduce(part, group=mesh.get_group(dim))
                for i, summed in zip(which, part.unbind()):
                    squares[i] = summed
    return torch.stack(squares).sum().sqrt().to(norms[0].dtype)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW whose state is there from the start: strict loads find it whether or not a step was taken.

    bf16 parameters are rounded stochastically, by bits of seed, step and the parameter's place: a resumed run draws the same,
    and what is whole on several ranks stays equal.

    Args:
        params, lr, betas, eps, weight_decay: as ``torch.optim.AdamW``. ``grad`` may be of 16 bits where ``grad_dtype`` allows it.
        seed: of the random bits.
        copies: by fp32 parameter, what is written from it in every step.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        copies: Mapping[nn.Parameter, nn.Parameter] | None = None,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.copies = seed, dict(copies or {})
        for group in self.param_groups:
            for p in group["params"]:
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                moments = {key: torch.zeros_like(p, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros(()), **moments}

    @property
    def backend(self) -> str:
        """What steps take: triton, or reference and why."""
        p = self.param_groups[0]["params"][0]
        why_not = why_no_triton(p.device.type) or ("" if p.dtype in TRITON_DTYPES else f"{p.dtype}")
        return f"reference ({why_not})" if why_not else "triton"

    def step(self, *, factor: Tensor | None = None) -> None:
        """Steps parameters that have gradients.

        Args:
            factor: 0-dim, of the parameters' device: gradients are multiplied with it, and left as they are.
        """
        self.ready(factor=factor)()

    @torch.no_grad()
    def ready(self, *, factor: Tensor | None = None) -> Callable[[], None]:
        """As ``step``, when what it returns is called. The GPU finds its tables made then: what they take on the host can be
        over before it is known whether to step."""
        rows = [(p, group) for group in self.param_groups for p in group["params"]]
        numbered = [(number, p, group) for number, (p, group) in enumerate(rows) if p.grad is not None]
        steps = [self.state[p]["step"] for _, p, _ in numbered]
        # one call for all in a run of ours: learning rate and steps taken are the same
        alike: dict[tuple, list[tuple]] = {}
        for row, taken in zip(numbered, torch.stack(steps).tolist() if steps else ()):
            group = row[2]
            alike.setdefault((int(taken), group["lr"], group["betas"], group["eps"]), []).append(row)
        calls = [self._update(chosen, *key, factor) for key, chosen in alike.items()]

        def take() -> None:
            for call in calls:
                call()
            # a kernel of our own writes behind torch's back: who keeps what depends on weights must see that they changed
            written = [part_of(p) for _, p, _ in numbered]
            written += [part_of(self.copies[p]) for _, p, _ in numbered if self.copies.get(p) is not None]
            torch.autograd.graph.increment_version(written)
            if steps:
                torch._foreach_add_(steps, 1)

        return take

    def _update(self, rows: Sequence[tuple], taken: int, lr: float, betas: tuple, eps: float, factor) -> Callable:
        states = [self.state[p] for _, p, _ in rows]
        copies = [self.copies.get(p) for _, p, _ in rows]
        return adamw(
            [part_of(p) for _, p, _ in rows],
            [local_gradient(p) for _, p, _ in rows],
            [part_of(state["exp_avg"]) for state in states],
            [part_of(state["exp_avg_sq"]) for state in states],
            [None if copy is None else part_of(copy) for copy in copies],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=[group["weight_decay"] for _, _, group in rows],
            step=taken + 1,
            factor=factor,
            seed=self.seed,
            numbers=[number for number, _, _ in rows],
            later=True,
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Into the state that is there: torch's own would cast the fp32 moments of bf16 parameters to bf16."""
        ours = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = ours
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, (p for group in self.param_groups for p in group["params"])):
            for key, value in ours[p].items():
                value.copy_(state_dict["state"][number][key])
