"""What the ranks of tests/parallel/test_vocab_padding.py run."""

import dataclasses
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_jobs import batches, steps, twin, whole
from torch import Tensor

import m3kernels
from m3kernels.models.ministral3 import Ministral3
from m3kernels.models.ministral3.parallel import parallelize
from m3kernels.models.ministral3.weights import EMBEDDING, HEAD
from m3kernels.parallel import make_mesh
from models import VOCAB, float64_islands, text_batch

PADDED = (EMBEDDING, HEAD)


def unpadded(kind: str, tied: bool, dtype=torch.float64) -> Ministral3:
    """Of 151 ids, which no number of ranks divides."""
    return twin(kind, tied, dtype, vocab_size=VOCAB)


def with_padding(model: Ministral3, multiple: int) -> Ministral3:
    """A copy with rows of zeros."""
    text = dataclasses.replace(model.config.text, pad_vocab_to=multiple)
    copy = Ministral3(dataclasses.replace(model.config, text=text)).to(model.dtype)
    more = text.vocab_rows - text.vocab_size
    state = {n: F.pad(t, (0, 0, 0, more)) if n in PADDED else t for n, t in model.state_dict().items()}
    copy.load_state_dict(state)
    return copy.train(model.training)


def stripped(seen: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """(without rows of padding, whether those were all exactly zero)."""
    made, zero = {}, True
    for key, tensor in seen.items():
        if key.removeprefix("grad ") in PADDED:
            zero = zero and not tensor[VOCAB:].any()
            tensor = tensor[:VOCAB]
        made[key] = tensor
    return made, bool(zero)


def train(kind: str, tied: bool, tp: int, dp: int, multiple: int, patched: bool = False, dtype=torch.float64):
    """(what one process without padding sees, what this rank sees, whether padding stayed zero)."""
    with float64_islands() if dtype == torch.float64 else nullcontext():
        one = unpadded(kind, tied, dtype)
        many = with_padding(one, multiple)
        if patched:
            m3kernels.patch(many)
        if tp * dp > 1:
            parallelize(many, make_mesh(tp, dp, device_type="cpu"))
        share = batches(one, kind, 2, dist.get_rank() // tp, dp)
        seen = steps(many, share)
        batch = {key: value for key, value in share[0].items() if key != "labels"}
        with torch.no_grad():
            seen["logits"] = many.eval()(**batch).logits
            seen["last"] = many(**batch, logits_to_keep=2).logits
        want = steps(one, batches(one, kind, 2))
        with torch.no_grad():
            want["logits"] = one.eval()(**batch).logits
            want["last"] = one(**batch, logits_to_keep=2).logits
        return want, *stripped(seen)


def read_and_save(folder: str, out: str, tp: int, dp: int) -> tuple[dict, bool, int]:
    """(parameters, whether padding is zero, rows of the embedding) of a model read with padding and saved."""
    mesh = make_mesh(tp, dp, device_type="cpu")
    model = Ministral3.from_pretrained(folder, mesh=mesh, pad_vocab_to=8)
    model.save_pretrained(out)
    ids = text_batch(model)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    state, zero = stripped({name: whole(p).detach() for name, p in model.named_parameters()})
    return state | {"logits": logits}, zero, model.get_input_embeddings().weight.shape[0]


def refused_id(tp: int) -> str:
    model = parallelize(with_padding(unpadded("text", False), 4), make_mesh(tp, 1, device_type="cpu"))
    try:
        model(input_ids=torch.tensor([[11, VOCAB]]))
    except IndexError as error:
        return str(error)
    return ""
