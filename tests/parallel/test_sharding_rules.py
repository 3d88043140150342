"""The ops on DTensors equal the ops on whole tensors, forward and backward: fp64 in plain PyTorch, fp32 through the kernels."""

import pytest
import torch
import torch.distributed as dist
from pool import run
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from m3kernels import ops
from m3kernels.ops import _common
from m3kernels.ops._triton import INTERPRET
from m3kernels.parallel import make_mesh, sharding_rules

KERNELS = INTERPRET or torch.cuda.is_available()
DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.skipif(not KERNELS, reason="needs kernels"))]
# "cuda" is one GPU for all ranks, over gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, BATCH, TOKENS = 12, 2, 8
R = Replicate()


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def norm_case(dtype):
    return [random(BATCH, TOKENS, WIDTH, dtype=dtype), random(WIDTH, dtype=dtype, seed=1)], ops.rms_norm


def add_norm_case(dtype):
    x, weight = norm_case(dtype)[0]
    return [x, random(*x.shape, dtype=dtype, seed=2), weight], ops.add_rms_norm


def swiglu_case(dtype):
    return [random(BATCH, TOKENS, WIDTH, dtype=dtype, seed=s) for s in (3, 4)], ops.swiglu


def fused_swiglu_case(dtype):
    return [random(BATCH, TOKENS, 2 * WIDTH, dtype=dtype, seed=5)], ops.swiglu


