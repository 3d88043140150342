"""What ranks run for tests/test_bench_parallel.py."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

from m3kernels.bench import parallel_recipes
from m3kernels.bench.model_shapes import Size, Vision
from m3kernels.bench.parallel_recipes import Recipe

VISION = Vision(layers=1, hidden=32, heads=2, intermediate=32)
SIZE = Size(1, 32, 64, heads=4, kv_heads=2, head_dim=8, vision=VISION)


def train(folder: Path, names: tuple[str, ...]) -> tuple[list[dict], list[str]]:
    """(rows of one step of each recipe, at a tiny size; the layouts that the trainer said)."""
    rows, said, original = [], io.StringIO(), Recipe.config

    def here(*args):
        made = original(*args)
        # the pool's ranks may have no children
        return replace(made, train=replace(made.train, device="cpu"), dataset=replace(made.dataset, num_workers=0))

    sizes = mock.patch.dict(parallel_recipes.SIZES, {"8b": SIZE, "14b": SIZE})
    with sizes, mock.patch.object(Recipe, "config", here), contextlib.redirect_stdout(said):
        for name in names:
            rows.append(parallel_recipes.run(Recipe.of(name), folder, 1))
            rows[-1]["shown"] = parallel_recipes.show(rows[-1])
    return rows, re.findall(r"ranks = (.*)", said.getvalue())
