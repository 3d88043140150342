"""Import: what a native checkpoint is, resuming, memory, refusals; DCP reads it at any sharding; verify."""

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hf_folders import (
    BLOCK,
    LAYOUTS,
    SIZES,
    assert_identical,
    bits,
    edit_config,
    model,
    rewrite,
    save,
    save_fp8,
    tensors,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from m3kernels.cli import main
from m3kernels.models.ministral3 import convert, files, layout
from m3kernels.models.ministral3.convert import from_hf, import_checkpoint, verify_checkpoint
from m3kernels.models.ministral3.files import CheckpointError
from m3kernels.models.ministral3.layout import RECORD, SCALES_FILE
from m3kernels.models.ministral3.weights import HEAD, INDEX, UNFINISHED, Checkpoint, runtime_name

Q = "model.language_model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The 8B folder, not to be changed."""
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(saved, tmp_path / "hf")


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}


class TestImport:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("size", SIZES)
    def test_native_checkpoints_hold_runtime_names(self, tmp_path, size, layout):
        source = save(tmp_path / "hf", size, layout)
        report = import_checkpoint(source, tmp_path / "native")
        state = {runtime_name(name): tensor for name, tensor in model(size, layout).state_dict().items()}
        if SIZES[size]["tied"]:
            del state[HEAD]
        held = tensors(tmp_path / "native")
        assert held.keys() == state.keys() and report.tensors == len(held) and report.notices == []
        assert all(torch.equal(bits(held[name]), bits(state[name])) for name in state)
        assert len(list((tmp_path / "native").glob("*.safetensors"))) == len(list(source.glob("*.safetensors"))) > 1
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (tmp_path / "native" / name).read_bytes() == (source / name).read_bytes()
        index = json.loads((tmp_path / "native" / INDEX).read_text())
        assert index["weight_map"].keys() == state.keys()
        assert Checkpoint.open(tmp_path / "native").check().keys() == state.keys()

    def test_nothing_is_pickled_or_left_over(self, saved, tmp_path):
        import_checkpoint(saved, tmp_path / "native")
        endings = {path.suffix for path in (tmp_path / "native").rglob("*") if path.is_file()}
        assert endings == {".json", ".safetensors"} and not (tmp_path / "native" / UNFINISHED).exists()
        record = json.loads((tmp_path / "native" / RECORD).read_text())
        assert record["versions"]["torch"] and record["source"] == str(saved)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_another_dtype(self, saved, tmp_path, dtype, capsys):
        arguments = ["--hf-model", str(saved), "--checkpoint-path", str(tmp_path / "n"), "--torch-dtype", dtype]
        assert main(["convert", "import", *arguments, "--no-progress"]) == 0
        held, source = tensors(tmp_path / "n"), Checkpoint.open(saved)
        assert all(torch.equal(held[name], source.read(name).to(getattr(torch, dtype))) for name in source.names)
        assert json.loads((tmp_path / "n" / "config.json").read_text())["dtype"] == dtype
        assert ("tensors were rounded" in capsys.readouterr().out) == (dtype == "float16")

    def test_float16_overflow_is_named(self, folder, tmp_path):
        rewrite(
            folder, lambda held: {k: v * (1e9 if k == "vision_tower.ln_pre.weight" else 1) for k, v in held.items()}
        )
        with pytest.raises(CheckpointError, match="model.vision_tower.ln_pre.weight holds values beyond float16"):
            import_checkpoint(folder, tmp_path / "n", dtype=torch.float16)

    def test_an_incomplete_source_is_refused_before_anything_is_written(self, folder, tmp_path):
        rewrite(folder, lambda held: {k: v for k, v in held.items() if not k.endswith("model.norm.weight")})
        with pytest.raises(CheckpointError, match="missing: model.language_model.norm.weight"):
            import_checkpoint(folder, tmp_path / "native")
        assert not (tmp_path / "native").exists()

    def test_disk_space_is_checked_first(self, saved, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: usage)
        needed = sum(header.nbytes for header in Checkpoint.open(saved).files.values())
        with pytest.raises(CheckpointError, match=f"{needed} bytes are needed, 1000 are free"):
            import_checkpoint(saved, tmp_path / "native")
        assert not (tmp_path / "native").exists()

    def test_targets_that_are_not_free(self, saved, tmp_path):
        native = tmp_path / "native"
        native.mkdir()
        (native / "thesis.docx").touch()
        for overwrite, says in ((False, "is not empty: choose another"), (True, "holds other things .thesis.docx")):
            with pytest.raises(CheckpointError, match=says):
                import_checkpoint(saved, native, overwrite=overwrite)
        (native / "thesis.docx").unlink()
        import_checkpoint(saved, native)
        with pytest.raises(CheckpointError, match="pass --overwrite"):
            import_checkpoint(saved, native)
        (native / "old.txt").touch()
        import_checkpoint(saved, native, overwrite=True, dtype=torch.float32)
        assert Checkpoint.open(native).dtype(Q) == torch.float32 and not (native / "old.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["native"]
        with pytest.raises(CheckpointError, match="is a native checkpoint already"):
            import_checkpoint(native, tmp_path / "again")
        with pytest.raises(CheckpointError, match="is a file"):
            import_checkpoint(saved, native / "config.json")

    @pytest.mark.parametrize("target", [".", "inside", ".."])
    def test_source_and_target_are_kept_apart(self, folder, target):
        with pytest.raises(CheckpointError, match="keep apart"):
            import_checkpoint(folder, folder / target, overwrite=True)
        assert Checkpoint.open(folder).check()

    def test_from_hf_gives_a_state_dict(self, saved):
        state = from_hf(saved, dtype=torch.float32)
        fresh = model(dtype=torch.float32)
        for p in fresh.parameters():
            p.data.zero_()
        fresh.load_state_dict(state)
        assert torch.equal(fresh.lm_head.weight, model().lm_head.weight.float())


class TestResume:
    def killed(self, source, native, after: int) -> None:
        """Imports in a process of its own that is killed while it writes its tensor number ``after``."""
        child = os.fork()
        if child == 0:
            try:
                read, count = convert.read_as, iter(range(10**6))

                def dies(*args):
                    if next(count) == after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return read(*args)

                convert.read_as = dies
                import_checkpoint(source, native)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL

    @pytest.mark.parametrize("after", [0, 3, 25, 44])
    def test_a_killed_import_goes_on(self, saved, tmp_path, after):
        native = tmp_path / "native"
        self.killed(saved, native, after)
        before = inodes(native)
        assert len(before) < len(list(saved.glob("*.safetensors"))) and list(native.glob("*.tmp"))
        with pytest.raises(CheckpointError, match="interrupted import: run the same import again"):
            Checkpoint.open(native)
        report = import_checkpoint(saved, native)
        assert report.reused == len(before) and (after < 25 or before)
        assert {name: inodes(native)[name] for name in before} == before
        import_checkpoint(saved, tmp_path / "whole")
        assert_identical(native, tmp_path / "whole")

    def test_a_finished_shard_is_checked(self, saved, tmp_path):
        native = tmp_path / "native"
        self.killed(saved, native, 44)
        first = sorted(native.glob("*.safetensors"))[0]
        first.write_bytes(first.read_bytes()[:-2])
        done = len(inodes(native))
        assert import_checkpoint(saved, native).reused == done - 1
        assert verify_checkpoint(saved, native).differences == {}

    def test_a_whole_file_that_is_another_shard_is_written_anew(self, saved, tmp_path):
        native = tmp_path / "native"
        self.killed(saved, native, 44)
        first, second = sorted(native.glob("*.safetensors"))[:2]
        shutil.copyfile(second, first)
        done = len(inodes(native))
        assert import_checkpoint(saved, native).reused == done - 1
        assert verify_checkpoint(saved, native).differences == {}

    def test_only_the_same_import_goes_on(self, folder, tmp_path):
        native = tmp_path / "native"
        self.killed(folder, native, 25)
        with pytest.raises(CheckpointError, match="another source, or with another --torch-dtype"):
            import_checkpoint(folder, native, dtype=torch.float32)
        first = sorted(folder.glob("*.safetensors"))[0]
        os.utime(first, ns=(1, 1))
        with pytest.raises(CheckpointError, match="another source"):
            import_checkpoint(folder, native)
        assert import_checkpoint(folder, native, overwrite=True).reused == 0
        assert verify_checkpoint(folder, native).differences == {}

    def test_two_imports_at_a_time(self, saved, tmp_path, monkeypatch):
        read = convert.read_as
        inner = []

        def again(*args):
            if not inner:
                inner.append(None)
                with pytest.raises(CheckpointError, match="another import is writing"):
                    import_checkpoint(saved, tmp_path / "native")
            return read(*args)

        monkeypatch.setattr(convert, "read_as", again)
        import_checkpoint(saved, tmp_path / "native")
        assert inner and verify_checkpoint(saved, tmp_path / "native").differences == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_two_shards(tmp_path):
    def peak(function) -> int:
        def status(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        kept = function()
        del kept
        return status("VmHWM") - before

    sizes = {"vocab_size": 40000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    source = save(tmp_path / "hf", layout="text", shard="50MB", **sizes)
    shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert len(list(source.glob("*.safetensors"))) >= 3 and shard > 30e6
    everything = peak(lambda: [tensor.clone() for tensor in from_hf(source).values()])
    assert everything > 2 * shard, "the measure does not see a whole checkpoint"
    assert peak(lambda: import_checkpoint(source, tmp_path / "native")) < 2 * shard
    assert peak(lambda: convert.export_checkpoint(tmp_path / "native", tmp_path / "out")) < 2 * shard
    assert peak(lambda: verify_checkpoint(source, tmp_path / "native")) < 2 * shard
    assert_identical(tmp_path / "out", source)


def load_sharded(rank: int, native: str, store: str) -> None:
    """Row shards of the embedding, column shards of o_proj, the norm whole, on two ranks."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = {k: v for path in Path(native).glob("*.safetensors") for k, v in load_file(path).items()}
    placed = {name: Shard(0) for name in whole}
    placed |= {name: Shard(1) for name in whole if "o_proj" in name or "down_proj" in name}
    state = {name: distribute_tensor(torch.full_like(t, 7), mesh, [placed[name]]) for name, t in whole.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(native))
    for name, tensor in state.items():
        assert isinstance(tensor, DTensor) and torch.equal(tensor.full_tensor(), whole[name]), name
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Of an FP8 source, so that scales stand beside the weights."""
    base = tmp_path_factory.mktemp("dcp")
    import_checkpoint(save_fp8(base / "hf"), base / "native")
    return base / "native"


class TestDistributedCheckpoint:
    def test_plain_tensors(self, native):
        state = {name: torch.zeros_like(tensor) for name, tensor in tensors(native).items()}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(native)))
        source = Checkpoint.open(native.parent / "hf")
        assert all(torch.equal(state[name], source.read(name)) for name in source.names)

    def test_sharded_over_two_ranks(self, native, tmp_path):
        torch.multiprocessing.start_processes(
            load_sharded, (str(native), str(tmp_path / "store")), nprocs=2, start_method="forkserver"
        )


class TestVerify:
    def test_equal(self, saved, tmp_path, capsys):
        import_checkpoint(saved, tmp_path / "native")
        arguments = ["--hf-model", str(saved), "--checkpoint-path", str(tmp_path / "native"), "--no-progress"]
        assert main(["convert", "verify", *arguments]) == 0
        assert "45 tensors compared, all equal, bit for bit; max difference 0" in capsys.readouterr().out

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_in_the_native_dtype(self, saved, tmp_path, dtype):
        import_checkpoint(saved, tmp_path / "native", dtype=dtype)
        assert verify_checkpoint(saved, tmp_path / "native").differences == {}

    def test_one_value_is_found(self, saved, folder, tmp_path, capsys):
        def change(held):
            if "language_model.model.norm.weight" in held:
                held["language_model.model.norm.weight"][5] += 0.5
            return held

        import_checkpoint(saved, tmp_path / "native")
        rewrite(folder, change)
        arguments = ["--hf-model", str(folder), "--checkpoint-path", str(tmp_path / "native"), "--no-progress"]
        assert main(["convert", "verify", *arguments]) == 1
        out = capsys.readouterr().out
        assert "model.language_model.norm.weight: max difference 0.5" in out and "1 differ; max difference 0.5" in out

    def test_a_swapped_name_and_a_transposed_tensor_are_found(self, saved, folder, tmp_path):
        prefix = "language_model.model.layers.0."

        def damage(held):
            keys = [prefix + f"self_attn.{part}_proj.weight" for part in "kv"]
            if all(key in held for key in keys):
                held[keys[0]], held[keys[1]] = held[keys[1]], held[keys[0]]
            name = "vision_tower.transformer.layers.0.attention.q_proj.weight"
            if name in held:
                held[name] = held[name].T.contiguous()
            return held

        import_checkpoint(saved, tmp_path / "native")
        rewrite(folder, damage)
        found = verify_checkpoint(folder, tmp_path / "native").differences
        assert found.keys() == {
            "model.language_model.layers.0.self_attn.k_proj.weight",
            "model.language_model.layers.0.self_attn.v_proj.weight",
            "model.vision_tower.transformer.layers.0.attention.q_proj.weight",
        }

    def test_missing_names_shapes_nan_and_signs(self, saved, folder, tmp_path):
        def damage(held):
            held.pop("language_model.lm_head.weight", None)
            for name, value in (
                ("vision_tower.ln_pre.weight", float("nan")),
                ("multi_modal_projector.norm.weight", -0.0),
            ):
                if name in held:
                    held[name][3] = value
            if (name := "language_model.model.norm.weight") in held:
                held[name] = held[name][1:].clone()
            return held

        def zero(held):
            if (name := "multi_modal_projector.norm.weight") in held:
                held[name][3] = 0.0
            return held

        rewrite(folder, zero)
        import_checkpoint(folder, tmp_path / "native")
        rewrite(folder, damage)
        result = verify_checkpoint(folder, tmp_path / "native")
        assert result.differences == {
            HEAD: "only in the native checkpoint",
            "model.language_model.norm.weight": "is [60], in the Hugging Face checkpoint [59]",
            "model.vision_tower.ln_pre.weight": "max difference inf",
            "model.multi_modal_projector.norm.weight": "zeros of another sign",
        }

    def test_what_is_not_finite_on_both_sides_is_no_difference(self, folder, tmp_path):
        def edit(held, value):
            if (name := "language_model.model.norm.weight") in held:
                held[name][:3] = torch.tensor([float("inf"), float("nan"), value])
            return held

        rewrite(folder, lambda held: edit(held, 1.0))
        import_checkpoint(folder, tmp_path / "native")
        rewrite(folder, lambda held: edit(held, 1.25))
        result = verify_checkpoint(folder, tmp_path / "native")
        assert result.differences == {"model.language_model.norm.weight": "max difference 0.25"}

    def test_fp8_against_its_native_form(self, tmp_path):
        source = save_fp8(tmp_path / "hf", "block")
        import_checkpoint(source, tmp_path / "native")
        assert (tmp_path / "native" / SCALES_FILE).exists()
        assert verify_checkpoint(source, tmp_path / "native").differences == {}
        quantization = json.loads((source / "config.json").read_text())["quantization_config"]
        assert quantization["weight_block_size"] == [BLOCK, BLOCK]
        edit_config(source, quantization_config={**quantization, "weight_block_size": [BLOCK * 2, BLOCK]})
        with pytest.raises(CheckpointError, match="in blocks of"):
            verify_checkpoint(source, tmp_path / "native")


def test_errors_end_the_command_with_2(tmp_path, capsys):
    arguments = ["--hf-model", "/no/where", "--checkpoint-path", str(tmp_path / "native")]
    assert main(["convert", "import", *arguments]) == 2
    assert "m3kernels convert import: folder /no/where does not exist" in capsys.readouterr().err
    assert files.listing(map(str, range(12)), most=2) == "0, 1 and 10 more"
