"""Conversion: round trips bit by bit, native folders as torch reads them, FP8, interruptions, and every refusal."""

import gc
import json
import os
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import KINDS, PROJECTIONS, fp8_checkpoint, save
from safetensors.torch import load_file, save_file
from test_weights import UP, edit_json, edit_tensors
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from m3kernels.cli import main
from m3kernels.models.ministral3 import _files, convert, folders, weights
from m3kernels.models.ministral3._files import CheckpointError, Header
from m3kernels.models.ministral3.convert import (
    export_checkpoint,
    from_hf,
    import_checkpoint,
    stream_hf_weights,
    to_hf,
    verify_checkpoint,
)
from m3kernels.models.ministral3.layout import FP8_SCALES, MANIFEST, PROGRESS, files_beside
from m3kernels.models.ministral3.requantise import requantise
from m3kernels.models.ministral3.weights import Checkpoint
from models import batch_for, inputs

SCALE = UP + "_scale_inv"
FP8 = torch.float8_e4m3fn


@pytest.fixture
def hf(tmp_path) -> Path:
    return tmp_path / "hf"


@pytest.fixture
def native(tmp_path) -> Path:
    return tmp_path / "native"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_files(ours: Path, theirs: Path) -> None:
    a, b = contents(ours), contents(theirs)
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name] != b[name]]


def auto(folder: Path, kind: str, **options):
    cls = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    return cls.from_pretrained(folder, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["60KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_byte_identical(kind, shards, dtype, hf, native, out):
    save(kind, hf, shards, dtype)
    import_checkpoint(hf, native)
    assert not list(native.glob("*.tmp")) and not (native / PROGRESS).exists()
    report = export_checkpoint(native, out)
    assert_same_files(out, hf)
    assert not (report.skipped or report.ignored or report.rescaled)
    assert verify_checkpoint(hf, native).equal


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_exported(kind, hf, native, out):
    model = save(kind, hf).eval()
    batch = inputs(batch_for(model))
    import_checkpoint(hf, native)
    export_checkpoint(native, out)
    ours = auto(out, kind).eval()
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_native_is_what_torch_reads_without_renaming(kind, hf, native):
    model = save(kind, hf)
    import_checkpoint(hf, native)
    state = {weights.runtime_name(name): value for name, value in model.state_dict().items()}
    if kind == "3B":
        del state[weights.HEAD]
    read = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(native)))
    for name, value in state.items():
        assert torch.equal(read[name], value), name
    assert {path.suffix for path in native.iterdir()} <= {".safetensors", ".json", ".jinja"}


