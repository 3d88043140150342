"""What the ranks of tests/parallel/test_save_sharded.py run."""

import contextlib
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model_jobs import batches, whole
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from m3kernels.models.ministral3 import Ministral3, convert
from m3kernels.models.ministral3.weights import disk_name
from m3kernels.parallel import make_mesh


def trained(folder: str, tp: int, dp: int, replicate: int = 1, dtype=None) -> Ministral3:
    """Read into shards, after a step: FSDP2 leaves parameters gathered where a forward was the last thing."""

    def prepare(model: Ministral3) -> None:
        # a frozen tower is no DTensor where only FSDP2 shards
        if replicate > 1:
            model.model.vision_tower.requires_grad_(False)
            model.model.multi_modal_projector.requires_grad_(False)

    mesh = make_mesh(tp, dp, replicate, device_type="cpu")
    model = Ministral3.from_pretrained(folder, dtype=dtype, mesh=mesh, prepare=prepare).train()
    ranks = dp * replicate
    (batch,) = batches(model, "text", 1, dist.get_rank() // tp, ranks)
    model(**batch).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"])
    return model


def parameters(model: Ministral3) -> dict[str, Tensor]:
    state = {name: whole(tensor).detach() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name in dict(model.named_parameters())}


def save(folder: str, out: str, tp: int, dp: int, replicate: int = 1, **options) -> tuple[dict, int, bool]:
    """(parameters, tensors in the report, whether the folder is there on return)."""
    model = trained(folder, tp, dp, replicate)
    report = model.save_pretrained(out, **options)
    return parameters(model), report.tensors, (Path(out) / "config.json").exists()


def save_with_reference(folder: str, out: str, tp: int, dp: int) -> tuple[dict, int, bool]:
    return save(folder, out, tp, dp, hf_model=folder)


def fails(folder: str, out: str, tp: int, dp: int, how: str) -> tuple[str, str]:
    """(type, message) of what each rank sees, after which they still work together."""
    model = trained(folder, tp, dp)
    options = {}
    if how == "full":
        write = convert.write_safetensors
        patch = mock.patch.object(
            convert, "write_safetensors", lambda path, header, tensors: write(path, header, cut(tensors))
        )
    elif how == "range":
        with torch.no_grad():
            model.lm_head.weight.to_local().fill_(1e6)
        patch, options = contextlib.nullcontext(), {"dtype": torch.float16}
    else:
        patch = contextlib.nullcontext()
    with patch:
        try:
            model.save_pretrained(out, **options)
        except Exception as error:
            said = type(error).__name__, str(error)
        else:
            said = "", ""
    dist.barrier()
    return said


def cut(tensors):
    for count, item in enumerate(tensors):
        if count == 5:
            raise OSError(28, "No space left on device")
        yield item


def most_gathered(folder: str, out: str, tp: int, dp: int) -> int:
    """How many whole tensors are alive at once while a sharded model is saved."""
    model = trained(folder, tp, dp)
    alive, most = weakref.WeakSet(), 0
    gather = DTensor.full_tensor

    def counted(self, **options):
        nonlocal most
        made = gather(self, **options)
        # what is whole on every rank comes as it lies
        if made.data_ptr() != self.to_local().data_ptr():
            alive.add(Kept(made))
        # gloo's thread may hold the last one for a moment longer; what the writer holds it holds until this returns
        deadline = time.monotonic() + 2
        while len(alive) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        most = max(most, len(alive))
        return made

    class Kept:
        """Lives as long as the tensor's memory."""

        def __init__(self, tensor: Tensor):
            tensor.untyped_storage()._kept = self

    with mock.patch.object(DTensor, "full_tensor", counted):
        model.save_pretrained(out)
    return most


def save_hf_dcp(folder: str, out: str, tp: int, dp: int) -> dict:
    """torch's own writer of Hugging Face files, one piece a rank, joined at the end."""
    model = trained(folder, tp, dp)
    tied = model.config.tied
    names = {name: disk_name(name, False) for name in model.state_dict() if not (tied and name == "lm_head.weight")}
    state = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    index = {name: 1 + i % 2 for i, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(out, index, save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer)
    return parameters(model)


def load_native(folder: str, native: str, tp: int, dp: int) -> dict:
    """A folder of `m3kernels convert import` through torch's reader, over zeros."""
    model = Ministral3.from_pretrained(folder, mesh=make_mesh(tp, dp, device_type="cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = model.state_dict()
    if model.config.tied:
        del state["lm_head.weight"]
    dcp.load(state, storage_reader=HuggingFaceStorageReader(native))
    return {name: whole(p).detach() for name, p in model.named_parameters()}


def state_of(model: Ministral3, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {
        f"{name} {key}": whole(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return moments | parameters(model)


def stepped(folder: str, tp: int, dp: int, seed: int) -> tuple[Ministral3, torch.optim.Optimizer]:
    mesh = make_mesh(tp, dp, device_type="cpu")
    model = Ministral3.from_pretrained(folder, mesh=mesh).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    (batch,) = batches(model, "vlm", 1, dist.get_rank() // tp, dp)
    (seed * model(**batch).loss).backward()
    optimizer.step()
    return model, optimizer


def save_run(folder: str, checkpoint: str, tp: int, dp: int) -> dict[str, Tensor]:
    """As docs/checkpoints.md has it."""
    model, optimizer = stepped(folder, tp, dp, 1)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    return state_of(model, optimizer)


def load_run(folder: str, checkpoint: str, tp: int, dp: int) -> dict[str, Tensor]:
    """Over another state."""
    model, optimizer = stepped(folder, tp, dp, 2)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state_of(model, optimizer)
