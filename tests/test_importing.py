"""``import m3kernels`` leaves transformers' models alone, and names its attention as soon as they are imported."""

import importlib
import subprocess
import sys

import pytest

from m3kernels.patching.importing import when_imported

FIRST = """
import sys
import m3kernels
heavy = [name for name in ("transformers.modeling_utils", "torch._dynamo", "peft") if name in sys.modules]
assert not heavy, heavy
from transformers import AutoModelForCausalLM, Ministral3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
assert "m3kernels" in ALL_ATTENTION_FUNCTIONS
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
config = Ministral3Config(vocab_size=32, num_key_value_heads=1, **sizes)
model = AutoModelForCausalLM.from_config(config, attn_implementation="m3kernels")
assert model.config._attn_implementation == "m3kernels"
import torch
assert model(torch.arange(8)[None]).logits.shape == (1, 8, 32)
"""


def test_the_name_is_known_when_models_are():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of its own name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "m3k_late", raising=False)

    def write(text: str) -> None:
        (tmp_path / "m3k_late.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("m3k_late", None)


def test_a_call_comes_once_after_the_import(module):
    calls = []
    finders = list(sys.meta_path)
    module("x = 1\n")
    when_imported("m3k_late", lambda: calls.append(sys.modules["m3k_late"].x))
    assert calls == []
    late = importlib.import_module("m3k_late")
    assert calls == [1] and sys.meta_path == finders
    # as any other module: its source can be read, and it may be imported again
    assert late.__spec__.loader is late.__loader__ and late.__loader__.get_source("m3k_late") == "x = 1\n"
    importlib.reload(late)
    assert calls == [1]
    when_imported("m3k_late", lambda: calls.append(2))
    assert calls == [1, 2]


def test_an_import_that_fails_may_be_repeated(module):
    calls = []
    module("raise ImportError('not yet')\n")
    when_imported("m3k_late", lambda: calls.append(1))
    for _ in range(2):
        with pytest.raises(ImportError, match="not yet"):
            importlib.import_module("m3k_late")
    module("x = 'a longer text, so that no cached code is taken for it'\n")
    importlib.import_module("m3k_late")
    assert calls == [1]


def test_a_module_that_there_is_not_is_missed_as_ever(module):
    when_imported("m3k_never", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="m3k_never"):
        importlib.import_module("m3k_never")
