"""Export: byte-identical round trips, what transformers loads, FP8, padding, steps, refusals; the example's flags."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_folders import (
    LAYOUTS,
    SIZES,
    assert_identical,
    bits,
    edit_config,
    load,
    model,
    reindex,
    rewrite,
    save,
    save_fp8,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from m3kernels.cli import main
from m3kernels.models.ministral3 import export, layout
from m3kernels.models.ministral3.convert import (
    export_checkpoint,
    import_checkpoint,
    stream_hf_weights,
    to_hf,
    verify_checkpoint,
)
from m3kernels.models.ministral3.files import CheckpointError
from m3kernels.models.ministral3.layout import RECORD, SCALES_FILE
from m3kernels.models.ministral3.weights import INDEX, SINGLE, UNFINISHED, Checkpoint
from models import batch_for

EMBEDDING = "model.language_model.embed_tokens.weight"
UP = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """(source, native) of the 8B, not to be changed."""
    base = tmp_path_factory.mktemp("once")
    source = save(base / "hf")
    import_checkpoint(source, base / "native")
    return source, base / "native"


@pytest.fixture
def native(once, tmp_path):
    """A copy of the native checkpoint."""
    return shutil.copytree(once[1], tmp_path / "native")


@pytest.fixture(scope="module", params=["tensor", "one", "block"])
def fp8(request, tmp_path_factory):
    """(source, native) in FP8 with scales of each kind, not to be changed."""
    base = tmp_path_factory.mktemp(request.param)
    source = save_fp8(base / "hf", request.param)
    import_checkpoint(source, base / "native")
    return source, base / "native"


def logits(folder: Path) -> torch.Tensor:
    made = load(folder)
    batch = {key: value for key, value in batch_for(made).items() if key != "labels"}
    with torch.no_grad():
        return made(**batch).logits


def change(native: Path, edit) -> None:
    """Edits the tensors of a native checkpoint, as training would."""
    rewrite(native, lambda held: {name: edit(name, tensor) for name, tensor in held.items()})


class TestRoundTrip:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("shard", ["60KB", "1GB"])
    def test_files_come_back_byte_by_byte(self, tmp_path, size, layout, shard):
        source = save(tmp_path / "hf", size, layout, shard)
        if shard == "1GB" and layout == "runtime":
            (source / INDEX).unlink()
        import_checkpoint(source, tmp_path / "native")
        report = export_checkpoint(tmp_path / "native", tmp_path / "out")
        assert_identical(tmp_path / "out", source)
        assert report.notices == [] and (source / SINGLE).exists() == (shard == "1GB")
        if layout != "runtime":
            assert torch.equal(logits(tmp_path / "out"), logits(source))

    @given(data=st.data())
    @settings(max_examples=15, deadline=None)
    def test_any_split_dtype_metadata_and_order(self, once, tmp_path_factory, data):
        base = tmp_path_factory.mktemp("any")
        held = tensors(once[0])
        count = data.draw(st.integers(1, 3))
        shards: list[dict] = [{} for _ in range(count)]
        for name in data.draw(st.permutations(sorted(held))):
            dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.float64]))
            shards[data.draw(st.integers(0, count - 1))][name] = held[name].to(dtype)
        shutil.copytree(once[0], base / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
        for i, shard in enumerate(shards):
            metadata = data.draw(st.sampled_from([None, {"format": "pt"}, {"format": "pt", "b": "é", "a": "1"}]))
            if shard:
                save_file(shard, base / "hf" / f"part{i}.safetensors", metadata=metadata)
        reindex(base / "hf")
        import_checkpoint(base / "hf", base / "native")
        export_checkpoint(base / "native", base / "out")
        assert_identical(base / "out", base / "hf")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_through_another_dtype(self, once, tmp_path, dtype):
        import_checkpoint(once[0], tmp_path / "native", dtype=dtype)
        export_checkpoint(tmp_path / "native", tmp_path / "out")
        assert_identical(tmp_path / "out", once[0])

    def test_a_reference_in_another_layout(self, once, tmp_path):
        reference = save(tmp_path / "reference", layout="runtime", shard="90KB")
        export_checkpoint(once[1], tmp_path / "out", reference)
        assert_identical(tmp_path / "out", reference)

    def test_trained_weights_arrive_in_transformers(self, native, tmp_path):
        trained = model()
        with torch.no_grad():
            for p in trained.parameters():
                p.mul_(1.5)
        state = trained.state_dict()
        change(native, lambda name, tensor: state[name])
        export_checkpoint(native, tmp_path / "out")
        loaded = load(tmp_path / "out").state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)

    def test_a_single_file_source_may_carry_other_files(self, once, tmp_path):
        native = shutil.copytree(once[1], tmp_path / "native")
        (native / "chat_template.jinja").write_text("{{ x }}")
        (native / "optimizer.bin").touch()
        export_checkpoint(native, tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert "chat_template.jinja" in names and not names & {RECORD, "optimizer.bin"}


class TestFP8:
    def test_unquantised_by_default(self, fp8, tmp_path):
        source, native = fp8
        report = export_checkpoint(native, tmp_path / "out")
        assert "FP8 weights are written unquantised" in report.notices[0]
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        held = tensors(tmp_path / "out")
        assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16} and not any("scale" in k for k in held)
        weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        original = json.loads((source / INDEX).read_text())["weight_map"]
        assert weight_map == {name: file for name, file in original.items() if "scale" not in name}
        assert torch.equal(logits(tmp_path / "out"), logits(source))

    def test_back_to_fp8_bit_by_bit(self, fp8, tmp_path):
        source, native = fp8
        assert "scales are kept" in import_checkpoint(source, tmp_path / "again").notices[0]
        assert "quantization_config" not in json.loads((native / "config.json").read_text())
        export_checkpoint(native, tmp_path / "out", fp8=True)
        assert_identical(tmp_path / "out", source)

    def test_against_a_reference_without_a_record(self, fp8, tmp_path):
        source, native = fp8
        bare = shutil.copytree(native, tmp_path / "native", ignore=shutil.ignore_patterns(RECORD, "quantization"))
        with pytest.raises(CheckpointError, match="layout to write is not known"):
            export_checkpoint(bare, tmp_path / "out", fp8=True)
        export_checkpoint(bare, tmp_path / "out", source, fp8=True)
        assert_identical(tmp_path / "out", source)

    def test_weights_that_outgrew_their_scale_get_another(self, fp8, tmp_path):
        source, native = shutil.copytree(fp8[0], tmp_path / "hf"), shutil.copytree(fp8[1], tmp_path / "native")
        change(native, lambda name, tensor: tensor * 8 if name == UP else tensor)
        report = export_checkpoint(native, tmp_path / "out", fp8=True)
        assert [notice for notice in report.notices if "outgrown" in notice] == [
            f"{UP} has outgrown its FP8 scale, which was made anew"
        ]
        ours, theirs = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
        off = (ours.read(UP).float() - 8 * theirs.read(UP).float()).abs().max() / theirs.read(UP).abs().max() / 8
        assert off < 1 / 16 and not ours.read(UP).isnan().any()
        others = [name for name in theirs.names if name != UP]
        assert all(torch.equal(bits(ours.read(name)), bits(theirs.read(name))) for name in others)
        assert ours.dtype(UP) == torch.bfloat16 and ours.config == theirs.config

    def test_small_steps_stay_within_e4m3(self, fp8, tmp_path):
        native = shutil.copytree(fp8[1], tmp_path / "native")
        change(native, lambda name, tensor: tensor * 0.9)
        export_checkpoint(native, tmp_path / "out", fp8=True)
        ours, theirs = Checkpoint.open(tmp_path / "out").read(UP), Checkpoint.open(native).read(UP)
        assert (ours - theirs).abs().max() <= theirs.abs().max() / 16 and not torch.equal(ours, theirs)

    def test_a_weight_that_is_left_out_takes_its_scales_with_it(self, fp8, tmp_path):
        native = shutil.copytree(fp8[1], tmp_path / "native")
        rewrite(native, lambda held: {name: tensor for name, tensor in held.items() if name != UP})
        export_checkpoint(native, tmp_path / "out", fp8=True, strict=False)
        left_out = {name for name in tensors(fp8[0]) if "layers.1.mlp.up_proj." in name}
        assert len(left_out) == 3 and tensors(tmp_path / "out").keys() == tensors(fp8[0]).keys() - left_out

    def test_without_scales_it_is_refused(self, once, fp8, tmp_path):
        with pytest.raises(CheckpointError, match="--fp8 needs the scales of an FP8 checkpoint"):
            export_checkpoint(once[1], tmp_path / "out", fp8=True)
        native = shutil.copytree(fp8[1], tmp_path / "native")
        (native / SCALES_FILE).unlink()
        with pytest.raises(CheckpointError, match="scales.safetensors is missing"):
            export_checkpoint(native, tmp_path / "out", fp8=True)


class TestStrictness:
    def test_padding_of_the_vocabulary_is_stripped(self, once, native, tmp_path):
        def pad(name, tensor):
            if name in (EMBEDDING, "lm_head.weight"):
                return torch.cat([tensor, torch.ones(9, tensor.shape[1], dtype=tensor.dtype)])
            return tensor

        change(native, pad)
        report = export_checkpoint(native, tmp_path / "out")
        assert_identical(tmp_path / "out", once[0])
        assert f"{EMBEDDING}: padding stripped, 160 rows to the vocabulary's 151" in report.notices
        result = verify_checkpoint(once[0], native)
        assert result.differences == {} and "padding" in result.notices[0]

    def test_a_vocabulary_that_grew_is_not_stripped_against_a_reference(self, once, native, tmp_path):
        config = json.loads((native / "config.json").read_text())
        edit_config(native, text_config={**config["text_config"], "vocab_size": 160})
        change(native, lambda name, t: torch.cat([t, t[:9]]) if name in (EMBEDDING, "lm_head.weight") else t)
        with pytest.raises(CheckpointError, match="vocab_size 160, that of --hf-model 151"):
            export_checkpoint(native, tmp_path / "out", once[0])
        report = export_checkpoint(native, tmp_path / "out")
        assert report.notices == ["the checkpoint's own config.json is written: it was changed in text_config"]
        assert load(tmp_path / "out").lm_head.weight.shape[0] == 160

    def test_missing_and_unknown_tensors(self, native, tmp_path):
        def damage(held):
            held.pop(UP, None)
            return held | ({"adapter.weight": torch.ones(2)} if EMBEDDING in held else {})

        rewrite(native, damage)
        with pytest.raises(CheckpointError, match=f"missing: {UP}.*not in this model: adapter.weight"):
            export_checkpoint(native, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        report = export_checkpoint(native, tmp_path / "out", strict=False)
        assert f"missing, left out: {UP}" in report.notices
        assert "not in the layout, left out: adapter.weight" in report.notices
        assert len(Checkpoint.open(tmp_path / "out").names) == 44

    def test_other_shapes_are_refused_in_any_case(self, native, tmp_path):
        change(native, lambda name, tensor: tensor.T.contiguous() if name == UP else tensor)
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=r"up_proj.weight is \[60, 84\]"):
                export_checkpoint(native, tmp_path / "out", strict=strict)

    def test_a_reference_of_another_size(self, once, tmp_path):
        with pytest.raises(CheckpointError, match="of another shape|missing"):
            export_checkpoint(once[1], tmp_path / "out", save(tmp_path / "hf", "14b"))

    def test_a_damaged_record(self, native, tmp_path):
        record = json.loads((native / RECORD).read_text())
        for broken, says in (({"format": 99}, "is of format 99"), ({"layout": {"files": 3}}, "is damaged")):
            (native / RECORD).write_text(json.dumps({**record, **broken}))
            with pytest.raises(CheckpointError, match=says):
                export_checkpoint(native, tmp_path / "out")


class TestTarget:
    def test_the_latest_complete_step_is_taken(self, once, tmp_path):
        run = tmp_path / "run"
        for name in ("iter_0000009", "iter_0000020", "step-100", "step-200.tmp", "notes"):
            shutil.copytree(once[1], run / name)
        shutil.copytree(once[1], run / "step-300", ignore=shutil.ignore_patterns(INDEX))
        (run / "step-400").mkdir()
        (run / "step-400" / UNFINISHED).touch()
        report = export_checkpoint(run, tmp_path / "out")
        assert report.notices == [
            f"{run / 'step-400'} is not complete and was passed over",
            f"{run / 'step-300'} is not complete and was passed over",
            f"taking {run / 'step-100'}",
        ]
        assert_identical(tmp_path / "out", once[0])
        for name in ("iter_0000009", "iter_0000020", "step-100"):
            (run / name / "config.json").unlink()
        with pytest.raises(CheckpointError, match="nor a complete iter_N or step-N"):
            export_checkpoint(run, tmp_path / "other")

    def test_it_must_be_free_and_apart(self, once, native, tmp_path):
        source, _ = once
        out = tmp_path / "out"
        export_checkpoint(native, out)
        with pytest.raises(CheckpointError, match="--hf-path .* is not empty"):
            export_checkpoint(native, out)
        (out / "extra.txt").touch()
        export_checkpoint(native, out, overwrite=True)
        assert_identical(out, source)
        for target in (native, native / "hf", source):
            with pytest.raises(CheckpointError, match="keep apart"):
                export_checkpoint(native, target, source, overwrite=True)
        with pytest.raises(CheckpointError, match="does not exist"):
            export_checkpoint(tmp_path / "nowhere", out, overwrite=True)
        assert_identical(out, source)

    def test_a_failure_leaves_the_old_export_and_nothing_else(self, once, native, tmp_path, monkeypatch):
        out = tmp_path / "out"
        export_checkpoint(native, out)
        read, count = export.read_as, iter(range(100))

        def fails(*args):
            if next(count) == 20:
                raise OSError("disk full")
            return read(*args)

        monkeypatch.setattr(export, "read_as", fails)
        with pytest.raises(OSError, match="disk full"):
            export_checkpoint(native, out, overwrite=True)
        assert_identical(out, once[0])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "out"]

    def test_what_a_killed_export_left_is_cleared_and_nothing_else(self, once, native, tmp_path):
        half = tmp_path / "out.tmp"
        half.mkdir()
        (half / "notes.txt").touch()
        with pytest.raises(CheckpointError, match="out.tmp is in the way"):
            export_checkpoint(native, tmp_path / "out")
        (half / UNFINISHED).touch()
        export_checkpoint(native, tmp_path / "out")
        assert_identical(tmp_path / "out", once[0])
        assert not half.exists()

    def test_a_link_to_a_folder_stays_one(self, once, native, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for overwrite in (False, True):
            export_checkpoint(native, tmp_path / "link", overwrite=overwrite)
        assert (tmp_path / "link").is_symlink()
        assert_identical(tmp_path / "real", once[0])

    def test_disk_space_is_checked_first(self, native, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match="bytes are needed, 10 are free"):
            export_checkpoint(native, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["native"]


class TestPython:
    def test_stream_gives_the_files_names(self, once):
        streamed = dict(stream_hf_weights(once[1]))
        held = tensors(once[0])
        assert streamed.keys() == held.keys() and all(torch.equal(streamed[name], held[name]) for name in held)

    @pytest.mark.parametrize("size", ["3b", "8b"])
    def test_a_model_in_memory(self, tmp_path, size):
        source = save(tmp_path / "hf", size)
        for given_source in (model(size), model(size).state_dict()):
            assert dict(stream_hf_weights(given_source, source)).keys() == tensors(source).keys()
            to_hf(given_source, tmp_path / "out", source, overwrite=True)
            assert_identical(tmp_path / "out", source)
        with pytest.raises(CheckpointError, match="the layout to write is not known"):
            to_hf(model(size), tmp_path / "other")

    def test_a_sharded_model(self, once, tmp_path, process_group):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        state = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in model().state_dict().items()}
        held = tensors(once[0])
        assert all(torch.equal(tensor, held[name]) for name, tensor in stream_hf_weights(state, once[0]))
        to_hf(state, tmp_path / "out", once[0])
        assert_identical(tmp_path / "out", once[0])


class TestCommands:
    def test_export(self, fp8, tmp_path, capsys):
        source, native = fp8
        arguments = ["--checkpoint-path", str(native), "--hf-path", str(tmp_path / "out"), "--no-progress"]
        assert main(["convert", "export", *arguments, "--fp8"]) == 0
        assert_identical(tmp_path / "out", source)
        assert main(["convert", "export", *arguments]) == 2
        assert "pass --overwrite" in capsys.readouterr().err
        assert main(["convert", "export", *arguments, "--overwrite", "--not-strict"]) == 0
        assert "note: FP8 weights are written unquantised" in capsys.readouterr().out

    def test_the_progress_bar_counts_to_the_end(self, once, tmp_path, capsys):
        arguments = ["--checkpoint-path", str(once[1]), "--hf-path", str(tmp_path / "out")]
        assert main(["convert", "export", *arguments]) == 0
        nbytes = sum(header.nbytes for header in Checkpoint.open(once[0]).files.values())
        out = capsys.readouterr().out
        assert f"{nbytes / 1000:.1f}/{nbytes / 1000:.1f} kB" in out

    def test_the_flags_of_megatron_bridges_page(self, once, tmp_path, capsys):
        path = Path(__file__).parents[2] / "examples/conversion/convert_checkpoints.py"
        spec = importlib.util.spec_from_file_location("convert_checkpoints", path)
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        native, out = str(tmp_path / "native"), str(tmp_path / "out")
        importing = ["--hf-model", str(once[0]), "--megatron-path", native, "--torch-dtype", "bfloat16"]
        assert example.main(["import", *importing, "--device-map", "auto", "--trust-remote-code"]) == 0
        assert "--device-map has no effect" in capsys.readouterr().err
        exporting = ["--hf-model", str(once[0]), "--megatron-path", native, "--hf-path", out]
        assert example.main(["export", *exporting, "--no-progress", "--not-strict"]) == 0
        assert_identical(Path(out), once[0])


def test_layouts_of_these_tests_are_those_of_transformers(tmp_path):
    assert "language_model.model.norm.weight" in tensors(save(tmp_path / "a"))
    assert "model.language_model.norm.weight" in model().state_dict()
    assert "model.norm.weight" in tensors(save(tmp_path / "b", layout="text"))