def heads(dtype):
    """q and k, of 4 and 2 heads, and packed positions."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11, 12]], device=DEVICE)
    return random(BATCH, 4, TOKENS, 8, dtype=dtype, seed=6), random(BATCH, 2, TOKENS, 8, dtype=dtype, seed=7), positions


def frequencies():
    return 1.0 / 10 ** torch.linspace(0, 1, 4, device=DEVICE)


def rotary_case(dtype):
    q, k, positions = heads(dtype)
    table = ops.rotary_table(frequencies(), positions).to(dtype)
    return [q, k, table, positions], lambda *a: ops.rotary(*a, llama4=(0.1, 4))


def rotary_lookup_case(dtype):
    q, k, positions = heads(dtype)
    return [q, k, ops.rotary_table(frequencies(), torch.arange(16, device=DEVICE)).to(dtype), positions], ops.rotary


def rotary_shared_case(dtype):
    """Positions and a table that all of the batch shares."""
    q, k, positions = heads(dtype)
    return [q, k, ops.rotary_table(frequencies(), positions[:1]).to(dtype), positions[:1]], ops.rotary


def rotary_2d_case(dtype):
    q, k, _ = heads(dtype)
    k = random(BATCH, 4, TOKENS, 8, dtype=dtype, seed=8)
    patches = torch.stack([torch.arange(TOKENS) // 4, torch.arange(TOKENS) % 4], -1).to(DEVICE)
    return [q, k, ops.rotary_2d_table(frequencies(), patches).to(dtype)], ops.rotary_2d


CASES = {
    "rms_norm": norm_case,
    "add_rms_norm": add_norm_case,
    "swiglu": swiglu_case,
    "swiglu of one tensor": fused_swiglu_case,
    "rotary": rotary_case,
    "rotary by lookup": rotary_lookup_case,
    "rotary shared": rotary_shared_case,
    "rotary_2d": rotary_2d_case,
}
# what the inputs are given as; the first alike for the outputs
PLACED = {
    "rms_norm": [(Shard(0), R), (Shard(1), R), (R, R), (Shard(2), Shard(0))],
    "add_rms_norm": [(Shard(1), Shard(1), R), (Shard(0), R, R), (R, R, R)],
    "swiglu": [(Shard(0),) * 2, (Shard(1),) * 2, (Shard(2),) * 2, (Shard(2), R), (R, R)],
    "swiglu of one tensor": [(Shard(1),), (Shard(2),), (R,)],
    "rotary": [(Shard(0),) * 4, (Shard(1), Shard(1), R, R), (Shard(2), Shard(2), Shard(1), Shard(1)), (Shard(2), R, R, R)],
    "rotary by lookup": [(Shard(0), Shard(0), R, Shard(0)), (Shard(2), Shard(2), R, Shard(1)), (Shard(1), Shard(1), R, R)],
    "rotary shared": [(Shard(0), Shard(0), R, R), (Shard(2), Shard(2), Shard(1), Shard(1))],
    "rotary_2d": [(Shard(0), Shard(0), R), (Shard(1), Shard(1), R), (Shard(2), Shard(2), Shard(0))],
}  # fmt: skip


def outcome(inputs, f, whole=lambda t: t):
    """Outputs, and the gradients of a weighted sum of them."""
    wanting = [t.is_floating_point() and i < (3 if f is ops.add_rms_norm else 2) for i, t in enumerate(inputs)]
    leaves = [t.detach().requires_grad_() if w else t for t, w in zip(inputs, wanting)]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    sum((whole(y) * random(*y.shape, dtype=y.dtype, seed=20 + i)).sum() for i, y in enumerate(out)).backward()
    return out, [leaf.grad for leaf, w in zip(leaves, wanting) if w]


def counted(f):
    """What ``f()`` returns, and how many kernels it launched."""
    launched, run_kernel = [], _common._run
    _common._run = lambda *args: launched.append(args[0]) or run_kernel(*args)
    try:
        return f(), len(launched)
    finally:
        _common._run = run_kernel


def sharded(name, placements, dtype):
    """(largest error of outputs and gradients, placements of the outputs, of the gradients, whether as many kernels ran)."""
    inputs, f = CASES[name](dtype)
    mesh = make_mesh(tp=dist.get_world_size(), device_type=DEVICE)["tp"]
    wanted, kernels = counted(lambda: outcome(inputs, f))
    placed = [distribute_tensor(t, mesh, [p]) for t, p in zip(inputs, placements, strict=True)]
    found, sharded_kernels = counted(lambda: outcome(placed, f, whole=lambda y: y.full_tensor()))
    pairs = [pair for parts in zip(found, wanted) for pair in zip(*parts, strict=True)]
    error = max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)
    return error, *([t.placements[0] for t in part] for part in found), (kernels, sharded_kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "placements"), [(name, p) for name in PLACED for p in PLACED[name]])
def test_equals_whole_tensors(name, placements, dtype):
    for error, outputs, grads, kernels in run(2, sharded, name, placements, dtype):
        assert error < (1e-12 if dtype == torch.float64 else 2e-5)
        assert kernels[0] == kernels[1] and (kernels[0] > 0) == (dtype == torch.float32)
        kept = placements[0]
        if dtype == torch.float64 or "norm" in name and kept == Shard(2) or "one tensor" in name and kept == Shard(2):
            continue  # DTensor's own choice
        assert all(p == kept for p in outputs)
        if "norm" in name:
            assert grads[-1] == (R if kept == R else Partial())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotary"])
def test_four_ranks(name, dtype):
    """Two key heads do not divide by four ranks: that input comes whole."""
    placements = {"rms_norm": (Shard(1), R), "swiglu": (Shard(2),) * 2, "rotary": (Shard(1), R, R, R)}[name]
    assert max(r[0] for r in run(4, sharded, name, placements, dtype)) < (1e-12 if dtype == torch.float64 else 2e-5)


def on_two_dimensions(dtype):
    """Batch sharded over dp, sequence over tp."""
    mesh = make_mesh(tp=2, device_type=DEVICE)
    inputs, f = add_norm_case(dtype)
    wanted = outcome(inputs, f)
    at = [(Shard(0), Shard(1))] * 2 + [(R, R)]
    placed = [distribute_tensor(t, mesh, p) for t, p in zip(inputs, at)]
    found = outcome(placed, f, whole=lambda y: y.full_tensor())
    pairs = [pair for parts in zip(found, wanted) for pair in zip(*parts, strict=True)]
    return max(float((a.full_tensor() - b).abs().max()) for a, b in pairs), found[1][-1].placements


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mesh_of_two_dimensions(dtype):
    for error, dweight in run(4, on_two_dimensions, dtype):
        assert error < (1e-12 if dtype == torch.float64 else 2e-5)
        assert dtype == torch.float64 or dweight == (Partial(), Partial())


def frozen_then_trained():
    """DTensor keeps what it found of shapes: a frozen weight's call must not answer for a trained one's."""
    mesh = make_mesh(tp=2, device_type=DEVICE)["tp"]
    x, weight = (distribute_tensor(t, mesh, [p]) for t, p in zip(norm_case(torch.float32)[0], (Shard(0), R)))
    shapes = []
    for trains in (False, True, False):
        leaf = weight.detach().requires_grad_(trains)
        ops.rms_norm(x.detach().requires_grad_(), leaf).sum().backward()
        shapes.append(None if leaf.grad is None else tuple(leaf.grad.full_tensor().shape))
    return shapes


def test_frozen_then_trained_weight():
    assert run(2, frozen_then_trained) == [[None, (WIDTH,), None]] * 2


def uneven(dtype):
    mesh = make_mesh(tp=2, device_type=DEVICE)["tp"]
    x, weight = random(7, WIDTH, dtype=dtype), random(WIDTH, dtype=dtype, seed=1)
    y = ops.rms_norm(distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(weight, mesh, [R]))
    return float((y.full_tensor() - ops.rms_norm(x, weight)).abs().max())


def partial_input(dtype):
    """A sum that is still in parts is added up first: the norm of parts is not the norm of the sum."""
    mesh = make_mesh(tp=2, device_type=DEVICE)["tp"]
    x, weight = random(8, WIDTH, dtype=dtype), random(WIDTH, dtype=dtype, seed=1)
    part = x * (0.25 if dist.get_rank() else 0.75)
    y = ops.rms_norm(DTensor.from_local(part, mesh, [Partial()]), distribute_tensor(weight, mesh, [R]))
    return float((y.full_tensor() - ops.rms_norm(x, weight)).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("job", [uneven, partial_input])
def test_placements_without_a_rule_are_redistributed(job, dtype):
    assert max(run(2, job, dtype)) < (1e-12 if dtype == torch.float64 else 2e-5)


def wrong_rule(dtype):
    """The weight's gradient called whole although each rank has summed its own rows."""
    rules = sharding_rules.RULES["rms_norm_backward"]
    register, op = sharding_rules.register_sharding, torch.ops.m3kernels.rms_norm_backward.default
    register(op)(lambda *args: [([o[0], R], i) for o, i in rules(*args)])
    try:
        return sharded("rms_norm", (Shard(0), R), dtype)[0]
    finally:
        register(op)(rules)


