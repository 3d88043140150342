"""Sampling: transformers' filters, the distribution, ties and bad numbers, and the kernels' tokens against the reference's."""

import importlib

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from m3kernels.ops import sample, sample_reference
from m3kernels.ops._common import use_triton
from m3kernels.parity.core import poisoned_allocations

module = importlib.import_module("m3kernels.ops.sample")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    not use_triton("sample", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
INF, NAN = float("inf"), float("nan")


def draw(rows, vocab, seed=0, spread=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * spread).to(DEVICE, dtype)


def theirs(logits, temperature, top_k, top_p):
    """Logits as transformers filters them before it draws."""
    scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    return TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores


def one(value, dtype=torch.float32):
    return torch.full((1,), value, dtype=dtype, device=DEVICE)


def allowed(logits, temperature, top_k, top_p):
    """What the op may draw."""
    x, rows = module.scaled_reference(logits, one(temperature)), len(logits)
    return x >= module.least_allowed_reference(x, one(top_k, torch.int64).expand(rows), one(top_p).expand(rows))


FILTERS = [
    (1.0, 5, 1.0),
    (0.7, 0, 0.9),
    (1.3, 40, 0.8),
    (0.1, 500, 0.95),
    (5.0, 0, 0.05),
    (1.0, 1, 0.5),
    (2.0, 300, 1.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_what_may_be_drawn_is_what_transformers_leaves(temperature, top_k, top_p):
    for seed in range(8):
        logits = draw(4, 300, seed)
        expected = theirs(logits, temperature, top_k, top_p)
        likely = logits / temperature >= (logits / temperature).amax(-1, keepdim=True) - module.CUT
        assert torch.equal(allowed(logits, temperature, top_k, top_p), expected.isfinite() & likely)


def test_filters_in_another_order_are_seen():
    logits = draw(4, 300)
    p_first = TopKLogitsWarper(40)(None, TopPLogitsWarper(0.8)(None, logits)).isfinite()
    assert not torch.equal(allowed(logits, 1.0, 40, 0.8), p_first)
    assert not torch.equal(allowed(logits, 1.0, 41, 1.0), theirs(logits, 1.0, 40, 1.0).isfinite())


def chi_square(tokens, probabilities):
    """Pearson's statistic, standardised: about normal where the tokens are drawn so."""
    expected = probabilities[probabilities > 0] * len(tokens)
    found = torch.bincount(tokens, minlength=len(probabilities))
    assert not found[probabilities == 0].any()
    degrees = len(expected) - 1
    return float((((found[probabilities > 0] - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 9, 1.0), (1.5, 12, 0.8)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_k, top_p):
    logits = draw(1, 20, seed=5, spread=1.0)
    probabilities = theirs(logits.double(), temperature, top_k, top_p).softmax(-1)[0].cpu()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 11}
    tokens = torch.cat([sample_reference(logits.expand(3_000, -1), **options, step=step) for step in range(3)]).cpu()
    assert chi_square(tokens, probabilities) < 5
    wrong = theirs(logits.double(), temperature * 1.3, top_k, top_p).softmax(-1)[0].cpu()
    assert chi_square(tokens, wrong) > 5


def test_draws_of_one_row_over_steps_are_independent_of_the_batch():
    logits, options = draw(4, 50), {"temperature": 1.0, "top_p": 0.9, "seed": 2**62 + 5}
    whole = torch.stack([sample_reference(logits, **options, step=step) for step in range(20)])
    assert torch.equal(torch.stack([sample_reference(logits[:2], **options, step=s) for s in range(20)]), whole[:, :2])
    same = torch.stack([sample_reference(logits[:1].expand(4, -1), **options, step=step) for step in range(20)])
    assert (same[:, 0] != same[:, 1]).any() and (same[0] != same[1]).any()
    assert not torch.equal(sample_reference(logits.repeat(8, 1), **options, step=2**32), whole[:1].repeat(1, 8)[0])


KERNEL_CASES = {
    "no filters": (50, {"temperature": 1.0, "filters": False}),
    "filters that do nothing": (50, {"temperature": 1.0}),
    "top-k": (2049, {"temperature": 0.7, "top_k": 40}),
    "top-p": (2049, {"temperature": 1.0, "top_p": 0.9}),
    "both, several stretches": (5000, {"temperature": 2.0, "top_k": 900, "top_p": 0.8}),
    "one token": (1, {"temperature": 1.0, "top_p": 0.5}),
    "greedy": (5000, {"temperature": 0.0, "greedy": True}),
    "greedy, not known": (300, {"temperature": 0.0, "top_k": 3}),
}


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernels_draw_the_references_tokens(case, dtype):
    vocab, options = KERNEL_CASES[case]
    logits = draw(2, vocab, seed=3, dtype=dtype)
    options = {**options, "seed": 2**40 + 17, "step": 12}
    with poisoned_allocations():
        ours = sample(logits, **options)
    assert torch.equal(ours, sample_reference(logits, **options)) and ours.dtype == torch.int64


def least(logits, temperature, top_k, top_p):
    """(the kernels', the reference's) least logit that is allowed."""
    rows, vocab = logits.shape
    settings = (one(temperature), one(top_k, torch.int64), one(top_p))
    chunk = module.GROUP * -(-vocab // module.GROUP // module.MAX_SPLITS or 1)
    with poisoned_allocations():
        found = module._least_allowed(logits, *settings, chunk, -(-vocab // chunk), {"OVERLAP": False, "num_warps": 4})
    x = module.scaled_reference(logits, settings[0])
    return found, module.least_allowed_reference(x, *settings[1:])[:, 0]


@kernels
@pytest.mark.parametrize(
    ("name", "temperature", "top_k", "top_p"),
    [
        ("spread", 1.0, 3, 1.0),
        ("spread", 1.0, 0, 0.5),
        ("flat", 1.0, 1500, 0.9),
        ("flat", 1.0, 0, 0.999),
        ("cold", 0.01, 60, 0.9),
        ("tied", 1.0, 7, 0.5),
        ("mostly -inf", 1.0, 100, 0.9999),
        ("spread", 1.0, 10**6, 0.0),
        ("spread", 1.0, 2, 1.0),
    ],
)
def test_the_least_logit_is_the_sorts(name, temperature, top_k, top_p):
    logits = draw(1, 2500, seed=8, spread=0.5 if name == "flat" else 4.0)
    if name == "tied":
        logits = logits.round()
    if name == "mostly -inf":
        logits = torch.where(torch.arange(2500, device=DEVICE) % 50 == 3, logits, -INF)
    found, expected = least(logits, temperature, top_k, top_p)
    assert torch.equal(found, expected)
    # one more, or a little less: another one
    if name == "spread" and 0 < top_k < 10:
        assert not torch.equal(least(logits, temperature, top_k + 1, top_p)[0], expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=kernels)])
def test_ties_and_what_is_no_number(backend):
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, -INF],
            [-INF, -INF, 2.0, -INF],
            [NAN, 1.0, NAN, 1.0],
            [NAN, -INF, NAN, NAN],
            [0.0, INF, 5.0, INF],
        ],
        device=DEVICE,
    )
    assert sample(logits, temperature=0.0, greedy=True, backend=backend).tolist() == [1, 2, 1, 0, 1]
    for filters in ({}, {"top_k": 2, "top_p": 0.9}):
        tokens = sample(logits, temperature=0.5, **filters, seed=4, backend=backend).tolist()
        assert [token in may for token, may in zip(tokens, ((0, 1, 2), (2,), (1, 3), (0,), (1, 3)))] == [True] * 5


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=kernels)])
def test_settings_of_each_row(backend):
    logits = draw(4, 300)
    options = {
        "temperature": torch.tensor([0.0, 1.0, 1.0, 50.0], device=DEVICE),
        "top_k": torch.tensor([0, 1, 0, 0], device=DEVICE),
        "top_p": torch.tensor([1.0, 1.0, 1e-6, 1.0], device=DEVICE),
    }
    tokens = torch.stack([sample(logits, **options, step=step, backend=backend) for step in range(4)])
    assert torch.equal(tokens[:, :3], logits.argmax(-1)[:3].expand(4, -1))
    assert len(set(tokens[:, 3].tolist())) > 1


