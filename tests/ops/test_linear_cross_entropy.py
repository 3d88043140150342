"""What only the loss promises: memory, skipped rows, frozen parts, reductions, and how gradients are handed over."""

import pytest
import torch

from m3kernels.ops import _cross_entropy_chunks as chunks
from m3kernels.ops import linear_cross_entropy, linear_cross_entropy_reference
from m3kernels.ops._common import use_triton
from m3kernels.ops._cross_entropy_kernels import label_summary
from m3kernels.parity.core import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("rms_norm", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)


def make(rows=24, width=32, vocab=130, dtype=torch.float32, ignored=6):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 0.5).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[:ignored] = -100
    return hidden, weight, labels


@pytest.fixture
def gemm_rows(monkeypatch):
    """Rows of every logits product."""
    seen = []
    mm = torch.mm

    def counting(a, b, **kwargs):
        seen.append(a.shape[0])
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counting)
    return seen


def test_ignored_rows_are_not_computed_when_labels_are_on_the_host(gemm_rows):
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert set(gemm_rows) == {18}
    assert (
        torch.equal(hidden.grad[:6], torch.zeros_like(hidden[:6])) and hidden.grad[6:].abs().min(1).values.gt(0).all()
    )
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_with_zero_gradient(reduction):
    hidden, weight, labels = make(ignored=24)
    for on in ("cpu", DEVICE):
        loss, accuracy = linear_cross_entropy(
            hidden, weight, labels.to(on), reduction=reduction, return_token_accuracy=True
        )
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert loss.sum() == 0 and accuracy == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_nothing_is_computed_for_a_frozen_head_or_frozen_body(gemm_rows):
    hidden, weight, labels = make(ignored=0)
    (frozen_head,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels), hidden)
    assert len(gemm_rows) == 2  # logits, dhidden
    (frozen_body,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels), weight)
    assert len(gemm_rows) == 3  # logits; dweight is an addmm
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert len(gemm_rows) == 4
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    assert torch.equal(both[0], frozen_head) and torch.equal(both[1], frozen_body)


@pytest.mark.parametrize("incoming", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_survive_a_kept_graph(incoming, dtype):
    hidden, weight, labels = make(dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, labels)
    incoming = torch.tensor(incoming, device=DEVICE)
    first = torch.autograd.grad(loss, (hidden, weight), incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (hidden, weight), incoming, retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight), incoming)
    assert all(torch.equal(a, b) for group in (first, second, third) for a, b in zip(kept, group))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight), incoming)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
def test_an_incoming_gradient_costs_one_more_rounding(dtype):
    hidden, weight, labels = make(rows=60, vocab=1000, dtype=dtype)
    incoming = torch.tensor(0.3671875, device=DEVICE)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(linear_cross_entropy_reference(*wide, labels), wide, incoming.double())
    eager = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, labels), (hidden, weight), incoming)
    for keep in (True, False):
        loss = linear_cross_entropy(hidden, weight, labels)
        got = torch.autograd.grad(loss, (hidden, weight), incoming, retain_graph=keep)
        for g, e, t in zip(got, eager, truth):
            assert relative_error(g, t) <= 1.5 * relative_error(e, t) + torch.finfo(dtype).eps / 4


def test_fp16_gradients_do_not_underflow():
    hidden, weight, labels = make(rows=64, vocab=4000, dtype=torch.float16, ignored=0)
    loss = linear_cross_entropy(hidden, weight * 0.01, labels, num_items_in_batch=100_000)
    got = torch.autograd.grad(loss, hidden, torch.tensor(65536.0, device=DEVICE))[0]
    wide = hidden.detach().double().requires_grad_()
    expected = torch.autograd.grad(
        linear_cross_entropy_reference(wide, weight.double() * 0.01, labels, num_items_in_batch=100_000),
        wide,
        torch.tensor(65536.0, device=DEVICE, dtype=torch.float64),
    )[0]
    assert relative_error(got, expected) < 5e-3  # fp16 logits; with underflow it is of order 1


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(7, device=DEVICE)])
def test_num_items_in_batch(items):
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=items)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels, reduction="sum") / 7)


