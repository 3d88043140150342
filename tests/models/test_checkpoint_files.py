"""Files of a checkpoint: what is refused and how it is named, the Hub, the writer."""

import json
import shutil
import struct
from unittest import mock

import huggingface_hub
import pytest
import torch
from hf_folders import edit_config, fails, rewrite, save
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from m3kernels.models.ministral3 import files
from m3kernels.models.ministral3.files import CheckpointError, Entry, Header, write_safetensors
from m3kernels.models.ministral3.weights import INDEX, Checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The 8B folder, not to be changed."""
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


class TestErrors:
    def test_truncated_and_corrupt_files_are_named(self, folder):
        path = sorted(folder.glob("*.safetensors"))[1]
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        fails(folder, path.name, "truncated")
        path.write_bytes(whole[:5])
        fails(folder, path.name, "truncated")
        path.write_bytes(whole + b"\0")
        fails(folder, path.name, "corrupt")
        path.write_bytes(whole[:8] + b"?" + whole[9:])
        fails(folder, path.name, "corrupt")
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
        fails(folder, path.name, "git lfs pull")

    def test_offsets_that_do_not_fit_shapes(self, tmp_path):
        header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(CheckpointError, match="x.safetensors is corrupt"):
            files.read_header(tmp_path / "x.safetensors")

    def test_other_dtypes_are_named(self, tmp_path):
        save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"x.safetensors holds dtypes other than .*: a \(I64\)"):
            files.read_header(tmp_path / "x.safetensors")

    def test_an_index_that_does_not_fit(self, folder):
        shards = sorted(folder.glob("*.safetensors"))
        index = json.loads((folder / INDEX).read_text())
        name = next(iter(load_file(shards[0])))
        for weight_map, says in (
            ({**index["weight_map"], "ghost.weight": shards[0].name}, f"ghost.weight ({shards[0].name})"),
            ({**index["weight_map"], name: shards[1].name}, f"{name} ({shards[1].name})"),
            ({k: v for k, v in index["weight_map"].items() if k != name}, "does not name: " + name),
            ({**index["weight_map"], name: "../x.safetensors"}, "../x.safetensors"),
            ({}, "no weight_map"),
        ):
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
            fails(folder, says)
        (folder / INDEX).write_text("{")
        fails(folder, "no valid JSON")
        (folder / INDEX).write_text(json.dumps(index))
        shards[2].unlink()
        fails(folder, "lacks files that its index names: " + shards[2].name)
        (folder / INDEX).unlink()
        fails(folder, "no " + INDEX, shards[0].name)

    def test_pickles_are_refused_by_name(self, folder):
        for path in [*folder.glob("*.safetensors"), folder / INDEX]:
            path.unlink()
        fails(folder, "no checkpoint")
        (folder / "consolidated.safetensors").touch()
        fails(folder, "Mistral's own format")
        torch.save({}, folder / "pytorch_model.bin")
        fails(folder, "pytorch_model.bin", "pickles can run code")

    def test_two_truths_are_refused(self, folder):
        shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder / "model.safetensors")
        fails(folder, "both model.safetensors and " + INDEX)

    def test_two_names_for_one_tensor(self, folder):
        name = "vision_tower.ln_pre.weight"
        rewrite(folder, lambda held: {**held, **{"model." + k: v.clone() for k, v in held.items() if k == name}})
        fails(folder, name, "are both model." + name)

    def test_pieces_of_a_distributed_save(self, folder):
        path = sorted(folder.glob("*.safetensors"))[0]
        save_file(load_file(path), path, metadata={"DCP_SHARDING_INFO": "{}"})
        fails(folder, path.name, "consolidate_safetensors_files_on_every_rank")
        from torch.distributed.checkpoint import _consolidate_hf_safetensors as hf

        assert hasattr(hf, "consolidate_safetensors_files_on_every_rank")

    def test_other_models(self, folder):
        edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})
        fails(folder, "'compressed-tensors'", "allowed: 'fp8'")
        edit_config(folder, text_config={"model_type": "mistral"}, quantization_config=None)
        fails(folder, "text 'mistral'", "allowed: 'mistral3'")
        edit_config(folder, model_type="llama")
        fails(folder, "model_type 'llama'")
        (folder / "config.json").unlink()
        fails(folder, "has no config.json")

    def test_a_config_that_transformers_refuses(self, folder):
        edit_config(folder, text_config={"model_type": "ministral3", "hidden_size": "wide"})
        fails(folder, "transformers cannot build a model", check=True)


class TestHub:
    @pytest.fixture(autouse=True)
    def nobody(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def answers(self, monkeypatch, error):
        def download(name, **options):
            assert "*.bin" not in options["allow_patterns"] and "consolidated*" in options["ignore_patterns"]
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    @staticmethod
    def response(kind, status):
        return kind("no", response=mock.MagicMock(status_code=status, headers={}))

    @pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c", "nowhere"])
    def test_a_folder_that_does_not_exist(self, path):
        fails(path, "does not exist", "OWNER/NAME")

    def test_a_file_is_no_folder(self, folder):
        fails(folder / "config.json", "is a file")

    def test_offline(self, monkeypatch):
        self.answers(monkeypatch, errors.LocalEntryNotFoundError("no"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        fails("some/model", "no local folder some/model", "HF_HUB_OFFLINE is set", "HF_HOME", "give a local folder")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        fails("some/model", "the Hub was not reached")

    def test_offline_for_real(self, monkeypatch, tmp_path):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        fails("some/model-of-nobody", "HF_HUB_OFFLINE is set", str(tmp_path))

    def test_no_token_and_no_access(self, monkeypatch):
        self.answers(monkeypatch, self.response(errors.RepositoryNotFoundError, 401))
        fails("some/model", "does not exist, or is not visible", "no token is set: export HF_TOKEN")
        self.answers(monkeypatch, self.response(errors.GatedRepoError, 403))
        fails("some/model", "it is gated", "no token is set")
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
        fails("some/model", "it is gated", "accept the licence on https://huggingface.co/some/model")
        self.answers(monkeypatch, self.response(errors.RevisionNotFoundError, 404))
        fails("some/model", "no revision")

    def test_an_id_is_downloaded(self, monkeypatch, saved):
        asked = {}

        def download(name, **options):
            asked.update(options, name=name)
            return str(saved)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        checkpoint = Checkpoint.open("some/model", revision="main", token="hf_y")
        assert checkpoint.check() and (asked["name"], asked["revision"], asked["token"]) == (
            "some/model",
            "main",
            "hf_y",
        )

    def test_a_revision_of_a_local_folder(self, saved):
        with pytest.raises(CheckpointError, match="leave it out"):
            Checkpoint.open(saved, revision="main")


class TestWriter:
    @given(
        shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
        dtypes=st.lists(st.sampled_from(list(files.CODES)), min_size=6, max_size=6),
        metadata=st.sampled_from([None, {"format": "pt"}, {"format": "pt, é"}]),
    )
    @settings(max_examples=60, deadline=None)
    def test_bytes_are_those_of_safetensors(self, tmp_path_factory, shapes, dtypes, metadata):
        folder = tmp_path_factory.mktemp("writer")
        held = {f"x{i * 7 % 10}.{i}": torch.randn(shape).to(dtypes[i]) for i, shape in enumerate(shapes)}
        save_file(held, folder / "theirs", metadata=metadata)
        codes = {name: files.CODES[tensor.dtype] for name, tensor in held.items()}
        order = files.file_order(held, codes)
        header = Header({name: Entry(codes[name], tuple(held[name].shape)) for name in order}, metadata)
        write_safetensors(folder / "ours", header, ((name, held[name]) for name in order))
        assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
        assert files.read_header(folder / "ours") == header
        assert list(files.read_header(folder / "ours").entries) == order

    @pytest.mark.parametrize(
        ("given_tensors", "says"),
        [
            ([("b", torch.zeros(2))], "planned: a"),
            ([("a", torch.zeros(3))], "planned: a"),
            ([("a", torch.zeros(2, dtype=torch.float16))], "planned: a"),
            ([], "no tensor came for a"),
            ([("a", torch.zeros(2)), ("c", torch.zeros(2))], "planned: None"),
        ],
    )
    def test_a_plan_that_is_not_kept_leaves_no_file(self, tmp_path, given_tensors, says):
        with pytest.raises(CheckpointError, match=says):
            write_safetensors(tmp_path / "x.safetensors", Header({"a": Entry("F32", (2,))}), given_tensors)
        assert not (tmp_path / "x.safetensors").exists()