def test_other_layouts_come_back_as_they_were(hf, native, out):
    model = save("8B", hf, "1GB")
    # runtime names on disk, more than one entry of metadata, and a file without any
    state = {name: value.clone() for name, value in model.state_dict().items()}
    head = {weights.HEAD: state.pop(weights.HEAD)}
    (hf / "model.safetensors").unlink()
    save_file(state, hf / "model-a.safetensors", metadata={"format": "pt", "b": "ä"})
    save_file(head, hf / "model-b.safetensors")
    weight_map = {**dict.fromkeys(state, "model-a.safetensors"), **dict.fromkeys(head, "model-b.safetensors")}
    (hf / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    import_checkpoint(hf, native)
    export_checkpoint(native, out)
    assert_same_files(out, hf)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtypes(name, hf, native, out):
    dtype, model = getattr(torch, name), save("8B", hf)
    import_checkpoint(hf, native, dtype=dtype)
    checkpoint = Checkpoint.open(native)
    assert {checkpoint.dtype(n) for n in checkpoint.names} == {dtype}
    assert torch.equal(checkpoint.read(UP), model.state_dict()[UP].to(dtype))
    assert verify_checkpoint(hf, native).cast == (0 if dtype == torch.float32 else len(checkpoint.names))
    export_checkpoint(native, out)
    again = Checkpoint.open(out)
    assert {again.dtype(n) for n in again.names} == {torch.float32}  # the source's
    assert torch.equal(again.read(UP), model.state_dict()[UP].to(dtype).float())


def test_values_beyond_a_dtype_are_an_error(hf, native):
    save("text", hf, "1GB", torch.bfloat16)
    edit_tensors(hf / "model.safetensors", lambda t: t["model.norm.weight"].fill_(1e5))
    with pytest.raises(CheckpointError, match="norm.weight has values beyond torch.float16"):
        import_checkpoint(hf, native, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="torch.int8: one of"):
        import_checkpoint(hf, native, dtype=torch.int8)


@pytest.mark.parametrize("block", [None, (4, 12)])
def test_fp8_exports_dequantised(block, hf, native, out):
    quantised = fp8_checkpoint("8B", hf, block)
    import_checkpoint(hf, native)
    assert verify_checkpoint(hf, native).equal
    source = Checkpoint.open(hf)
    export_checkpoint(native, out)
    exported, config = Checkpoint.open(out), json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and not exported.scales
    kept = json.loads((hf / "config.json").read_text())
    del kept["quantization_config"]
    assert config == kept
    for name in source.names:
        assert exported.dtype(name) == torch.bfloat16 and torch.equal(exported.read(name), source.read(name)), name
    assert len(quantised) == 2 * len(PROJECTIONS)
    model = auto(out, "8B").eval()
    state = model.state_dict()
    assert all(torch.equal(state[name], source.read(name)) for name in source.names)


def test_the_index_of_a_dequantised_export_is_its_own(hf, native, out):
    fp8_checkpoint("8B", hf, None)
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").rename(hf / "model-1.safetensors")
    index = {
        "metadata": {"total_size": 1, "total_parameters": 2},
        "weight_map": dict.fromkeys(tensors, "model-1.safetensors"),
    }
    (hf / weights.INDEX).write_text(json.dumps(index))
    import_checkpoint(hf, native)
    export_checkpoint(native, out)
    exported, header = json.loads((out / weights.INDEX).read_text()), Header.read(out / "model-1.safetensors")
    count = sum(torch.Size(entry.shape).numel() for entry in header.entries.values())
    assert exported["metadata"] == {"total_size": header.bytes, "total_parameters": count}
    assert exported["weight_map"].keys() == header.entries.keys()


def test_fp8_products_stay_fp32_when_asked_for(hf, native):
    weight, scale = fp8_checkpoint("8B", hf, None)[UP]
    import_checkpoint(hf, native, dtype=torch.float32)
    assert torch.equal(Checkpoint.open(native).read(UP), weight.float() * scale)
    assert torch.equal(from_hf(hf, dtype=torch.float32)[UP], weight.float() * scale)


@pytest.mark.parametrize("block", [None, (12, 12), (32, 20)])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_untouched_fp8_comes_back_bit_by_bit(block, dtype, hf, native, out):
    fp8_checkpoint("8B", hf, block)
    import_checkpoint(hf, native, dtype=dtype)
    report = export_checkpoint(native, out, fp8=True)
    assert_same_files(out, hf)
    assert not report.rescaled


@pytest.mark.parametrize("block", [None, (32, 20)])
def test_scales_that_weights_outgrew_are_recomputed(block, hf, native, out):
    fp8_checkpoint("8B", hf, block)
    import_checkpoint(hf, native)
    before, source = Checkpoint.open(native).read(UP), Checkpoint.open(hf)
    trained = before.clone()
    trained[:10, :10] *= 3
    edit_tensors(native / "model.safetensors", lambda t: t.update({UP: trained}))
    report = export_checkpoint(native, out, fp8=True)
    assert report.rescaled == (SCALE,)
    exported = Checkpoint.open(out)
    off = (exported.read(UP).float() - trained.float()).abs()
    step = trained.float().abs() / 16 + exported.read_stored(SCALE).max() * 2**-9  # E4M3: 3 bits, subnormals below
    assert (off <= step).all()
    old, new = source.read_stored(SCALE), exported.read_stored(SCALE)
    assert ((new > old) if block is None else (new[0, 0] > old[0, 0]) & (new[1:] == old[1:]).all()).all()
    untouched = UP.replace("up_proj", "gate_proj")
    assert torch.equal(
        exported.read_stored(untouched).view(torch.uint8), source.read_stored(untouched).view(torch.uint8)
    )


def test_requantising_extremes():
    every = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(16, 16)
    some = torch.rand(50, generator=torch.Generator().manual_seed(0)) / 100  # bf16 rounds the product up for some
    for scale in (*some, torch.tensor(3e-4).bfloat16(), torch.tensor(0.25).to(torch.float8_e8m0fnu)):
        weight = (every.float() * scale.float()).bfloat16()
        again, kept, recomputed = requantise("w", weight, scale, {})
        assert torch.equal(again.view(torch.uint8)[:, :15], every.view(torch.uint8)[:, :15]) and not recomputed
        grown = torch.full((4, 4), 448 * 1.2) * scale.float()
        back, larger, recomputed = requantise("w", grown, scale, {})
        assert recomputed and ((back.float() * larger.float() / grown - 1).abs() < 2**-4).all()
    assert requantise("w", torch.zeros(2, 2), torch.zeros(()), {})[0].float().sum() == 0
    with pytest.raises(CheckpointError, match="infinite"):
        requantise("w", torch.full((2, 2), float("inf")), torch.ones(()), {})


def test_fp8_refusals(hf, native, out, tmp_path):
    fp8_checkpoint("8B", hf, None)
    import_checkpoint(hf, native)
    (native / FP8_SCALES).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="fp8_scales.safetensors is missing"):
        export_checkpoint(native, out, fp8=True)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    save("text", tmp_path / "plain")
    import_checkpoint(tmp_path / "plain", tmp_path / "native2")
    with pytest.raises(CheckpointError, match="no FP8 weights"):
        export_checkpoint(tmp_path / "native2", out, fp8=True)


