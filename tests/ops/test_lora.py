"""Adapters beside what every op is tested for: layers of one input, fp32 adapters, dropout's masks, refusals."""

import dataclasses

import pytest
import torch
import torch.utils.checkpoint

from m3kernels import ops
from m3kernels.ops import Adapted, lora_linear, lora_linears
from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._common import use_triton
from m3kernels.parity.core import allowed_error, poisoned_allocations, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("lora_linear", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def layers_of(width, outs, rank, dtype, adapters, dora=False, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*size, to=dtype, scale=1.0):
        return (torch.randn(size, generator=generator, device=DEVICE) * scale).to(to).requires_grad_()

    found = []
    for out in outs:
        weight, a = draw(out, width, scale=width**-0.5), draw(rank, width, to=adapters, scale=width**-0.5)
        magnitude = (1 + draw(out, to=adapters, scale=0.2).detach()).requires_grad_() if dora else None
        found.append(Adapted(weight, a, draw(out, rank, to=adapters, scale=rank**-0.5), 0.7, magnitude))
    return draw(5, 23, width), found


def tensors_of(x, layers):
    return [x, *(t for p in layers for t in (p.weight, p.A, p.B, p.magnitude) if t is not None)]


def run(function, x, layers):
    """Outputs and all gradients of a fixed projection of them."""
    ys = function(x, layers)
    generator = torch.Generator(DEVICE).manual_seed(9)
    dys = [torch.randn(y.shape, generator=generator, device=DEVICE).to(HALF).to(y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, tensors_of(x, layers), dys)]


def plain(x, layers):
    dora = lambda p: ops.dora_linear_reference(x, p.weight, p.A, p.B, p.magnitude, p.scaling)
    lora = lambda p: ops.lora_linear_reference(x, p.weight, p.A, p.B, p.scaling)
    return [lora(p) if p.magnitude is None else dora(p) for p in layers]


def in_fp64(x, layers):
    wide = lambda t: None if t is None else t.detach().double().requires_grad_()
    return wide(x), [Adapted(*map(wide, (p.weight, p.A, p.B)), p.scaling, wide(p.magnitude)) for p in layers]


SETTINGS = [
    ("one", (40,), 4, torch.float32, torch.float32, False),
    ("three, odd rank", (40, 24, 56), 5, torch.float32, torch.float32, False),
    ("two in half precision", (40, 72), 8, HALF, HALF, False),
    ("fp32 adapters", (40, 24, 56), 4, HALF, torch.float32, False),
    ("fp32 adapters of a large rank", (40,), 140, HALF, torch.float32, False),
    ("a rank of two passes", (40, 24), 40, HALF, HALF, False),
    ("DoRA, three", (40, 24, 56), 5, torch.float32, torch.float32, True),
    ("DoRA, fp32 adapters", (40, 24), 8, HALF, torch.float32, True),
]
if DEVICE == "cuda":  # large enough for every kernel that is shipped, and not for its tiles
    BIG = [
        ("real, rank 16", (4096, 1024, 1024), 16, HALF, torch.float32, False),
        ("real, rank 64", (9216, 9224), 64, HALF, torch.float32, False),
        ("real, rank 16 in bf16", (9216, 9216), 16, HALF, HALF, False),
        ("real, rank 100", (4096,), 100, HALF, HALF, False),
        ("real, rank 32 in bf16", (4096, 1024, 1024), 32, HALF, HALF, False),
        ("real, rank 8", (4096, 1024), 8, HALF, torch.float32, False),
        ("real, rank 64 of three in bf16", (4096, 1024, 1032), 64, HALF, HALF, False),
        ("real, rank 5", (4096, 1032), 5, HALF, HALF, False),
        ("real, rank 40", (4096,), 40, HALF, torch.float32, False),
        ("real, rank 200", (9216,), 200, HALF, HALF, False),
        ("real DoRA", (4096, 4096), 16, HALF, torch.float32, True),
        ("real DoRA of three in bf16", (4096, 1024, 1024), 16, HALF, HALF, True),
    ]
else:
    BIG = []


@pytest.mark.parametrize("setting", SETTINGS + BIG, ids=lambda s: s[0])
def test_error_is_at_most_eagers(setting):
    name, outs, rank, dtype, adapters, dora = setting
    x, layers = layers_of(3072 if name.startswith("real") else 48, outs, rank, dtype, adapters, dora)
    if name.startswith("real"):
        x = torch.randn(3001, 3072, device=DEVICE).to(dtype).requires_grad_()
    with poisoned_allocations():
        ours = run(lora_linears, x, layers)
    eager, truth = run(plain, x, layers), run(plain, *in_fp64(x, layers))
    for i, (a, e, t) in enumerate(zip(ours, eager, truth)):
        # eager multiplies in fp32 and we to 2^-16, far below what bf16 outputs show
        precise = 2.0**-15 if a.dtype == torch.float32 and dtype != torch.float32 else 0.0
        # DoRA's scale goes with B: one rounding more, which shows where all else is fp32
        factor = 4 / 3 if dora and dtype == torch.float32 else 1.0
        bound = factor * allowed_error(relative_error(e, t), dtype, t.numel()) + precise
        assert relative_error(a, t) <= bound, (i, tuple(a.shape), relative_error(a, t), relative_error(e, t))


@pytest.mark.skipif(DEVICE != "cuda", reason="kernels that run beside each other need a GPU")
@pytest.mark.parametrize(
    ("rank", "adapters", "dora"), [(16, HALF, False), (64, HALF, False), (16, torch.float32, True)]
)
def test_bits_are_the_same_alone_on_two_streams_and_in_a_graph(rank, adapters, dora, monkeypatch):
    """The passes hand tiles to a product that already runs: whoever comes first, the sums are those of one order."""
    # a fill between two launches would part them
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    _, layers = layers_of(3072, (4096, 1024, 1024), rank, HALF, adapters, dora)
    x = torch.randn(3001, 3072, device=DEVICE).to(HALF).requires_grad_()
    dys = [torch.randn(3001, p.weight.shape[0], device=DEVICE).to(HALF) for p in layers]

    def call(function=lora_linears):
        # leaves of the stream that this runs on, which a graph asks for
        leaf = lambda t: None if t is None else t.detach().requires_grad_()
        own_x = leaf(x)
        own = [Adapted(p.weight.detach(), leaf(p.A), leaf(p.B), p.scaling, leaf(p.magnitude)) for p in layers]
        ys = function(own_x, own)
        return [*ys, *torch.autograd.grad(ys, [t for t in tensors_of(own_x, own) if t.requires_grad], dys)]

    expected, found = call(), []
    for a, e in zip(expected, call(plain)):
        # three roundings of bf16; rows that were not there in time would be of order 1
        assert relative_error(a, e) < 1e-2
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        for t in captured:
            t.detach().fill_(torch.nan)
        graph.replay()
        found.append([t.detach().clone() for t in captured])
    for others in found:
        for a, b in zip(others, expected):
            assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cuda", reason="kernels that run beside each other need a GPU")
@pytest.mark.parametrize(
    ("width", "ns", "rank"), [(3072, (9216, 9216), 64), (3072, (4096, 1024, 1024), 64), (4096, (3072,), 32)]
)
def test_a_product_writes_nothing_that_the_pass_beside_it_reads(width, ns, rank, monkeypatch):
    """Memory that the host has let go of may be the product's, which begins before the pass has read all of it."""
    from m3kernels.ops._prepared import Prepared

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("passes run beside the product on Hopper alone")
    launched, run = [], Prepared.__call__

    def record(self, *tensors):
        ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        launched.append((self.kernel.fn.__name__, ends))
        return run(self, *tensors)

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    _, layers = layers_of(width, ns, rank, HALF, HALF)
    layers = [dataclasses.replace(p, weight=p.weight.detach()) for p in layers]
    x = torch.randn(4096, width, device=DEVICE).to(HALF).requires_grad_()
    dys = [torch.randn(4096, n, device=DEVICE).to(HALF) for n in ns]
    torch.cuda.empty_cache()  # the only memory to be had again is what these calls let go of
    monkeypatch.setattr(Prepared, "__call__", record)
    ys = lora_linears(x, layers)
    torch.autograd.grad(ys, [t for t in tensors_of(x, layers) if t.requires_grad], dys)
    pairs = [(a, b) for a, b in zip(launched, launched[1:]) if b[0] == "linear_low_rank_kernel"]
    assert [a[0] for a, _ in pairs] == ["lora_x_kernel", "lora_dy_kernel"]
    for (_, read), (_, given) in pairs:
        for begin, end in given[-3:]:
            assert not any(begin < e and b < end for b, e in read)


def test_fp32_adapters_keep_their_precision():
    """In bf16 the adapters' gradients and a small adapter's effect would be off by 2^-9."""
    x, layers = layers_of(48, (40,), 4, HALF, torch.float32)
    x64, layers64 = in_fp64(x, layers)
    da = run(lora_linears, x, layers)[3]
    assert relative_error(da, run(plain, x64, layers64)[3]) < 2e-4
    halved = [Adapted(p.weight, p.A.to(HALF), p.B.to(HALF), p.scaling) for p in layers]
    assert relative_error(run(lora_linears, x, halved)[3], run(plain, x64, layers64)[3]) > 2e-4


def masks_of(rows, width, count, dropout):
    """Dropout's masks, times 1 / (1 - p), as the op draws them after the same seed."""
    eye = torch.eye(width, device=DEVICE)
    torch.manual_seed(5)
    probe = [Adapted(torch.zeros(width, width, device=DEVICE), eye, eye) for _ in range(count)]
    return lora_linears(torch.ones(rows, width, device=DEVICE), probe, dropout_p=dropout)


@pytest.mark.parametrize("count", [1, 3])
def test_dropout(count):
    x, layers = layers_of(32, (40, 24, 56)[:count], 6, torch.float32, torch.float32)
    x = x.detach().reshape(-1, 32).requires_grad_()
    masks = masks_of(x.shape[0], 32, count, 0.3)
    torch.manual_seed(5)
    ours = run(lambda x, layers: lora_linears(x, layers, dropout_p=0.3), x, layers)

    def masked(x, layers):
        pairs = zip(layers, masks)
        return [x @ p.weight.T + ((x * m.to(x.dtype)) @ p.A.T) @ p.B.T * p.scaling for p, m in pairs]

    truth = run(masked, *in_fp64(x, layers))
    for a, t in zip(ours, truth):
        assert relative_error(a, t) < 1e-6
    # a backward with another mask would show
    masks = [m.roll(1, 0) for m in masks]
    assert relative_error(ours[count], run(masked, *in_fp64(x, layers))[count]) > 1e-2


def test_dropout_masks_are_independent_and_of_the_right_rate():
    a, b, c = (m != 0 for m in masks_of(128, 128, 3, 0.4))
    for mask in (a, b, c):
        # 16,384 draws: four standard deviations
        assert abs(mask.float().mean() - 0.6) < 4 * (0.24 / 128**2) ** 0.5
    for other in (b, c, a.roll(1, 0), a.roll(1, 1), a.T):
        assert abs((a == other).float().mean() - 0.52) < 0.02
    torch.manual_seed(5)
    torch.rand(1, device=DEVICE)
    again = lora_linear(*(torch.ones(128, 128, device=DEVICE),) * 4, dropout_p=0.4)
    assert torch.isfinite(again).all()


def test_streams_of_equal_generators_are_others():
    """Ranks that hold other columns of an input draw other masks of them; those that hold the same ones the same."""
    ones, draws = torch.ones(128, 128, device=DEVICE), []
    eye = torch.eye(128, device=DEVICE)
    for stream in (0, 1, 1):
        torch.manual_seed(5)
        draws += lora_linears(ones, [Adapted(ones * 0, eye, eye)], dropout_p=0.4, stream=stream)
    kept = [draw != 0 for draw in draws]
    assert torch.equal(kept[1], kept[2])
    assert abs((kept[0] == kept[1]).float().mean() - 0.52) < 0.02


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype, adapters", [(torch.float32, torch.float32), (HALF, torch.float32), (HALF, HALF)])
def test_parts_of_a_row_layer_add_up_with_its_norms(given, dtype, adapters):
    """Columns of W and A on two ranks: outputs and the gradients of B and of the magnitude are sums, where both know the norm."""
    x, (layer,) = layers_of(64, (40,), 6, dtype, adapters, dora=True)
    norm = ops.dora_norm(layer.weight, layer.A, layer.B, layer.scaling)
    parts = []
    for columns in (slice(0, 24), slice(24, 64)):
        own_x, weight, a = (t.detach()[..., columns].clone().requires_grad_() for t in (x, layer.weight, layer.A))
        b, magnitude = (t.detach().clone().requires_grad_() for t in (layer.B, layer.magnitude))
        own = Adapted(weight, a, b, layer.scaling, magnitude, norm=norm if given else None)
        parts.append(run(lora_linears, own_x, [own]))
    y, dx, dw, da, db, dm = run(plain, *in_fp64(x, [layer]))
    joined = lambda i: torch.cat([part[i] for part in parts], dim=-1)
    found = (
        parts[0][0] + parts[1][0],
        joined(1),
        joined(2),
        joined(3),
        parts[0][4] + parts[1][4],
        parts[0][5] + parts[1][5],
    )
    errors = [relative_error(a, t) for a, t in zip(found, (y, dx, dw, da, db, dm))]
    if given:
        assert max(errors) < (1e-5 if dtype == torch.float32 else 3e-2 if HALF == torch.bfloat16 else 4e-3)
    else:
        assert min(errors) > 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.ones(39)}, r"norms must be \(N,\)"),
        ({"norm": torch.ones(40), "magnitude": None}, "LoRA has none"),
    ],
)
def test_norms_that_do_not_fit(change, message):
    x, (layer,) = layers_of(32, (40,), 6, torch.float32, torch.float32, dora=True)
    change = {name: value if value is None else value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        lora_linears(x, [dataclasses.replace(layer, **change)])


def test_checkpointing_draws_the_same_mask():
    x, (layer,) = layers_of(32, (40,), 6, torch.float32, torch.float32)
    call = lambda x: lora_linear(x, layer.weight, layer.A, layer.B, dropout_p=0.5)
    torch.manual_seed(3)
    expected = torch.autograd.grad(call(x).square().sum(), layer.A)[0]
    torch.manual_seed(3)
    kept = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(kept.square().sum(), layer.A)[0], expected)


