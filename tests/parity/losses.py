"""Cases of the fused loss, with and without an adapter on the head."""

import torch

from m3kernels import ops
from m3kernels.parity.case import OpCase, randn


def _make_loss(shape, dtype, generator):
    rows, width, vocab = shape
    labels = torch.randint(0, vocab, (rows,), generator=generator, device=generator.device)
    labels[:: max(2, rows // 5)] = -100
    # logits of a few units, as a trained model has them
    weight = (randn(vocab, width, dtype=torch.float32, generator=generator) * 3 / width**0.5).to(dtype)
    return {"hidden": randn(rows, width, dtype=dtype, generator=generator), "weight": weight, "labels": labels}


def _loss(**options):
    def run(hidden, weight, labels):
        losses = ops.linear_cross_entropy(hidden, weight, labels, **{**options, "reduction": "none"}).detach()
        return losses, ops.linear_cross_entropy(hidden, weight, labels, **options)

    return run


def _loss_eager(**options):
    def run(hidden, weight, labels):
        losses = ops.linear_cross_entropy_reference(hidden, weight, labels, **{**options, "reduction": "none"}).detach()
        return losses, ops.linear_cross_entropy_reference(hidden, weight, labels, **options)

    return run


def _loss_none(op):
    return lambda hidden, weight, labels: (op(hidden, weight, labels, reduction="none"),)


LOSS_SHAPES = {
    "small": ((30, 48, 301), (23, 33, 130), (16, 16, 1000)),
    "real": ((2048, 3072, 131072), (1111, 4096, 32003)),
}


LINEAR_CROSS_ENTROPY = OpCase(
    name="linear_cross_entropy",
    make=_make_loss,
    wrt=("hidden", "weight"),
    outputs=("losses", "mean"),
    ours=_loss(),
    eager=_loss_eager(),
    **LOSS_SHAPES,
    wrong={
        "labels off by one": lambda hidden, weight, labels: _loss()(
            hidden, weight, torch.where(labels >= 0, (labels + 1) % weight.shape[0], labels)
        ),
        "ignored rows counted": lambda hidden, weight, labels: _loss()(hidden, weight, labels.clamp(min=0)),
        "weight gradient misses the last row": lambda hidden, weight, labels: (
            _loss()(hidden, weight, labels)[0],
            (
                ops.linear_cross_entropy(hidden[:-1], weight, labels[:-1], reduction="sum")
                + ops.linear_cross_entropy(hidden[-1:], weight.detach(), labels[-1:], reduction="sum")
            )
            / (labels >= 0).sum(),
        ),
        "divided by all rows": lambda hidden, weight, labels: (
            _loss()(hidden, weight, labels)[0],
            ops.linear_cross_entropy(hidden, weight, labels, num_items_in_batch=len(labels)),
        ),
    },
)

SMOOTHED = OpCase(
    name="linear_cross_entropy (smoothing, z-loss)",
    make=_make_loss,
    wrt=("hidden", "weight"),
    outputs=("losses", "mean"),
    ours=_loss(label_smoothing=0.1, z_loss=1e-2),
    eager=_loss_eager(label_smoothing=0.1, z_loss=1e-2),
    **LOSS_SHAPES,
    wrong={
        "smoothing dropped": _loss(z_loss=1e-2),
        "z-loss dropped": _loss(label_smoothing=0.1),
        "z-loss doubled": _loss(label_smoothing=0.1, z_loss=2e-2),
    },
)

LOSS_PER_ROW = OpCase(
    name="linear_cross_entropy (reduction none)",
    make=_make_loss,
    wrt=("hidden", "weight"),
    outputs=("losses",),
    ours=_loss_none(ops.linear_cross_entropy),
    eager=_loss_none(ops.linear_cross_entropy_reference),
    **LOSS_SHAPES,
    wrong={
        "incoming gradient ignored": lambda hidden, weight, labels: (
            (mean := ops.linear_cross_entropy(hidden, weight, labels, reduction="sum"))
            - mean.detach()
            + ops.linear_cross_entropy(hidden, weight, labels, reduction="none").detach(),
        ),
        "frozen head": lambda hidden, weight, labels: (
            ops.linear_cross_entropy(hidden, weight.detach(), labels, reduction="none") + 0 * weight.sum(),
        ),
        "frozen body": lambda hidden, weight, labels: (
            ops.linear_cross_entropy(hidden.detach(), weight, labels, reduction="none") + 0 * hidden.sum(-1).float(),
        ),
    },
)


def _make_head_adapter(shape, dtype, generator):
    _, width, vocab = shape
    rank = 5
    a = randn(rank, width, dtype=dtype, generator=generator) * width**-0.5
    # as large a part of the logits as the head's own
    return _make_loss(shape, dtype, generator) | {"A": a, "B": randn(vocab, rank, dtype=dtype, generator=generator)}


def _head_adapter(op, scaling=0.75, **options):
    def run(hidden, weight, labels, A, B):
        given = {**options, "adapters": [(A, B, scaling)]}
        losses = op(hidden, weight, labels, **{**given, "reduction": "none"}).detach()
        return losses, op(hidden, weight, labels, **given)

    return run


_adapted = _head_adapter(ops.linear_cross_entropy)

HEAD_ADAPTER = OpCase(
    name="linear_cross_entropy (adapter)",
    make=_make_head_adapter,
    wrt=("hidden", "weight", "A", "B"),
    outputs=("losses", "mean"),
    ours=_adapted,
    eager=_head_adapter(ops.linear_cross_entropy_reference),
    **LOSS_SHAPES,
    wrong={
        "scaling twice": _head_adapter(ops.linear_cross_entropy, 0.75**2),
        "one row of B shifted": lambda hidden, weight, labels, A, B: _adapted(hidden, weight, labels, A, B.roll(1, 0)),
        "adapter dropped": lambda hidden, weight, labels, A, B: _adapted(hidden, weight, labels, 0 * A, B),
        "gradient of hidden misses the adapter": lambda hidden, weight, labels, A, B: _adapted(
            torch.cat([hidden, hidden.detach()], -1),
            torch.cat([weight, 0 * weight], -1),
            labels,
            torch.cat([0 * A, A], -1),
            B,
        ),
        "gradient of A misses the last row": lambda hidden, weight, labels, A, B: (
            _adapted(hidden, weight, labels, A, B)[0],
            (
                ops.linear_cross_entropy(*(hidden[:-1], weight, labels[:-1]), reduction="sum", adapters=[(A, B, 0.75)])
                + ops.linear_cross_entropy(
                    *(hidden[-1:], weight, labels[-1:]), reduction="sum", adapters=[(A.detach(), B, 0.75)]
                )
            )
            / (labels >= 0).sum(),
        ),
    },
)


def _head_adapter_per_row(op, scaling=0.75):
    return lambda hidden, weight, labels, A, B: (
        op(hidden, weight, labels, reduction="none", adapters=[(A, B, scaling)]),
    )


_adapted_rows = _head_adapter_per_row(ops.linear_cross_entropy)

HEAD_ADAPTER_PER_ROW = OpCase(
    name="linear_cross_entropy (adapter, reduction none)",
    make=_make_head_adapter,
    wrt=("hidden", "weight", "A", "B"),
    outputs=("losses",),
    ours=_adapted_rows,
    eager=_head_adapter_per_row(ops.linear_cross_entropy_reference),
    **LOSS_SHAPES,
    wrong={
        "scaling twice": _head_adapter_per_row(ops.linear_cross_entropy, 0.75**2),
        "frozen B": lambda hidden, weight, labels, A, B: (
            _adapted_rows(hidden, weight, labels, A, B.detach())[0] + 0 * B.sum(),
        ),
        "incoming gradient ignored": lambda hidden, weight, labels, A, B: (
            (mean := ops.linear_cross_entropy(hidden, weight, labels, reduction="sum", adapters=[(A, B, 0.75)]))
            - mean.detach()
            + _adapted_rows(hidden, weight, labels, A, B)[0].detach(),
        ),
    },
)