class Stop(Exception):
    pass


def test_an_import_goes_on_where_it_stopped(hf, native, monkeypatch):
    save("8B", hf)
    real, read = _files.write, []

    def stops(path, entries, metadata, tensors):
        def some():
            for i, tensor in enumerate(tensors):
                if path.name.startswith("model-00004") and i == 1:
                    raise Stop
                yield tensor

        real(path, entries, metadata, some())

    monkeypatch.setattr(convert, "write", stops)
    with pytest.raises(Stop):
        import_checkpoint(hf, native)
    assert (native / "model-00004-of-00007.safetensors.tmp").exists() and not (native / MANIFEST).exists()
    with pytest.raises(CheckpointError, match="did not finish"):
        export_checkpoint(native, native.with_name("out"))
    with pytest.raises(CheckpointError, match="not empty"):
        import_checkpoint(hf, native, dtype=torch.bfloat16)
    changed = hf / "model-00001-of-00007.safetensors"
    times = (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    os.utime(changed, ns=(0, 0))
    with pytest.raises(CheckpointError, match="not empty"):
        import_checkpoint(hf, native)
    os.utime(changed, ns=times)
    monkeypatch.setattr(convert, "write", lambda path, *rest: (read.append(path.name), real(path, *rest)))
    report = import_checkpoint(hf, native)
    assert report.resumed == tuple(f"model-0000{i}-of-00007.safetensors" for i in (1, 2, 3))
    assert read == [f"model-0000{i}-of-00007.safetensors" for i in (4, 5, 6, 7)]
    assert verify_checkpoint(hf, native).equal


def test_folders_that_are_not_written_over(hf, native, out, tmp_path):
    save("text", hf)
    native.mkdir()
    (native / "thesis.txt").write_text("mine")
    for overwrite, message in ((False, "not empty"), (True, "more than a checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(hf, native, overwrite=overwrite)
    (native / "thesis.txt").unlink()
    import_checkpoint(hf, native)
    (native / "stale.safetensors").touch()
    import_checkpoint(hf, native, dtype=torch.bfloat16, overwrite=True)
    assert not (native / "stale.safetensors").exists()
    for target, message in (
        (hf, "is read"),
        (hf / "native", "is read"),
        (tmp_path, "is read"),
        (hf / "config.json", "read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(hf, target, overwrite=True)
    export_checkpoint(native, out)
    with pytest.raises(CheckpointError, match="not empty"):
        export_checkpoint(native, out)
    (out / "stale.safetensors").touch()
    export_checkpoint(native, out, overwrite=True)
    assert contents(out).keys() == contents(hf).keys()
    (out / "folder").mkdir()
    with pytest.raises(CheckpointError, match="holds folder"):
        export_checkpoint(native, out, overwrite=True)
    with pytest.raises(CheckpointError, match="is read"):
        export_checkpoint(native, native, overwrite=True)
    with pytest.raises(CheckpointError, match="is a native checkpoint"):
        import_checkpoint(native, tmp_path / "again")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        import_checkpoint(hf, tmp_path / "file")


def test_a_failed_export_leaves_nothing_and_keeps_the_old(hf, native, out, tmp_path, monkeypatch):
    save("8B", hf)
    import_checkpoint(hf, native)
    export_checkpoint(native, out)
    before, real = contents(out), convert.write

    def fails(path, *rest):
        if "00003" in path.name:
            raise Stop
        real(path, *rest)

    monkeypatch.setattr(convert, "write", fails)
    with pytest.raises(Stop):
        export_checkpoint(native, out, overwrite=True)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native", "out"}


def test_disk_space_is_checked_first(hf, native, out, monkeypatch):
    save("text", hf, "1GB")
    needed = Header.read(hf / "model.safetensors").bytes
    import_checkpoint(hf, native)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, needed - 1))
    for convert_to in (lambda: import_checkpoint(hf, out), lambda: export_checkpoint(native, out)):
        with pytest.raises(CheckpointError, match=f"{needed} bytes are needed .* {needed - 1} are free"):
            convert_to()
    assert not out.exists()


def test_the_latest_complete_step_is_exported(hf, tmp_path, out):
    save("text", hf)
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="is no folder"):
        export_checkpoint(run, out)
    (run / "step-30").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="step-30, none of them complete"):
        export_checkpoint(run, out)
    import_checkpoint(hf, run / "iter_0000009")
    import_checkpoint(hf, run / "step-20", dtype=torch.bfloat16)
    assert folders.native_folder(run) == run / "step-20"
    export_checkpoint(run, out)
    with pytest.raises(CheckpointError, match="no native checkpoint"):
        export_checkpoint(hf, tmp_path / "out2")
    edit_json(run / "step-20" / MANIFEST, lambda m: m.update(format=99))
    with pytest.raises(CheckpointError, match="format 99"):
        export_checkpoint(run, tmp_path / "out2")


def drop(native: Path, *names: str) -> None:
    index = json.loads((native / weights.INDEX).read_text())
    for name in names:
        edit_tensors(native / index["weight_map"].pop(name), lambda t, name=name: t.pop(name))
    (native / weights.INDEX).write_text(json.dumps(index))


def test_missing_tensors_are_named_or_skipped(hf, native, out):
    save("8B", hf)
    import_checkpoint(hf, native)
    drop(native, UP)
    with pytest.raises(CheckpointError, match=f"lacks {UP}"):
        export_checkpoint(native, out)
    report = export_checkpoint(native, out, strict=False)
    assert report.skipped == (UP,)
    assert set(Checkpoint.open(hf).names) - set(Checkpoint.open(out).names) == {UP}
    assert verify_checkpoint(hf, native).missing == (UP,)


def test_incomplete_sources_are_not_imported(hf, native):
    save("text", hf, "1GB")
    edit_tensors(hf / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="lacks model.language_model.norm.weight"):
        import_checkpoint(hf, native)
    assert not native.exists()


def swap(tensors):
    gate, up = UP.replace("up", "gate"), UP
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def turn(tensors):
    name = UP.replace("mlp.up", "self_attn.o")
    square = tensors[name][:, :48]
    tensors[name] = torch.cat([square.T, tensors[name][:, 48:]], 1).contiguous()


@pytest.mark.parametrize("wrong", [swap, turn, lambda t: t[UP].view(-1)[7].add_(1e-7)])
def test_verify_finds_wrong_variants(wrong, hf, native):
    save("8B", hf, "1GB")
    import_checkpoint(hf, native)
    edit_tensors(native / "model.safetensors", wrong)
    found = verify_checkpoint(hf, native)
    assert found.different and not found.equal and all(off > 0 for off in found.different.values())


def test_verify_finds_a_scale_product_in_bf16(hf, native, monkeypatch):
    fp8_checkpoint("8B", hf, None)
    with monkeypatch.context() as patch:
        wrong = lambda weight, scale, block, index, dtype: (weight.bfloat16() * scale.bfloat16()).to(dtype)  # noqa: E731
        patch.setattr(weights, "dequantise", wrong)
        import_checkpoint(hf, native)
    assert len(verify_checkpoint(hf, native).different) >= len(PROJECTIONS)


def test_one_tensor_in_memory_at_a_time(hf, native, out, monkeypatch):
    save("14B", hf, "1GB")
    alive, peak, read = {}, 0, Checkpoint.read_stored

    def watched(self, name, index=None):
        nonlocal peak
        tensor = read(self, name, index)
        gc.collect()
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        peak = max(peak, sum(alive.values()))
        return tensor

    monkeypatch.setattr(Checkpoint, "read_stored", watched)
    import_checkpoint(hf, native)
    export_checkpoint(native, out)
    largest = max(e.bytes for e in Header.read(hf / "model.safetensors").entries.values())
    assert largest <= peak <= 2 * largest < Header.read(hf / "model.safetensors").bytes


def test_from_and_to_hf(hf, out, tmp_path):
    save("3B", hf, "60KB")
    state = from_hf(hf)
    assert weights.HEAD not in state
    to_hf(state | {weights.HEAD: state[weights.EMBEDDING]}, out, hf)
    assert_same_files(out, hf)
    with pytest.raises(CheckpointError, match="has lm_head.weight"):
        to_hf(state | {weights.HEAD: state[weights.EMBEDDING] + 1}, tmp_path / "out2", hf)
    with pytest.raises(CheckpointError, match="hf_model"):
        export_checkpoint(state, tmp_path / "out2")
    with pytest.raises(CheckpointError, match="wrong shape"):
        to_hf(state | {UP: state[UP].T}, tmp_path / "out2", hf)
    assert from_hf(hf, dtype=torch.float16)[UP].dtype == torch.float16


def test_stream(hf, native):
    save("8B", hf)
    import_checkpoint(hf, native)
    streamed = dict(stream_hf_weights(native))
    saved = {n: v for file in hf.glob("*.safetensors") for n, v in load_file(file).items()}
    assert streamed.keys() == saved.keys() and all(torch.equal(streamed[n], saved[n]) for n in saved)
    again = dict(stream_hf_weights(from_hf(hf), hf))
    assert again.keys() == saved.keys()


def test_no_code_and_no_pickle_goes_along(hf, native):
    save("text", hf)
    for name in ("modeling.py", "optimizer.pt", "pytorch_model.bin"):
        (hf / name).touch()
    import_checkpoint(hf, native)
    assert not {"modeling.py", "optimizer.pt", "pytorch_model.bin"} & contents(native).keys()
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"} <= set(
        files_beside(hf)
    )


