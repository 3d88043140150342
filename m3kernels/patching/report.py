"""What a patch did: counts, reasons, and the way back."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from m3kernels.patching.classes import (
    check_unfusable,
    is_fused,
    is_switched,
    logger,
    switch_attention_back,
    take_together,
    takes_together,
    unfuse,
)


@dataclass(frozen=True)
class Skip:
    """A module that keeps its own forward, and why."""

    op: str
    module: str
    reason: str


def changed_by_patches(model: nn.Module) -> frozenset[tuple[str, int]]:
    """What patches have changed so far: fused modules, those that run our attention, those that take adapters together."""
    tests = {"fused": is_fused, "attention": is_switched, "adapters": takes_together}
    return frozenset((what, id(module)) for module in model.modules() for what, test in tests.items() if test(module))


def restore(model: nn.Module, earlier: frozenset[tuple[str, int]] = frozenset()) -> None:
    """Give modules their own class and attention back, but for what is in ``earlier``."""
    switched = [m for m in model.modules() if is_switched(m) and ("attention", id(m)) not in earlier]
    fused = [module for module in model.modules() if is_fused(module) and ("fused", id(module)) not in earlier]
    for module in fused:
        check_unfusable(module)
    if any(is_dora_over_fp8(module, fused) for module in model.modules()):
        logger.warning(
            "m3kernels: DoRA over FP8 weights is right only while patched: PEFT by itself takes its norms without the scales"
        )
    for module in fused:
        unfuse(module)
    switch_attention_back(switched)
    for module in model.modules():
        if takes_together(module) and ("adapters", id(module)) not in earlier:
            take_together(module, False)


def is_dora_over_fp8(module: nn.Module, fused: list[nn.Module]) -> bool:
    """Whether a PEFT layer has DoRA and an FP8 base layer that is among ``fused``."""
    if not len(getattr(module, "lora_magnitude_vector", ())):
        return False
    return getattr(type(module.base_layer), "_m3k_forward", "") == "fp8_linear" and module.base_layer in fused


@dataclass
class PatchReport:
    """What :func:`m3kernels.patch` did to one model.

    Prints as a table. As a context manager it restores the model on exit.

    Attributes:
        patched: op -> number of modules that run it.
        skipped: modules that an op was asked for and that keep their own forward, with the reason.
        backend: op -> "triton", or "reference" with the reason.
        attention: what computes attention, by shape class where it is ours.
        earlier: what earlier patches had changed; :meth:`restore` leaves that.
    """

    model: nn.Module = field(repr=False)
    architecture: str
    patched: dict[str, int]
    skipped: list[Skip]
    backend: dict[str, str]
    attention: list[str]
    earlier: frozenset[tuple[str, int]] = field(default=frozenset(), repr=False)

    def restore(self) -> None:
        """Undo this patch: every module that it fused gets its own class back (``m3kernels.unpatch`` undoes all)."""
        restore(self.model, self.earlier)

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def __str__(self) -> str:
        rows = [("op", "modules", "backend", "skipped")]
        reasons: dict[str, Counter] = {}
        for skip in self.skipped:
            reasons.setdefault(skip.op, Counter())[skip.reason] += 1
        for op, count in self.patched.items():
            skipped = "; ".join(f"{n} x {why}" for why, n in reasons.get(op, {}).items())
            rows.append((op, str(count), self.backend[op] if count else "-", skipped or "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"m3kernels on {self.architecture}", *lines, *self.attention])
