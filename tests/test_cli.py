"""The command line: doctor and check (the demo has a file of its own)."""

import pytest
import torch

from m3kernels.cli import doctor, main


def test_doctor_names_versions_and_backends(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out and "transformers" in out and "reference" in out


def test_doctor_fails_on_an_old_transformers(capsys, monkeypatch):
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "5.16.1" if name == "transformers" else version(name))
    assert main(["doctor"]) == 1
    assert "5.16.1 is older than 5.17" in capsys.readouterr().out


def test_check_passes_and_prints_both_errors(capsys):
    assert main(["check", "--small", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "eager's" in out and "patched tiny model" in out and "0 failed" in out


def test_check_fails_when_an_op_is_wrong(capsys, monkeypatch):
    import m3kernels.patching.text as text

    rotary = text.rotary
    monkeypatch.setattr(text, "rotary", lambda q, k, table, positions, llama4: rotary(q, k, table, positions, None))
    assert main(["check", "--small", "--dtype", "float32"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_check_takes_a_checkpoint(capsys, tmp_path):
    from m3kernels.parity.model import tiny_model

    tiny_model().save_pretrained(tmp_path)
    assert main(["check", "--small", "--dtype", "float32", "--model", str(tmp_path), "--tokens", "40"]) == 0
    assert str(tmp_path) in capsys.readouterr().out


def test_unknown_subcommand_exits_2():
    with pytest.raises(SystemExit) as exit:
        main(["dmeo"])
    assert exit.value.code == 2
