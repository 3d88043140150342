"""How the ops' custom operators are sharded, so that models made of DTensors can call them.

    op                      may be sharded                          whole on every rank
    rms_norm, add_rms_norm  rows                                    the last dimension, the weight
    rotary, rotary_2d       batch, heads, sequence                  head_dim; a table that positions look up
    swiglu                  every dimension (gate and up apart),    gate and up in one tensor: its last dimension
                            rows (in one tensor)

``import m3kernels.parallel`` registers them. From then on these ops take DTensors, all of whose tensors must be DTensors of
one mesh; a placement that no rule has (a sum that is Partial, a last dimension that is sharded) is redistributed to one that
has, as DTensor does for its own operators. The gradient of a norm's weight comes back Partial where rows are sharded. The
kernels run on the local shards; where there are none (fp64, a CPU) the ops' plain PyTorch form runs on the DTensors.
"""

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

import m3kernels.ops  # noqa: F401  defines the operators
from m3kernels.ops._common import sharded_ops

# (placements of outputs, placements of inputs), None for an input that is no tensor; one mesh dimension
Rule = tuple[list[Placement], list[Placement | None]]
WHOLE = Replicate()


def _like(tensor, placement: Placement) -> Placement | None:
    """``placement`` for an optional input that is there."""
    return None if tensor is None else placement


def _rows(x) -> range:
    return range(x.ndim - 1)


def rms_norm_rules(x, weight, eps) -> list[Rule]:
    """(x, weight, eps) -> (y, rstd)"""
    placements = (WHOLE, *map(Shard, _rows(x)))
    return [([p, p], [p, WHOLE, None]) for p in placements]


def add_rms_norm_rules(x, residual, weight, eps) -> list[Rule]:
    """(x, residual, weight, eps) -> (y, summed, rstd)"""
    placements = (WHOLE, *map(Shard, _rows(x)))
    return [([p, p, p], [p, p, WHOLE, None]) for p in placements]


def rms_norm_backward_rules(dy, dsummed, x, weight, rstd, needs_dweight) -> list[Rule]:
    """(dy, dsummed, x, weight, rstd, needs_dweight) -> (dx, dweight): each rank sums its own rows."""
    rules = []
    for p in (WHOLE, *map(Shard, _rows(x))):
        dweight = WHOLE if p == WHOLE else Partial()
        rules.append(([p, dweight], [p, _like(dsummed, p), p, WHOLE, p, None]))
    return rules


def swiglu_rules(gate, up) -> list[Rule]:
    """(gate, up) -> y"""
    dims = _rows(gate) if up is None else range(gate.ndim)
    return [([p], [p, _like(up, p)]) for p in (WHOLE, *map(Shard, dims))]


def swiglu_backward_rules(dy, gate, up) -> list[Rule]:
    """(dy, gate, up) -> (dgate, dup), dup empty where up is none"""
    dims = _rows(gate) if up is None else range(gate.ndim)
    return [([p, WHOLE if up is None else p], [p, p, _like(up, p)]) for p in (WHOLE, *map(Shard, dims))]


def rotary_rules(q, k, cos, sin, positions, beta, original_max) -> list[Rule]:
    """(q, k, cos, sin, positions, beta, original_max) -> (q, k), forward and backward; q and k are (batch, heads, seq, dim)."""
    looked_up = cos.ndim == 2 and positions is not None

    def rule(dim: int, table: Placement, at: Placement) -> Rule:
        p = Shard(dim)
        return [p, p], [p, p, table, table, _like(positions, at), None, None]

    def of_batch(tensor) -> Placement:
        return WHOLE if tensor is None or tensor.shape[0] == 1 else Shard(0)

    table_by_batch = of_batch(cos) if cos.ndim == 3 else WHOLE
    table_by_token = WHOLE if looked_up else Shard(cos.ndim - 2)
    return [
        ([WHOLE, WHOLE], [WHOLE, WHOLE, WHOLE, WHOLE, _like(positions, WHOLE), None, None]),
        rule(0, table_by_batch, of_batch(positions)),
        rule(1, WHOLE, WHOLE),
        rule(2, table_by_token, Shard(1)),
    ]


RULES = {
    "rms_norm": rms_norm_rules,
    "rms_norm_backward": rms_norm_backward_rules,
    "add_rms_norm": add_rms_norm_rules,
    "add_rms_norm_backward": rms_norm_backward_rules,
    "rotary": rotary_rules,
    "rotary_backward": rotary_rules,
    "swiglu": swiglu_rules,
    "swiglu_backward": swiglu_backward_rules,
}


def register() -> None:
    """Hands the rules to DTensor, and opens the ops to DTensors."""
    for name, rules in RULES.items():
        register_sharding(getattr(torch.ops.m3kernels, name).default)(rules)
    sharded_ops.update(("rms_norm", "add_rms_norm", "rotary", "rotary_2d", "swiglu"))
