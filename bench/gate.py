"""The correctness gate: nothing is timed before its results stand beside an fp64 reference and eager's own error."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

OK, IMPRECISE, WRONG = "ok", "imprecise", "WRONG"
# ours must be within OK_FACTOR of eager's own bf16 error; a peer between the two factors computes the right function
# with coarser rounding (bf16 accumulation over chunks), so it is timed and its error is shown
OK_FACTOR = 2.0
WRONG_FACTOR = 20.0
# eager itself further from fp64 than this means that the reference, or this benchmark, is wrong
EAGER_LIMIT = 0.03
TENSOR_FLOOR = 1e-5
# a scalar's error can be near zero by luck
SCALAR_FLOOR = 1e-3


@dataclass(frozen=True)
class Error:
    """Distance from fp64: ``relative`` = ||out - ref|| / ||ref||, ``worst`` = max |out - ref| / max |ref|. NaN: inf."""

    relative: float
    worst: float
    scalar: bool = False

    def as_json(self) -> dict[str, float | None]:
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items() if k != "scalar"}


@dataclass(frozen=True)
class Verdict:
    status: str
    reason: str = ""


def distance(actual: Tensor, reference: Tensor) -> Error:
    """Error of ``actual`` against an fp64 ``reference``; a wrong shape or a value that is not finite is infinite."""
    scalar = reference.dim() == 0
    if actual.shape != reference.shape or not torch.isfinite(actual).all():
        return Error(math.inf, math.inf, scalar)
    # by rows: a whole fp64 copy of a head's gradient would be 4 GB
    square = reference.new_zeros(())
    worst = reference.new_zeros(())
    for a, r in zip(_pieces(actual), _pieces(reference)):
        difference = a.double() - r
        square += difference.square().sum()
        worst = torch.maximum(worst, difference.abs().max())
    norm, largest = torch.linalg.vector_norm(reference).item(), reference.abs().max().item()
    tiny = torch.finfo(torch.float64).tiny
    return Error(math.sqrt(square.item()) / max(norm, tiny), worst.item() / max(largest, tiny), scalar)


def _pieces(t: Tensor) -> tuple[Tensor, ...]:
    return (t,) if t.dim() == 0 else t.split(max(1, (1 << 27) * t.shape[0] // max(1, t.numel())))


def distances(actual: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Error]:
    """The error of every tensor of the reference; one that is missing is infinitely wrong."""
    infinite = Error(math.inf, math.inf)
    return {n: distance(actual[n], r) if n in actual else infinite for n, r in reference.items()}


def judge(errors: dict[str, Error], eager: dict[str, Error], strict: bool) -> Verdict:
    """OK, IMPRECISE or WRONG for one peer's errors beside eager's, the worst tensor deciding.

    Args:
        strict: what is over ``OK_FACTOR`` is WRONG; otherwise it is IMPRECISE up to ``WRONG_FACTOR``.
    """
    verdict = Verdict(OK)
    for name, error in errors.items():
        factor = excess(error, eager[name])
        if not factor <= (OK_FACTOR if strict else WRONG_FACTOR):
            return Verdict(WRONG, _describe(name, error, eager[name]))
        if factor > OK_FACTOR:
            verdict = Verdict(IMPRECISE, _describe(name, error, eager[name]))
    return verdict


def judge_eager(eager: dict[str, Error]) -> Verdict:
    """Eager against fp64: outside ``EAGER_LIMIT``, the reference cannot be trusted and nothing is timed."""
    for name, error in eager.items():
        if not error.relative <= EAGER_LIMIT:
            return Verdict(WRONG, f"{name}: eager is {error.relative:.2g} from fp64, over {EAGER_LIMIT}")
    return Verdict(OK)


def excess(error: Error, eager: Error) -> float:
    """How many times eager's error; the largest single element is allowed twice what the norm is."""
    floor = SCALAR_FLOOR if error.scalar else TENSOR_FLOOR
    relative = error.relative / max(eager.relative, floor)
    return max(relative, error.worst / (2 * max(eager.worst, floor)))


def largest_excess(errors: dict[str, Error], eager: dict[str, Error]) -> float:
    return max(excess(e, eager[n]) for n, e in errors.items())


def _describe(name: str, error: Error, eager: Error) -> str:
    return f"{name}: error {error.relative:.2g} (worst {error.worst:.2g}), eager's {eager.relative:.2g} ({eager.worst:.2g})"