def run_command(capsys, *argv) -> tuple[int, str]:
    code = main(["convert", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_commands(hf, native, out, capsys):
    save("8B", hf)
    where = ("--hf-model", hf, "--checkpoint-path", native, "--no-progress")
    code, text = run_command(capsys, "verify", *where)
    assert code == 2 and "error:" in text and str(native) in text
    code, text = run_command(capsys, "import", *where, "--device-map", "auto", "--trust-remote-code")
    assert code == 0 and "--device-map auto is without effect" in text and "--trust-remote-code is without" in text
    assert run_command(capsys, "verify", *where) == (0, "45 tensors compared: 0 differ, largest difference 0\n")
    assert run_command(capsys, "export", *where, "--hf-path", out)[0] == 0
    assert_same_files(out, hf)
    drop(native, UP)
    code, text = run_command(capsys, "export", *where, "--hf-path", out, "--overwrite", "--not-strict")
    assert code == 0 and f"skipped: {UP}" in text
    code, text = run_command(capsys, "verify", *where)
    assert code == 1 and UP in text


def test_the_bridge_script_takes_its_own_flags(hf, native, out, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples/conversion"))
    import convert_checkpoints as script

    save("3B", hf)
    paths = ["--hf-model", str(hf), "--megatron-path", str(native)]
    assert script.main(["import", *paths, "--torch-dtype", "bfloat16"]) == 0
    assert "import" in capsys.readouterr().out  # the progress bar
    assert script.main(["export", *paths, "--hf-path", str(out), "--no-progress", "--not-strict"]) == 0
    assert Checkpoint.open(native).dtype(UP) == torch.bfloat16 and Checkpoint.open(out).tied
    sys.modules.pop("convert_checkpoints")