def test_inputs_that_need_no_gradient_cost_none(monkeypatch):
    x, (layer,) = layers_of(32, (40,), 6, torch.float32, torch.float32)
    seen = []
    real = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *args: seen.append(1) or real(self, *args))
    y = lora_linear(x.detach(), layer.weight.detach(), layer.A, layer.B)
    assert len(seen) == 1
    da, db = torch.autograd.grad(y.sum(), [layer.A, layer.B])
    assert len(seen) == 1 and da.any() and db.any()


def test_an_output_that_is_not_used_has_no_gradient():
    x, layers = layers_of(32, (40, 24), 6, torch.float32, torch.float32)
    wanted = [x, layers[0].A, layers[1].A, layers[1].B]
    ours = torch.autograd.grad(lora_linears(x, layers)[1].sum(), wanted)
    theirs = torch.autograd.grad(plain(x, layers)[1].sum(), wanted, allow_unused=True)
    assert not ours[1].any() and theirs[1] is None
    for i in (0, 2, 3):
        torch.testing.assert_close(ours[i], theirs[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("lay", ["transposed", "every second row", "one token", "expanded"])
def test_inputs_may_lie_in_any_way(lay, dtype):
    """Launches are kept by shapes and strides: what lies differently must not meet another's."""
    _, layers = layers_of(32, (40, 24), 6, dtype, dtype)
    x = torch.randn(32, 9, device=DEVICE).to(dtype)
    x = {
        "transposed": x.T,
        "every second row": torch.randn(2, 10, 32, device=DEVICE).to(dtype)[:, ::2],
        "one token": torch.randn(1, 5, 32, device=DEVICE).to(dtype).transpose(0, 1),
        "expanded": torch.randn(1, 32, device=DEVICE).to(dtype).expand(7, 32),
    }[lay].requires_grad_()
    for _ in range(2):
        for given in (x, x.detach().contiguous().requires_grad_()):
            ours, theirs = (run(function, given, layers) for function in (lora_linears, plain))
            for a, e in zip(ours, theirs):
                # three roundings of bf16; another x's rows would be of order 1
                assert relative_error(a, e) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_parameters_that_moved_are_found_where_they_are():
    """An optimizer writes in place, a load or ``.to()`` moves: nothing is kept but shapes."""
    x, layers = layers_of(32, (40, 24), 6, torch.float32, torch.float32)
    before = run(lora_linears, x, layers)
    with torch.no_grad():
        for p in layers:
            p.A.mul_(2)
            p.B.data = p.B.data.clone() * 0.5
            p.weight.data = torch.cat([torch.zeros(1, 32, device=DEVICE), p.weight.data])[1:]
    after, truth = run(lora_linears, x, layers), run(plain, x, layers)
    assert not torch.equal(before[4], after[4])
    for a, t in zip(after, truth):
        torch.testing.assert_close(a, t, rtol=1e-4, atol=1e-4)


def test_bias_and_leading_dimensions():
    x, (layer,) = layers_of(32, (40,), 6, torch.float32, torch.float32)
    bias = torch.randn(40, device=DEVICE)
    y = lora_linear(x, layer.weight, layer.A, layer.B, 0.5, bias)
    expected = ops.lora_linear_reference(x, layer.weight, layer.A, layer.B, 0.5, bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    empty = lora_linear(x[:0], layer.weight, layer.A, layer.B, 0.5, bias)
    assert empty.shape == (0, 23, 40)


def test_the_norm_follows_every_edit_of_the_weight():
    """Nothing is kept between calls: an edit behind autograd's back must show as well."""
    _, (layer,) = layers_of(48, (40,), 5, torch.float32, torch.float32)
    a, b = layer.A.detach(), layer.B.detach()
    for edit in (lambda w: w.data.mul_(2), lambda w: w.detach().add_(0.1), lambda w: setattr(w, "data", w.data + 1)):
        edit(layer.weight)
        truth = ops.dora_norm_reference(layer.weight.detach().double(), a.double(), b.double(), 0.7)
        assert relative_error(ops.dora_norm(layer.weight, a, b, 0.7), truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_fresh_dora_layer_is_the_frozen_one(dtype):
    """PEFT begins with B = 0 and the norms as magnitudes, in the adapters' dtype: the scale is exactly 1."""
    x, (layer,) = layers_of(48, (40,), 5, dtype, dtype)
    b = torch.zeros_like(layer.B)
    magnitude = ops.dora_norm(layer.weight, layer.A, b, 0.7).to(dtype)
    plain = lora_linear(x, layer.weight, layer.A, b, 0.7)
    assert torch.equal(ops.dora_linear(x, layer.weight, layer.A, b, magnitude, 0.7), plain)


def test_a_magnitude_of_zero_still_trains():
    x, (layer,) = layers_of(48, (40,), 5, torch.float32, torch.float32)
    magnitude = torch.rand(40, device=DEVICE)
    magnitude[7] = 0
    magnitude.requires_grad_()
    inputs = (layer.weight.detach(), layer.A.detach(), layer.B.detach())
    (ours,) = torch.autograd.grad(ops.dora_linear(x.detach(), *inputs, magnitude).sum(), magnitude)
    (eager,) = torch.autograd.grad(ops.dora_linear_reference(x.detach(), *inputs, magnitude).sum(), magnitude)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 31)}, "needs x"),
        ({"B": torch.zeros(40, 5)}, "needs x"),
        ({"weight": torch.zeros(40, 32, dtype=torch.float16)}, "x's dtype"),
        ({"A": torch.zeros(4, 32, dtype=torch.float16)}, "one rank and dtype"),
        ({"dropout_p": 1.0}, r"\[0, 1\)"),
        ({"A": torch.zeros(600, 32), "B": torch.zeros(40, 600)}, "from 1 to 512"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"weight": torch.zeros(40, 32), "A": torch.zeros(4, 32), "B": torch.zeros(40, 4)} | change
    given = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    with pytest.raises(ValueError, match=message):
        lora_linear(torch.zeros(3, 32, device=DEVICE), **given)


def test_layers_of_one_input_must_agree():
    x, layers = layers_of(32, (40, 24), 4, torch.float32, torch.float32)
    other = layers_of(32, (40,), 5, torch.float32, torch.float32)[1]
    with pytest.raises(ValueError, match="one rank"):
        lora_linears(x, [layers[0], *other])
    with pytest.raises(ValueError, match="1 to 3"):
        lora_linears(x, layers * 2)
    assert skinny.MAX_RANK == 512
