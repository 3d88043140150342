"""``m3kernels demo``, in its quick form: the files it leaves, what it refuses, and that it cannot pretend."""

import json
import subprocess
import sys

import pytest
import torch

from m3kernels.cli import main

pytest.importorskip("mistral_common", reason="needs pip install 'm3kernels[demo]'")


def test_quick_demo_leaves_a_checkpoint_that_transformers_loads(tmp_path, capsys):
    from transformers import Mistral3ForConditionalGeneration

    out = tmp_path / "out"
    assert main(["demo", "--device", "cpu", "--steps", "2", "--eval-samples", "4", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "m3kernels on Mistral3ForConditionalGeneration" in printed and "unpatched" in printed
    assert sum(1 for _ in out.rglob("*.png")) >= 2
    config = next(out.rglob("config.json"))
    assert json.loads(config.read_text())["architectures"] == ["Mistral3ForConditionalGeneration"]
    model = Mistral3ForConditionalGeneration.from_pretrained(config.parent)
    assert type(model).__module__.startswith("transformers.") and model.config.text_config.vocab_size == 131072


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['mistral_common'] = None\n"
        f"from m3kernels.cli import main; sys.exit(main(['demo', '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "m3kernels[demo]" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path, capsys):
    assert main(["demo", "--device", "cuda", "--output", str(tmp_path / "out")]) == 1
    assert "sees no CUDA GPU" in capsys.readouterr().err
