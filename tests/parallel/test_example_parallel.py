"""examples/parallel.py and docs/parallel.md: as a user runs them, and that what is printed is the code's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m3kernels.bench import parallel, parallel_recipes
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


@pytest.mark.slow
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


@pytest.mark.parametrize("bench", [parallel, parallel_recipes], ids=["speeds", "recipes"])
def test_the_docs_have_the_tables_of_the_files(bench):
    page = parallel.DOCS.read_text(encoding="utf-8")
    block = page.split(bench.BEGIN)[1].split(bench.END)[0]
    files = [next(ROOT.glob(f"bench/results/*/{name}")) for name in re.findall(r"`([\w.-]+\.ndjson)`", block)]
    assert files and bench.with_table(page, files) == page, f"run: python -m {bench.__name__} --report FILES"


def test_a_later_file_replaces_what_an_earlier_one_measured(tmp_path):
    row = {"size": "3b", "seq": 4096, "batch": 1, "recompute": "none", "tp": 1, "dp": 1, "ms": 2.0, "peak_gib": 1.0}
    row |= {"tokens_per_s_gpu": 100.0, "loss": 1.0, "grad_norm": 1.0, "gpu": "G", "torch": "2", "nccl": "2"}
    files = [tmp_path / "a.ndjson", tmp_path / "b.ndjson"]
    for file, one, two in zip(files, (100.0, 200.0), (60.0, 190.0)):
        rows = [row | {"tokens_per_s_gpu": one}, row | {"dp": 2, "tokens_per_s_gpu": two}]
        file.write_text("\n".join(map(json.dumps, rows)))
    page = parallel.with_table(f"{parallel.BEGIN}{parallel.END}", files)
    assert "95 %" in page and "60 %" not in page and page.count("| 3b,") == 2


def test_every_parameter_is_in_one_row():
    with pytest.raises(ValueError, match="in no row"):
        sharding.row_of("model.language_model.layers.0.self_attn.q_norm.weight")
    names = [name.replace("*", "0").replace("[qkv]", "q") for name in (row.names for row in sharding.ROWS)]
    assert [sharding.row_of(name) for name in names] == list(sharding.ROWS)