def test_accuracy_takes_the_first_of_equal_logits():
    hidden = torch.ones(4, 1, device=DEVICE)
    weight = torch.tensor([[1.0], [3.0], [3.0], [2.0]], device=DEVICE)
    labels = torch.tensor([1, 2, -100, 1], device=DEVICE)
    _, accuracy = linear_cross_entropy(hidden, weight, labels, return_token_accuracy=True)
    torch.testing.assert_close(accuracy.item(), 2 / 3)


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 130 * 4 * 5}, {"accumulate_dtype": torch.float32}])
def test_chunks_do_not_change_the_result(options):
    hidden, weight, labels = make()
    whole = linear_cross_entropy_reference(hidden, weight, labels, label_smoothing=0.1, z_loss=1e-3)
    loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss=1e-3, **options)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(whole, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def plan(rows, dtype=torch.bfloat16, **changes):
    fields = {"accumulate": "auto", "chunk_bytes": 0, "needs_dweight": True, **changes}
    options = chunks.Options(
        ignore_index=-100, smoothing=0.0, z_loss=0.0, wants_correct=False, needs_dhidden=True, **fields
    )
    return chunks.plan_chunks(rows, 131072, dtype, options)


def test_plan_bounds_roundings_and_memory():
    for rows in (1, 127, 1000, 8192, 32768, 49152, 100_000, 262_144):
        step, in_fp32 = plan(rows)
        assert 1 <= step <= rows and not in_fp32 and -(-rows // step) <= chunks.MAX_ROUNDINGS
        assert step * 131072 * 2 <= max(chunks.LOGITS_BYTES, rows * 131072 * 2 / 30)
    assert plan(8192) == plan(8192, needs_dweight=False) == plan(8192, accumulate="weight") == (1024, False)
    # an eighth of all, which is what a step of few tokens has at its peak
    assert plan(4096, needs_dweight=False) == plan(2048, needs_dweight=False) == (512, False)
    assert plan(4096) == plan(16384, needs_dweight=False) == (1024, False)
    assert plan(8192, accumulate="float32") == (1024, True)
    assert plan(8192, chunk_bytes=2**20) == (4, True)
    assert plan(8192, dtype=torch.float16)[1] and not plan(8192, dtype=torch.float32)[1]


def test_bf16_sum_over_many_chunks_stays_near_one_gemm():
    if DEVICE != "cuda":
        pytest.skip("needs a GPU: the interpreter's bf16 arithmetic is wrong")
    rows, width, vocab = 4096, 64, 32768
    hidden, weight, labels = make(rows, width, vocab, torch.bfloat16, ignored=0)
    labels[: rows // 4] = 7  # a frequent token
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(linear_cross_entropy_reference(*wide, labels.cuda()), wide[1])[0]
    eager = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, labels.cuda()), weight)[0]
    loss = linear_cross_entropy(hidden, weight, labels.cuda(), chunk_bytes=vocab * 2 * rows // 16)
    assert relative_error(torch.autograd.grad(loss, weight)[0], truth) <= 1.5 * relative_error(eager, truth)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_deferred_label_terms_add_up(monkeypatch, options):
    """In fp32, where deferring has no use, it must change nothing: repeated, ignored, confident and unsure labels."""
    monkeypatch.setattr(chunks, "DEFERRING_DTYPES", (torch.float32,))
    hidden, weight, labels = make(rows=40)
    labels[10:30] = 5
    labels[30:] = 129
    with torch.no_grad():
        weight[129] = 4 * hidden[35]  # p near 1 for row 35
    for on in ("cpu", DEVICE):
        got = linear_cross_entropy(hidden, weight, labels.to(on), chunk_bytes=130 * 4 * 7, **options)
        expected = linear_cross_entropy_reference(hidden, weight, labels, **options)
        for a, b in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_confident_predictions_keep_their_gradient():
    """At p near 1 the label term cancels: deferring it there would leave only rounding error."""
    if DEVICE != "cuda":
        pytest.skip("needs a GPU: the interpreter's bf16 arithmetic is wrong")
    weight = torch.eye(256, device=DEVICE, dtype=torch.bfloat16).mul(3).repeat(2, 1).requires_grad_()
    labels = torch.arange(256, device=DEVICE).repeat(8)
    with torch.no_grad():
        weight[256:] *= -1
    hidden = (torch.eye(256, device=DEVICE, dtype=torch.bfloat16) * 5).repeat(8, 1).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(linear_cross_entropy_reference(*wide, labels), wide[1])[0]
    eager = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, labels), weight)[0]
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk_bytes=512 * 2 * 128), weight)[0]
    assert relative_error(got, truth) <= 1.5 * relative_error(eager, truth) + 2**-8


def test_labels_on_the_device_never_synchronise():
    if DEVICE != "cuda":
        pytest.skip("needs a GPU")
    hidden, weight, labels = make(dtype=torch.bfloat16)
    labels = labels.to(DEVICE)
    linear_cross_entropy(hidden, weight, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, num_items_in_batch=labels.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_casts_as_a_linear_layer_does():
    hidden, weight, labels = make()
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, labels), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("vocab", [1, 3, 8, 9, 700])
def test_accuracy_takes_the_first_of_equal_logits_at_any_vocabulary(vocab):
    """Small integers: most rows have several largest logits, inside a group of neighbours and across groups."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randint(-1, 2, (64, 4), generator=generator).to(DEVICE, torch.float32)
    weight = torch.randint(-1, 2, (vocab, 4), generator=generator).to(DEVICE, torch.float32)
    logits = hidden @ weight.t()
    largest = logits == logits.max(-1, keepdim=True).values
    first = torch.where(largest, torch.arange(vocab, device=DEVICE), vocab).min(-1).values
    last = torch.where(largest, torch.arange(vocab, device=DEVICE), -1).max(-1).values
    assert vocab < 3 or (first != last).any()
    loss, accuracy = linear_cross_entropy(hidden, weight, first, return_token_accuracy=True)
    assert accuracy == 1
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, first), rtol=1e-5, atol=1e-6)
    _, accuracy = linear_cross_entropy(hidden, weight, last, return_token_accuracy=True)
    torch.testing.assert_close(accuracy, (first == last).float().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_that_counts_in_any_dtype(dtype, rows):
    """bf16 with a trained head plans its chunks by dividing by the rows of one."""
    hidden = torch.randn(rows, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(16, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all(g.dtype == dtype and not g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    hidden, weight, labels = make(ignored=0)
    labels = (labels % 100).to(DEVICE, dtype)
    expected = linear_cross_entropy_reference(hidden, weight, labels.long())
    for backend in ("auto", "reference"):
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, backend=backend), expected)
    valid, inverse = label_summary(labels, 130, -100)
    assert valid and inverse.item() == pytest.approx(1 / 24)


@pytest.mark.parametrize("count", [0, 1, 5, 5000])
@pytest.mark.parametrize("wrong", [None, -1, -101, 50])
def test_label_summary(count, wrong):
    labels = torch.arange(count, device=DEVICE) % 50
    labels[::3] = -100
    if wrong is not None and count:
        labels[-1] = wrong
    valid, inverse = label_summary(labels, 50, -100)
    assert valid.item() == (wrong is None or not count)
    assert inverse.item() == pytest.approx(1 / max(1, (labels != -100).sum().item()), rel=1e-6)
