"""AdamW and the norm of gradients: torch's own, every kind of tensor, random bits, and wrong variants that must be seen."""

import importlib

import pytest
import torch

from m3kernels import ops
from m3kernels.ops import adamw, adamw_reference, global_norm, global_norm_reference
from m3kernels.ops._common import use_triton
from m3kernels.parity.core import poisoned_allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("adamw", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
module = importlib.import_module("m3kernels.ops.adamw")
norms = importlib.import_module("m3kernels.ops.global_norm")
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
# whole chunks, their ends, several of them, less than one, one element, none
SHAPES = ((2 * 4096,), (130, 100), (3, 4096), (7,), (1,), (0, 4))
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Tensors that are small have several chunks then."""
    for of in (module, norms):
        monkeypatch.setattr(of, "CONFIG", type(of.CONFIG)(chunk=4096))


def draw(dtype=FP32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def state(dtype=FP32, copy=None, shapes=SHAPES):
    """(parameters, moments, squared moments, copies)"""
    parameters = draw(dtype, shapes)
    moments = [[torch.zeros_like(p, dtype=FP32) for p in parameters] for _ in range(2)]
    return parameters, *moments, None if copy is None else [torch.zeros_like(p, dtype=copy) for p in parameters]


def steps(run, made, gradient=FP32, count=20, decay=0.1, factor=None, **options):
    """Parameters after ``count`` steps of ``run``, an op."""
    parameters, *moments, copies = made
    for step in range(1, count + 1):
        # an int8's worth of mantissa: the same in every dtype
        gradients = draw(BF16, [p.shape for p in parameters], seed=step)
        decays = [decay if p.dim() > 1 else 0.0 for p in parameters]
        scale = None if factor is None else torch.tensor(factor, device=DEVICE)
        run(
            parameters, [g.to(gradient) for g in gradients], *moments, copies,
            **{**OPTIONS, "step": step, "weight_decay": decay if isinstance(decay, list) else decays, **options},
            factor=scale,
        )  # fmt: skip
    return parameters


def torch_steps(count=20, factor=1.0, dtype=FP32):
    """Parameters after torch's own."""
    parameters = [p.to(dtype).requires_grad_() for p in draw()]
    vectors, matrices = [p for p in parameters if p.dim() == 1], [p for p in parameters if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(1, count + 1):
        for p, g in zip(parameters, draw(BF16, seed=step)):
            p.grad = g.to(dtype) * factor
        optimizer.step()
    return [p.detach() for p in parameters]


def distance(found, expected) -> float:
    """The largest difference, against the largest number of each tensor."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, expected)
        if b.numel()
    )


@pytest.mark.parametrize("gradient", [FP32, BF16])
@pytest.mark.parametrize("factor", [None, 0.37])
def test_twenty_steps_are_torchs(gradient, factor):
    with poisoned_allocations():
        ours = steps(adamw, state(), gradient, factor=factor)
    exact = torch_steps(factor=1.0 if factor is None else torch.tensor(factor).double().to(DEVICE), dtype=torch.float64)
    theirs = torch_steps(factor=1.0 if factor is None else torch.tensor(factor, device=DEVICE))
    for a, b, c in zip(ours, theirs, exact):
        # twenty steps may each round one way and the other, by half an ulp of numbers up to 4; measured: 5e-7 and 1.7e-6
        torch.testing.assert_close(a, b, rtol=0, atol=5e-7 if DEVICE == "cpu" else 5e-6)
        if len(a) > 100:
            error, torchs = (float((x - c).square().mean().sqrt()) for x in (a, b))
            assert error < 1.1 * torchs < 4e-7


@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.skipif(DEVICE == "cuda", reason="torch has another order of operations there")
def test_the_reference_has_torchs_bits(factor):
    ours = steps(adamw_reference, state(), BF16, factor=factor)
    assert all(torch.equal(a, b) for a, b in zip(ours, torch_steps(factor=torch.tensor(factor))))


def wrong_step(by: int):
    return lambda *tensors, step, **options: adamw(*tensors, step=step + by, **options)


def clipped_twice(parameters, gradients, *rest, factor, **options):
    adamw(parameters, [g * factor for g in gradients], *rest, factor=factor, **options)


@pytest.mark.parametrize(
    ("run", "changed"),
    [
        (adamw, {"decay": [0.1] * len(SHAPES)}),
        (adamw, {"decay": [0.0] * len(SHAPES)}),
        (adamw, {"eps": 1e-4}),
        (adamw, {"betas": (0.9, 0.96)}),
        (wrong_step(1), {}),
        (clipped_twice, {}),
    ],
    ids=["vectors decay", "no decay", "eps", "beta2", "bias correction a step off", "clipped twice"],
)
def test_wrong_variants_are_seen(run, changed):
    # with an eps that counts: Adam is blind to gradients that are scaled as a whole
    right = steps(adamw, state(), count=3, factor=0.37, eps=1e-2)
    assert distance(right, steps(run, state(), count=3, factor=0.37, **{"eps": 1e-2, **changed})) > 1e-5


@pytest.mark.parametrize("copy", [torch.float16, BF16])
def test_copies_are_written(copy):
    made = state(copy=copy)
    steps(adamw, made, BF16, count=2)
    for master, written in zip(made[0], made[3]):
        if DEVICE == "cuda" or copy == torch.float16:
            assert torch.equal(written, master.to(copy))
        else:  # the interpreter truncates to bf16
            assert torch.equal(written.view(torch.int16).int(), master.view(torch.int32) >> 16)


def test_bf16_parameters_are_rounded_by_the_same_bits():
    options = {"seed": 2**40 + 5, "numbers": [9, 2**20, 2, 3, 4, 5], "count": 3}
    ours, theirs = steps(adamw, state(BF16), BF16, **options), steps(adamw_reference, state(BF16), BF16, **options)
    # where the fp32 value has another last bit, one in 65,536 goes to the other neighbour
    different = [float((a != b).float().mean()) for a, b in zip(ours, theirs) if a.numel()]
    assert max(different) < 1e-3 and distance(ours, theirs) < 2**-7
    for other in ({"seed": 2**40 + 6}, {"seed": 5}, {"numbers": [8, 2**20, 2, 3, 4, 5]}):
        moved = steps(adamw, state(BF16), BF16, **{**options, **other})
        assert float((moved[0] != ours[0]).float().mean()) > 0.05


def test_the_bits_are_philox():
    # known answers of Random123: counter, key, result
    known = """
        00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
        ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
        243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
    """
    for line in known.strip().splitlines():
        *counter, k0, k1, w0, w1, w2, w3 = (int(word, 16) for word in line.split())
        found = module.philox(*map(torch.tensor, counter), k0 + (k1 << 32))
        assert tuple(map(int, found)) == (w0, w1, w2, w3)


def test_rounding_goes_to_both_neighbours_and_is_right_on_average():
    low, high = 1.0, 1.0 + 2.0**-7
    # a third of the way, reached from 1 with moments that make the update known: lr * m / sqrt(v)
    for backend in ("triton", "reference"):
        p = torch.ones(65_536, dtype=BF16, device=DEVICE)
        m = torch.zeros(65_536, device=DEVICE)
        options = {"lr": (high - low) / 3, "betas": (0.9, 0.95), "eps": 0.0, "weight_decay": [0.0], "step": 1}
        adamw([p], [-torch.ones_like(p)], [m], [m.clone()], **options, seed=3, backend=backend)
        assert set(p.tolist()) == {low, high}
        # five standard deviations
        assert float((p == high).float().mean()) == pytest.approx(1 / 3, abs=0.01)


def test_nan_and_inf_stay():
    p = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], dtype=BF16, device=DEVICE)
    m = torch.zeros(4, device=DEVICE)
    adamw([p], [torch.ones_like(p)], [m], [m.clone()], **OPTIONS, weight_decay=[0.0], step=1, seed=0)
    assert p[0] == float("inf") and p[1] == -float("inf") and p[2].isnan() and p[3].isfinite()


def test_a_tensor_at_an_odd_address_and_a_transposed_gradient():
    expected = steps(adamw, state(shapes=((64, 128),)), count=2)
    made = state(shapes=((64, 128),))
    for tensors in made[:3]:
        store = torch.zeros(64 * 128 + 1, device=DEVICE)
        store[1:] = tensors[0].view(-1)
        tensors[0] = store[1:].view(64, 128)
    turned = lambda p, g, *rest, **options: adamw(p, [x.T.contiguous().T for x in g], *rest, **options)
    assert torch.equal(steps(turned, made, count=2)[0], expected[0])


def test_elements_beyond_two_to_the_31st():
    """Of a tensor that would be 2**33 elements long the last chunk's addresses are real."""
    one = state(shapes=((4096,),))
    gradient, before = draw(BF16, ((4096,),), seed=1)[0].float(), 2**33
    expected = steps(adamw, state(shapes=((4096,),)), count=1)
    rows = [t[0].data_ptr() - 4 * before for t in one[:3]]
    table = lambda numbers, dtype=torch.int64: torch.tensor(numbers, dtype=dtype, device=DEVICE)
    module.launch(
        "adamw",
        module.adamw_kernel,
        (1,),
        *(table([*rows, 0, 0]), table([gradient.data_ptr() - 4 * before]), table([1.0], FP32)),
        *(table([before + 4096]), table([0, before // 4096], torch.int32), table([1.0], FP32)),
        *module._settings(*OPTIONS.values(), 1, None),
        PARAMETER=module.TYPES[FP32],
        GRADIENT=module.TYPES[FP32],
        COPY=None,
        CLIPS=False,
        CHUNK=4096,
        LANES=module.LANES,
    )
    assert not torch.equal(one[0][0], draw(shapes=((4096,),))[0])
    torch.testing.assert_close(one[0][0], expected[0], rtol=0, atol=0)


def test_later_the_tables_are_made_and_the_tensors_are_held():
    made, expected = state(), steps(adamw, state(), count=1)
    parameters, *moments, _ = made
    options = {**OPTIONS, "step": 1, "weight_decay": [0.1 if p.dim() > 1 else 0.0 for p in parameters]}
    run = adamw(parameters, draw(BF16, seed=1), *moments, **options, later=True)
    assert all(torch.equal(p, before) for p, before in zip(parameters, draw()))
    # were the gradients' memory given back, these would lie in it
    others = draw(BF16, seed=2)
    run()
    assert all(torch.equal(p, q) for p, q in zip(parameters, expected)) and others


def test_the_table_of_chunks():
    sizes, chunks = module.chunks_of((5000, 0, 4096, 3_000_000_000), 4096, torch.device("cpu"))
    assert sizes.tolist() == [5000, 0, 4096, 3_000_000_000]
    assert chunks[:4].tolist() == [[0, 0], [0, 1], [2, 0], [3, 0]]
    assert chunks.dtype == torch.int32 and chunks[-1].tolist() == [3, -(-3_000_000_000 // 4096) - 1]


def test_nothing_is_remembered_of_tensors_that_moved():
    made = state()
    steps(adamw, made, count=1)
    moved = tuple([t.clone() for t in tensors] for tensors in made[:3])
    for tensors in made[:3]:
        for t in tensors:
            t.fill_(float("nan"))
    assert all(t.isfinite().all() for t in steps(adamw, (*moved, None), count=1))


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (BF16, FP32)])
def test_norm(dtypes):
    gradients = [g for i, dtype in enumerate(dtypes) for g in draw(dtype, seed=i)]
    exact = torch.sqrt(sum(g.double().square().sum() for g in gradients))
    with poisoned_allocations():
        ours = global_norm(gradients)
    assert ours.dtype == FP32 and ours.dim() == 0
    assert float(ours) == pytest.approx(float(exact), rel=2e-7)
    assert torch.equal(ours, global_norm(gradients))
    assert float(global_norm_reference(gradients)) == pytest.approx(float(exact), rel=1e-5)
    # one element off is seen
    gradients[0][-1] += 8.0
    assert float(global_norm(gradients)) != pytest.approx(float(exact), rel=1e-4)
    gradients[-2][0] = float("nan")
    assert global_norm(gradients).isnan()


def test_norm_at_an_odd_address():
    whole = torch.randn(2 * 4096 + 1, device=DEVICE)
    exact = whole[1:].double().norm()
    assert float(global_norm([whole[1:]])) == pytest.approx(float(exact), rel=2e-7)


def refused(**changed):
    made = {name: draw(shapes=((4, 8),)) for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
    made |= {**OPTIONS, "weight_decay": [0.0], "step": 1, **changed}
    adamw(**made)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"weight_decay": []}, ValueError, "as long as parameters"),
        ({"step": 0}, ValueError, "from 1"),
        ({"parameters": draw(BF16, ((4, 8),))}, ValueError, "pass seed"),
        ({"parameters": draw(torch.float16, ((4, 8),))}, TypeError, "float16"),
        ({"exp_avgs": draw(BF16, ((4, 8),))}, TypeError, "moments fp32"),
        ({"gradients": draw(shapes=((8, 4),))}, ValueError, r"\(8, 4\)"),
        ({"parameters": [draw(shapes=((8, 4),))[0].T]}, ValueError, "contiguous"),
        ({"factor": torch.ones(2, device=DEVICE)}, ValueError, "0-dim"),
        ({"backend": "cuda"}, ValueError, "allowed"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_refusals(changed, error, says):
    with pytest.raises(error, match=says):
        refused(**changed)
    with pytest.raises(ValueError, match="no gradients"):
        global_norm([])


def test_both_are_ops():
    assert {"adamw", "adamw_reference", "global_norm", "global_norm_reference"} <= set(ops.__all__)
