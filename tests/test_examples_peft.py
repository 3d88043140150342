"""examples/peft_trainer.py: as a user runs it, and that it fails when it should."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

EXAMPLE = Path(__file__).parents[1] / "examples" / "peft_trainer.py"


@pytest.mark.parametrize("flags", [[], ["--dora"]])
def test_peft_trainer(flags, tmp_path):
    # one thread: several of these beside each other would wait for each other's
    result = subprocess.run(
        [sys.executable, EXAMPLE, "--device", "cpu", "--steps", "8", *flags],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [row.split() for row in result.stdout.splitlines() if re.match(r" +\d+ ", row)]
    assert [int(step) for step, *_ in steps] == list(range(1, 9))
    plain, ours = ([float(row[i]) for row in steps] for i in (1, 2))
    assert ours == pytest.approx(plain, rel=1e-4) and ours[-1] < 0.9 * ours[0]
    assert "linear_cross_entropy" in result.stdout and "largest difference" in result.stdout
    (seconds,) = re.findall(r"s a step +([\d.]+) +([\d.]+)", result.stdout)
    assert all(float(s) > 0 for s in seconds)
    config = json.loads((tmp_path / "peft-output" / "adapter_config.json").read_text())
    assert config["use_dora"] == bool(flags)
    assert len(config["target_modules"]) == 14 and all("language_model" in n for n in config["target_modules"])


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.chdir(tmp_path)
    import peft_trainer

    yield peft_trainer
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps "on the CPU" for the process


@pytest.mark.parametrize("wrong", ["training", "reloading"])
def test_exits_1(wrong, example, monkeypatch):
    if wrong == "training":
        real = example.train
        off = {False: 1.0, True: 1 + 2 * example.BOUND}

        def train(args, patched):
            losses, *rest = real(args, patched)
            return [loss * off[patched] for loss in losses], *rest

        monkeypatch.setattr(example, "train", train)
    else:
        real_loss, factors = example.loss_of, iter((1.0, 1 + 2 * example.BOUND))
        monkeypatch.setattr(example, "loss_of", lambda *a: real_loss(*a) * next(factors))
    assert example.main(["--device", "cpu", "--steps", "1"]) == 1


def test_difference(example):
    assert example.differ([2.0, 1.0], [2.0, 1.1]) == pytest.approx(0.1 / 1.1)
    assert math.isnan(example.differ([math.nan, 1.0], [1.0, 1.0])) and math.isnan(example.differ([1.0], [math.nan]))


def test_no_gpu(example, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        example.main(["--device", "cuda"])
    assert "pass --device cpu" in capsys.readouterr().err
