"""Each op against eager PyTorch, in the interpreter (fp32, fp16) or on a GPU (bf16 too), and wrong variants that must fail."""

import pytest
import torch

from m3kernels.parity.core import table
from m3kernels.parity.ops import CASES, measure

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# the interpreter's bf16 arithmetic is garbage
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA


def shapes(case):
    return case.small + (case.real if CUDA else ())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("case", "shape"), [pytest.param(c, s, id=f"{c.name}-{'x'.join(map(str, s))}") for c in CASES for s in shapes(c)]
)
def test_error_is_within_a_small_factor_of_eagers(case, shape, dtype):
    rows = measure(case, shape, dtype, DEVICE)
    assert all(row.passed for row in rows), "\n" + table(rows)


@pytest.mark.parametrize(("case", "variant"), [pytest.param(c, v, id=f"{c.name}-{v}") for c in CASES for v in c.wrong])
def test_wrong_variant_is_caught(case, variant):
    rows = measure(case, case.small[0], torch.float32, DEVICE, ours=case.wrong[variant])
    assert not all(row.passed for row in rows), "\n" + table(rows)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_op_has_three_wrong_variants(case):
    assert len(case.wrong) >= 3
