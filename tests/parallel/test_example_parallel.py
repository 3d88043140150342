"""examples/parallel.py and docs/parallel.md: as a user runs them, and that what is printed is the code's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m3kernels.bench import parallel
from m3kernels.models.ministral3 import sharding

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "parallel.py"
FLAGS = ["--dtype", "float64", "--steps", "3", "--batch", "4", "--seq", "24"]


def losses(*command: str) -> list[float]:
    done = subprocess.run(
        [*command, *FLAGS], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo on localhost")
def test_one_loss_whatever_the_layout():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    alone = losses(sys.executable, str(EXAMPLE))
    assert len(alone) == 3 and alone[0] != alone[1]
    split = losses(*torchrun, "--nproc-per-node=2", str(EXAMPLE), "--tp", "2", "--recompute", "attention")
    assert split == pytest.approx(alone, rel=1e-11)


def test_the_docs_have_the_table_of_the_code():
    text = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    printed = text.split(sharding.BEGIN)[1].split(sharding.END)[0].strip()
    assert printed == sharding.table(), "run: python -m m3kernels.models.ministral3.sharding"


def test_the_docs_have_the_table_of_the_files():
    page = parallel.DOCS.read_text(encoding="utf-8")
    names = re.findall(r"`([\w.-]+\.ndjson)`", page)
    files = [next(ROOT.glob(f"bench/results/*/{name}")) for name in names]
    assert files and parallel.with_table(page, files) == page, "run: python -m m3kernels.bench.parallel --report FILES"


def test_every_parameter_is_in_one_row():
    with pytest.raises(ValueError, match="in no row"):
        sharding.row_of("model.language_model.layers.0.self_attn.q_norm.weight")
    names = [name.replace("*", "0").replace("[qkv]", "q") for name in (row.names for row in sharding.ROWS)]
    assert [sharding.row_of(name) for name in names] == list(sharding.ROWS)
