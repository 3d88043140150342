"""The vocabulary-parallel loss equals one process with all logits, in fp64, forward and backward; wrong variants do not."""

import pytest
import torch
import torch.distributed as dist
from pool import run

from m3kernels.ops import linear_cross_entropy_reference
from m3kernels.ops._triton import INTERPRET
from m3kernels.parallel import (
    all_gather_tokens,
    all_reduce_sum,
    cross_entropy,
    reduce_scatter_tokens,
    vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
)

V, D, T = 24, 6, 16
ORIGINALS = {name: getattr(cross_entropy, name) for name in ("all_reduce_max", "all_reduce_sum", "rank_in")}


def labels_of(kind):
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(0, V, (T,), generator=g)
    if kind == "uneven":  # most labels belong to one rank, a third is ignored
        labels = torch.randint(0, V // 4, (T,), generator=g)
        labels[-1] = V - 1
        labels[::3] = -100
    elif kind == "all ignored":
        labels[:] = -100
    elif kind == "ignores zero":
        labels[::2] = 0
    return labels


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(4)
    return (3 * torch.randn(T, D, generator=g, dtype=torch.float64)).to(dtype), (
        3 * torch.randn(V, D, generator=g, dtype=torch.float64)
    ).to(dtype)


def reference(kind="all", scaled_by=1.0, dtype=torch.float64, **options):
    hidden, weight = (t.requires_grad_() for t in inputs(dtype))
    if "num_items" in options:
        options["num_items_in_batch"] = options.pop("num_items")
    loss = linear_cross_entropy_reference(hidden, weight, labels_of(kind), **options)
    (loss * scaled_by).backward()
    return loss.detach(), hidden.grad, weight.grad


def sharded(kind="all", scaled_by=1.0, dtype=torch.float64, wrong=None, device="cpu", labels_on="cpu", **options):
    hidden, weight = inputs(dtype)
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    x_tD = hidden.chunk(ranks)[rank].to(device).requires_grad_()
    weight_vD = weight.chunk(ranks)[rank].to(device).requires_grad_()
    replaced = {"rank": ("rank_in", lambda g: 0), "max": ("all_reduce_max", lambda x, g: x),
                "sum": ("all_reduce_sum", lambda x, g: x)}.get(wrong)  # fmt: skip
    if replaced:
        setattr(cross_entropy, *replaced)
    try:
        hidden_TD = (
            x_tD.expand(ranks, *x_tD.shape).flatten(0, 1) if wrong == "gather" else all_gather_tokens(x_tD, group)
        )
        labels = labels_of(kind).to(labels_on)
        loss = vocab_parallel_linear_cross_entropy(hidden_TD, weight_vD, labels, group, **options)
        (loss * scaled_by).backward()
    finally:
        for name, function in ORIGINALS.items():
            setattr(cross_entropy, name, function)
    return loss.detach().cpu(), x_tD.grad.cpu(), weight_vD.grad.cpu()


def job(options):
    return sharded(**options)


def close(results, wanted, tolerance=1e-12):
    losses = [r[0] for r in results]
    if not all(torch.equal(losses[0], other) for other in losses):
        return False
    found = losses[0], torch.cat([r[1] for r in results]), torch.cat([r[2] for r in results])
    return all(torch.allclose(f, w, rtol=tolerance, atol=tolerance) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
@pytest.mark.parametrize("kind", ["all", "uneven", "all ignored", "ignores zero"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_one_process(ranks, kind, chunk_tokens):
    options = {"ignore_index": 0} if kind == "ignores zero" else {}
    wanted = reference(kind, 0.7, **options)
    results = run(ranks, job, {"kind": kind, "scaled_by": 0.7, "chunk_tokens": chunk_tokens, **options})
    assert close(results, wanted)
    if kind == "all ignored":
        assert not any(t.any() for r in results for t in r)


@pytest.mark.parametrize("num_items", [7, 7.5, torch.tensor(7), torch.tensor([7.0])])
def test_num_items(num_items):
    wanted = reference("uneven", num_items=float(num_items))
    assert close(run(2, job, {"kind": "uneven", "num_items": num_items}), wanted)


@pytest.mark.parametrize("wrong", ["rank", "max", "sum", "gather"])
def test_what_is_left_out_shows(wrong):
    assert not close(run(2, job, {"wrong": wrong}), reference(), 1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_half_precision_sums_in_fp32(dtype, tolerance, chunk_tokens):
    results = run(2, job, {"kind": "uneven", "dtype": dtype, "chunk_tokens": chunk_tokens})
    wanted = reference("uneven", dtype=dtype)
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == results[0][2].dtype == dtype
    assert close(results, wanted, tolerance)


@pytest.mark.parametrize(("device", "labels_on"), [("cpu", "cpu"), pytest.param("cuda", "cpu", marks=pytest.mark.gpu),
                                                   pytest.param("cuda", "cuda", marks=pytest.mark.gpu)])  # fmt: skip
@pytest.mark.parametrize("kind", ["uneven", "all ignored"])
def test_devices(kind, device, labels_on):
    """fp64 takes the plain form, fp32 the kernels where they run."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        options = {"kind": kind, "dtype": dtype, "device": device, "labels_on": labels_on, "chunk_tokens": 5}
        assert close(run(2, job, options), reference(kind, dtype=dtype), tolerance)


def far_apart():
    """Logits of ranks that are 1,400 apart: exponentials that no sum holds without the maximum of all ranks."""
    hidden, weight = inputs()
    hidden[:, 0], weight[: V // 2, 0], weight[V // 2 :, 0] = 1.0, -700.0, 700.0
    wanted = linear_cross_entropy_reference(hidden, weight, labels_of("all"))
    weight_vD = weight.chunk(2)[dist.get_rank()]
    return vocab_parallel_linear_cross_entropy(hidden, weight_vD, labels_of("all"), dist.group.WORLD), wanted


def test_logits_of_any_size():
    for loss, wanted in run(2, far_apart):
        assert wanted > 100 and torch.allclose(loss, wanted, rtol=1e-14)


def kernels_launched(dtype, backend):
    names, launch = [], cross_entropy.launch
    cross_entropy.launch = lambda op, kernel, *args, **meta: (
        names.append(kernel.__name__) or launch(op, kernel, *args, **meta)
    )
    try:
        sharded("uneven", dtype=dtype, backend=backend, device="cuda" if torch.cuda.is_available() else "cpu")
    finally:
        cross_entropy.launch = launch
    return names


@pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1")
def test_kernels_run_where_they_can():
    both = ["vocab_parallel_stats_kernel", "vocab_parallel_dlogits_kernel"]
    assert run(2, kernels_launched, torch.float32, "auto") == [both, both]
    assert run(2, kernels_launched, torch.float32, "reference") == [[], []]
    assert run(2, kernels_launched, torch.float64, "auto") == [[], []]


def test_no_group():
    for kind in ("all", "uneven", "all ignored"):
        hidden, weight = (t.requires_grad_() for t in inputs())
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, labels_of(kind), None, chunk_tokens=5)
        loss.backward()
        assert close([(loss.detach(), hidden.grad, weight.grad)], reference(kind))


def tied(ranks_alone=False):
    """Embedding, a layer and loss over one tied table."""
    hidden, table = inputs()
    ids, labels = labels_of("all"), labels_of("all").roll(-1)
    if ranks_alone:
        table.requires_grad_()
        x = torch.tanh(torch.nn.functional.embedding(ids, table) + hidden)
        loss = linear_cross_entropy_reference(x, table, labels)
        loss.backward()
        return loss.detach(), table.grad
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    table_vD = table.chunk(ranks)[rank].clone().requires_grad_()
    x_tD = reduce_scatter_tokens(vocab_parallel_embedding(ids, table_vD, group), group)
    x_TD = all_gather_tokens(torch.tanh(x_tD + hidden.chunk(ranks)[rank]), group)
    loss = vocab_parallel_linear_cross_entropy(x_TD, table_vD, labels, group)
    loss.backward()
    return loss.detach(), table_vD.grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_tied_table(ranks):
    loss, dtable = tied(ranks_alone=True)
    results = run(ranks, tied)
    assert all(torch.allclose(r[0], loss, rtol=0, atol=1e-12) for r in results)
    assert torch.allclose(torch.cat([r[1] for r in results]), dtable, rtol=0, atol=1e-12)


def padded(vocab, dtype, device="cpu"):
    """Rows from ``vocab`` on are padding, with anything in them."""
    hidden, weight = inputs(dtype)
    weight[vocab:] *= 100
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    x_tD = hidden.chunk(ranks)[rank].to(device).requires_grad_()
    weight_vD = weight.chunk(ranks)[rank].to(device).requires_grad_()
    labels = labels_of("all").remainder(vocab)
    labels[::3] = -100
    hidden_TD = all_gather_tokens(x_tD, group)
    options = {"vocab_size": vocab, "chunk_tokens": 5}
    loss = vocab_parallel_linear_cross_entropy(hidden_TD, weight_vD, labels, group, **options)
    loss.backward()
    return loss.detach().cpu(), x_tD.grad.cpu(), weight_vD.grad.cpu()


@pytest.mark.interpreter
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("ranks", "vocab"), [(1, 23), (2, 21), (2, 12), (4, 21), (4, 17), (4, 5)])
def test_padding_is_no_part_of_the_vocabulary(ranks, vocab, dtype, tolerance, device):
    """Down to ranks that hold nothing else."""
    hidden, weight = inputs(dtype)
    hidden.requires_grad_()
    weight = weight[:vocab].clone().requires_grad_()
    labels = labels_of("all").remainder(vocab)
    labels[::3] = -100
    wanted = linear_cross_entropy_reference(hidden, weight, labels)
    wanted.backward()
    dweight = torch.cat([weight.grad, weight.new_zeros(V - vocab, D)])
    results = run(ranks, padded, vocab, dtype, device)
    assert close(results, (wanted.detach(), hidden.grad, dweight), tolerance)
    assert not torch.cat([r[2] for r in results])[vocab:].any()


def only(which):
    """What needs no gradient costs no product."""
    hidden, weight = inputs()
    weight = weight.chunk(2)[dist.get_rank()]
    products = []
    mm, add = torch.mm, cross_entropy.accumulate
    torch.mm = lambda *args, **options: products.append(args[1].shape) or mm(*args, **options)
    cross_entropy.accumulate = lambda *args, **options: products.append("dweight") or add(*args, **options)
    try:
        hidden.requires_grad_("hidden" in which)
        weight.requires_grad_("weight" in which)
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, labels_of("uneven"), dist.group.WORLD)
        if which:
            loss.backward()
    finally:
        torch.mm, cross_entropy.accumulate = mm, add
    return len(products), hidden.grad is not None, weight.grad is not None


@pytest.mark.parametrize("which", [(), ("hidden",), ("weight",), ("hidden", "weight")])
def test_nothing_is_computed_that_needs_no_gradient(which):
    assert run(2, only, which) == [(1 + len(which), "hidden" in which, "weight" in which)] * 2


def twice(again):
    hidden, weight = inputs()
    weight = weight.chunk(2)[dist.get_rank()].clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, labels_of("all"), dist.group.WORLD)
    if again == "backward":
        loss.backward(retain_graph=True)
        first = weight.grad.clone()
        loss.backward()
        return torch.equal(weight.grad, 2 * first)
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    grad.sum().backward()


def test_backward_twice_and_of_itself():
    assert run(2, twice, "backward") == [True, True]
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        run(2, twice, "double")


def refused(change):
    hidden, weight, labels, options = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long), {}
    if change == "width":
        weight = torch.zeros(5, 2)
    elif change == "rows":
        labels = labels[:3]
    elif change == "floats":
        labels = labels.float()
    elif change == "dtype":
        weight = weight.double()
    elif change == "chunk":
        options = {"chunk_tokens": 0}
    elif change == "padding":
        options = {"vocab_size": 11}
    elif change == "padded label":
        labels[1], options = 9, {"vocab_size": 9}
    elif change == "label" and dist.get_rank() == 0:
        # only one rank refuses: with a collective before, the other would not end either
        labels[1] = 10
    elif change == "label":
        return
    vocab_parallel_linear_cross_entropy(hidden, weight, labels, dist.group.WORLD, **options)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ("width", ValueError, r"\(4, 3\) and \(5, 2\)"),
        ("rows", ValueError, r"labels \(4,\), one a token, got \(3,\)"),
        ("floats", TypeError, "must be integers"),
        ("dtype", ValueError, "one dtype"),
        ("chunk", ValueError, "must be positive, got 0"),
        ("padding", ValueError, r"vocab_size must be in \[1, 10\], the rows of all ranks, got 11"),
        ("padded label", IndexError, r"neither in \[0, 9\) nor ignore_index -100: found \[9\]"),
        ("label", IndexError, r"neither in \[0, 10\) nor ignore_index -100: found \[10\]"),
    ],
)
def test_refusals(change, error, said):
    with pytest.raises(error, match=said):
        run(2, refused, change)


def sums_over_ranks_of_hidden_gradients():
    """With tokens on every rank ``all_reduce_sum`` completes the gradient."""
    hidden, weight = inputs()
    weight = weight.chunk(2)[dist.get_rank()]
    hidden.requires_grad_()
    vocab_parallel_linear_cross_entropy(hidden, weight, labels_of("all"), dist.group.WORLD).backward()
    return all_reduce_sum(hidden.grad, dist.group.WORLD)


def test_the_gradient_of_hidden_is_a_part_of_a_sum():
    for found in run(2, sums_over_ranks_of_hidden_gradients):
        assert torch.allclose(found, reference()[1], rtol=0, atol=1e-12)