@kernels
def test_strides_and_no_rows():
    logits = draw(2, 600)
    options = {"temperature": 1.0, "top_k": 9, "seed": 1}
    assert torch.equal(sample(logits[:, ::2], **options), sample(logits[:, ::2].contiguous(), **options))
    assert torch.equal(sample(logits[:, 3:70], **options), sample(logits[:, 3:70].clone(), **options))
    assert sample(logits[:0], **options).shape == (0,)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 0.9), (0, 0.9), (2000, 1.0)])
def test_a_graph_counts_on(top_k, top_p):
    """At the real vocabulary: replays with a step that the device counts are the CPU's tokens of each step."""
    logits, step = draw(3, 131_072), torch.zeros(1, dtype=torch.int64, device="cuda")
    options = {
        "temperature": one(0.8),
        "top_k": one(top_k, torch.int64),
        "top_p": one(top_p),
        "seed": one(7, torch.int64),
    }
    sample(logits, **options, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, **options, step=step)
        step += 1
    step.zero_()
    on_cpu = {name: value.cpu() for name, value in options.items()}
    different = 0
    for number in range(5):
        graph.replay()
        different += int((tokens.cpu() != sample_reference(logits.cpu(), **on_cpu, step=number)).sum())
    # a draw whose two best are within a rounding may go the other way
    assert different <= 1


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"logits": torch.zeros(4)}, ValueError, r"must be \(B, V\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "at least 1"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must be a number, or a tensor of 1 or 2"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must be a number"),
        ({"top_k": torch.ones(1)}, TypeError, "top_k must be of a dtype like torch.int64"),
        ({"temperature": torch.ones(1, dtype=torch.int64)}, TypeError, "temperature"),
        ({"step": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "on meta"),
        ({"backend": "cuda"}, ValueError, "allowed"),
    ],
)
def test_refusals(changed, error, says):
    with pytest.raises(error, match=says):
        sample(**{"logits": torch.zeros(2, 5), "temperature": 1.0, **changed})