@pytest.mark.skipif(not KERNELS, reason="needs kernels")
def test_a_wrong_rule_shows():
    assert min(run(2, wrong_rule, torch.float32)) > 1e-2


def refused(what):
    mesh = make_mesh(device_type=DEVICE)["tp"]
    x, weight = random(4, 8, dtype=torch.float32), random(8, dtype=torch.float32)
    placed = distribute_tensor(x, mesh, [R])
    if what == "mixed":
        ops.rms_norm(placed, weight)
    elif what == "mixed positions":
        q = distribute_tensor(random(1, 2, 4, 8, dtype=torch.float32), mesh, [R])
        table = distribute_tensor(random(1, 4, 8, dtype=torch.float32), mesh, [R])
        ops.rotary(q, q, table, torch.arange(4, device=DEVICE)[None])
    elif what == "linear_cross_entropy":
        ops.linear_cross_entropy(placed, placed, torch.zeros(4, dtype=torch.long))
    elif what == "attention":
        q = distribute_tensor(random(1, 2, 4, 64, dtype=torch.float32), mesh, [R])
        ops.attention(q, q, q, causal=True)
    elif what == "lora_linear":
        square = distribute_tensor(random(8, 8, dtype=torch.float32), mesh, [R])
        ops.lora_linear(placed, square, square, square)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("mixed", "rms_norm: DTensors and plain tensors do not mix"),
        ("mixed positions", "rotary: DTensors and plain tensors do not mix"),
        ("linear_cross_entropy", r"linear_cross_entropy: DTensor is not supported; pass the local shard"),
        ("attention", r"attention: DTensor is not supported"),
        ("lora_linear", r"lora_linear: DTensor is not supported"),
    ],
)
def test_refusals(what, said):
    with pytest.raises(TypeError, match=said):
        run(1, refused, what)


def without_rules():
    names = set(_common.sharded_ops)
    _common.sharded_ops.clear()
    try:
        refused("mixed")
    finally:
        _common.sharded_ops.update(names)


def test_without_the_package_the_message_names_it():
    with pytest.raises(TypeError, match="import m3kernels.parallel registers"):
        run(1, without_rules)
