"""Who computes attention: every backend, what it cannot do, and which one is the fastest for a case on this GPU.

A backend's forward gives (out, lse) and its backward takes them, lse being the natural log-sum-exp (B, H, S) in fp32: so the
two directions are chosen apart. What cannot do a case exactly is never chosen. The order among the others is measured:
``attention_table.json`` comes from ``python -m m3kernels.bench.attention_grid``.
"""

import functools
import importlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from m3kernels.ops import _attention_triton as own
from m3kernels.ops._attention_triton import Problem, dense
from m3kernels.ops._triton import INTERPRET

aten = torch.ops.aten
# the Triton whose Gluon the Hopper kernels are written in
GLUON_OF = "3.6."
# cuDNN builds a plan for every new shape, 25 to 40 ms of host work: a shape must come back this often to be worth one
# (a 26-layer model asks for its shape 26 times in one forward)
CUDNN_AFTER = 32


@dataclass(frozen=True)
class Backend:
    """One library's attention.

    Attributes:
        missing: why it cannot run on a device at all, or an empty string.
        cannot: ``(direction, q, k, problem)``, why it cannot compute that exactly, or an empty string.
    """

    name: str
    missing: Callable[[torch.device], str]
    cannot: Callable[[str, Tensor, Tensor, Problem], str]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _seq_first(problem: Problem, *tensors: Tensor) -> list[Tensor]:
    """(B, H, S, D) as the flash libraries take it: (B, S, H, D), or (rows, H, D) where packed."""
    swapped = [dense(t).transpose(1, 2) for t in tensors]
    return [t[0] for t in swapped] if problem.packed else swapped


def _heads_first(problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple((t[None] if problem.packed else t).transpose(1, 2) for t in tensors)


def _sides(problem: Problem) -> dict[str, int | None]:
    """A window of w as the flash libraries say it: keys to the left and right of a query's own."""
    left, right = (problem.window - 1, 0) if problem.window else (None, None)
    return {"window_size_left": left, "window_size_right": right}


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else (0, 0)


def _always(*_) -> str:
    return ""


def _flash_cannot(direction: str, q: Tensor, k: Tensor, problem: Problem) -> str:
    """What FlashAttention 2, 3 and 4 have in common."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} is not bf16 or fp16"
    if q.shape[3] % 8:
        return f"head_dim {q.shape[3]} is not a multiple of 8"
    if problem.ranges is not None:
        return "key ranges by value"
    if problem.packed and problem.cu_q is not problem.cu_k:
        return "packed keys of other lengths than the queries"  # queries that see nothing are told apart by ours only
    if not problem.packed and problem.causal and q.shape[2] > k.shape[2]:
        return "causal queries that see nothing"
    return ""


def _torch_flash_missing(device: torch.device) -> str:
    if _capability(device) < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or later"
    return "" if torch.backends.cuda.is_flash_attention_available() else "PyTorch was built without FlashAttention"


def _torch_flash_cannot(direction: str, q: Tensor, k: Tensor, problem: Problem) -> str:
    if direction == "backward" and problem.deterministic:
        return "gradients by atomics"
    return _flash_cannot(direction, q, k, problem)


def _torch_flash_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem):
    out, lse, *_ = aten._flash_attention_forward(
        *_seq_first(problem, q, k, v),
        *(problem.cu_q, problem.cu_k, problem.longest_q, problem.longest_k, 0.0, problem.causal, False),
        scale=problem.scale,
        **_sides(problem),
    )
    return *_heads_first(problem, out), lse[None] if problem.packed else lse


def _torch_flash_backward(dout, q, k, v, out, lse, problem: Problem):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    dout, q, k, v, out = _seq_first(problem, dout, q, k, v, out)
    grads = aten._flash_attention_backward(
        *(dout, q, k, v, out, lse[0] if problem.packed else lse),
        *(problem.cu_q, problem.cu_k, problem.longest_q, problem.longest_k, 0.0, problem.causal, *no_dropout),
        scale=problem.scale,
        **_sides(problem),
    )
    return _heads_first(problem, *grads)


def _cudnn_missing(device: torch.device) -> str:
    if _capability(device) < (9, 0):
        return "used on compute capability 9.0 or later"
    return "" if torch.backends.cudnn.is_available() else "PyTorch was built without cuDNN"


def _cudnn_cannot(direction: str, q: Tensor, k: Tensor, problem: Problem) -> str:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} is not bf16 or fp16"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"head_dim {q.shape[3]} is not a multiple of 8 up to 128"
    if problem.packed or problem.ranges is not None or problem.window:
        return "packed, windowed or by key ranges"
    if problem.causal and q.shape[2] != k.shape[2]:
        return "its causal mask puts the first query beside the first key"
    if q.shape[2] == 1:
        return "one query"
    return "gradients by atomics" if direction == "backward" and problem.deterministic else ""


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem):
    q, k, v = dense(q), dense(k), dense(v)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, problem.causal, False, scale=problem.scale
    )
    return out, lse[..., 0]


def _cudnn_backward(dout, q, k, v, out, lse, problem: Problem):
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    dout, q, k, v, out = map(dense, (dout, q, k, v, out))
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(dout, q, k, v, out, lse[..., None], no_dropout, no_dropout, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, problem.causal),
        scale=problem.scale,
    )


@functools.cache
def _fa4():
    return importlib.import_module("flash_attn.cute.interface")


@functools.cache
def _fa4_missing(device: torch.device) -> str:
    if _capability(device)[0] not in (9, 10):
        return "used on compute capability 9.x and 10.x"
    try:
        interface = _fa4()
    except Exception as error:  # a package of JIT compilers can fail in many ways while it is imported
        return f"flash-attn-4 is not installed ({type(error).__name__}: {error})"
    needed = {"softmax_scale", "causal", "cu_seqlens_q", "max_seqlen_q", "window_size_left"}
    known = all(
        needed <= set(inspect.signature(getattr(interface, name, lambda: 0)).parameters)
        for name in ("_flash_attn_fwd", "_flash_attn_bwd")
    )
    return "" if known else "this flash-attn-4 has another interface than 4.0.0b36"


def _fa4_cannot(direction: str, q: Tensor, k: Tensor, problem: Problem) -> str:
    if q.shape[3] > 128:
        return "measured up to head_dim 128"
    return _flash_cannot(direction, q, k, problem)


def _fa4_options(problem: Problem) -> dict:
    options = {"softmax_scale": problem.scale, "causal": problem.causal, **_sides(problem)}
    if problem.packed:
        options |= {"cu_seqlens_q": problem.cu_q, "cu_seqlens_k": problem.cu_k}
        options |= {"max_seqlen_q": problem.longest_q, "max_seqlen_k": problem.longest_k}
    return options


def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem):
    out, lse, *_ = _fa4()._flash_attn_fwd(*_seq_first(problem, q, k, v), return_lse=True, **_fa4_options(problem))
    return *_heads_first(problem, out), lse[None] if problem.packed else lse


def _fa4_backward(dout, q, k, v, out, lse, problem: Problem):
    dout, q, k, v, out = _seq_first(problem, dout, q, k, v, out)
    grads = _fa4()._flash_attn_bwd(
        *(q, k, v, out, dout, lse[0] if problem.packed else lse),
        deterministic=problem.deterministic,
        **_fa4_options(problem),
    )
    return _heads_first(problem, *grads[:3])


@functools.cache
def _hopper(direction: str):
    return importlib.import_module(f"m3kernels.ops._attention_hopper_{direction}")


@functools.cache
def _hopper_missing(device: torch.device) -> str:
    if _capability(device) != (9, 0):
        return "written for compute capability 9.0"
    if not version("triton").startswith(GLUON_OF):
        return f"Gluon changes between releases: written for triton {GLUON_OF}x"
    try:
        _hopper("fwd"), _hopper("bwd")
    except Exception as error:
        return f"Gluon cannot be imported ({type(error).__name__}: {error})"
    return ""


def _hopper_cannot(direction: str, q: Tensor, k: Tensor, problem: Problem) -> str:
    dims = (64, 128) if direction == "forward" else (128,)
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] not in dims:
        return f"takes bf16 and fp16 at head_dim {' and '.join(map(str, dims))}, not {q.dtype} at {q.shape[3]}"
    if problem.ranges is not None:
        return "key ranges by value"
    return "gradients by atomics" if direction == "backward" and problem.deterministic else ""


BACKENDS = {
    b.name: b
    for b in (
        Backend("triton", _always, _always, own.forward, own.backward),
        Backend(
            "hopper",
            _hopper_missing,
            _hopper_cannot,
            lambda *given: _hopper("fwd").forward(*given),
            lambda *given: _hopper("bwd").backward(*given),
        ),
        Backend("fa4", _fa4_missing, _fa4_cannot, _fa4_forward, _fa4_backward),
        Backend("flash", _torch_flash_missing, _torch_flash_cannot, _torch_flash_forward, _torch_flash_backward),
        Backend("cudnn", _cudnn_missing, _cudnn_cannot, _cudnn_forward, _cudnn_backward),
    )
}
# where nothing was measured: by generation
UNMEASURED = ("fa4", "hopper", "cudnn", "triton", "flash")


def mask_kind(problem: Problem) -> str:
    if problem.ranges is not None:
        return "ranges"
    kind = "window" if problem.window else "causal" if problem.causal else "full"
    return f"packed {kind}" if problem.packed else kind


@functools.cache
def table() -> list[dict]:
    """Rows of measured orders: capability, mask, head_dim, seq, and backends fastest first for each direction."""
    return json.loads(Path(__file__).with_name("attention_table.json").read_text())


@functools.lru_cache(maxsize=4096)
def ranking(direction: str, capability: str, mask: str, head_dim: int, seq: int) -> tuple[str, ...]:
    """Backends, fastest first, as measured for the same mask and head_dim at the nearest length."""
    rows = [r for r in table() if (r["capability"], r["mask"], r["head_dim"]) == (capability, mask, head_dim)]
    if not rows:
        return UNMEASURED
    nearest = min(rows, key=lambda r: abs(_log2(r["seq"]) - _log2(seq)))
    return (*nearest[direction], *(b for b in UNMEASURED if b not in nearest[direction]))


def _log2(n: int) -> int:
    return max(1, n).bit_length()


_asked_of_cudnn: Counter = Counter()


def _unsettled(direction: str, q: Tensor, k: Tensor, problem: Problem) -> bool:
    """Whether this shape has not come back often enough for a plan of cuDNN's; every ask counts."""
    if len(_asked_of_cudnn) > 1024:
        _asked_of_cudnn.clear()
    key = (direction, q.shape, k.shape, q.stride(), k.stride(), q.dtype, problem.causal)
    _asked_of_cudnn[key] += 1
    return _asked_of_cudnn[key] <= CUDNN_AFTER


def _candidates(
    direction: str, device: torch.device, q: Tensor, k: Tensor, problem: Problem
) -> Iterator[tuple[Backend, str]]:
    """(backend, why it cannot compute this there, or an empty string), in the measured order."""
    capability = "{}.{}".format(*_capability(device))
    for name in ranking(direction, capability, mask_kind(problem), q.shape[3], problem.longest_k):
        yield BACKENDS[name], BACKENDS[name].missing(device) or BACKENDS[name].cannot(direction, q, k, problem)


def choose(direction: str, asked: str, q: Tensor, k: Tensor, problem: Problem) -> Backend:
    """The backend of one call.

    Raises:
        ValueError: the one that was asked for cannot do it.
    """
    if asked != "auto":
        backend = BACKENDS[asked]
        if reason := backend.missing(q.device) or backend.cannot(direction, q, k, problem):
            raise ValueError(f"attention ({direction}): backend={asked!r} cannot do this: {reason}; use backend='auto'")
        return backend
    if INTERPRET or q.dtype == torch.float32 or problem.ranges is not None:
        return BACKENDS["triton"]
    for backend, reason in _candidates(direction, q.device, q, k, problem):
        if not reason and not (backend.name == "cudnn" and _unsettled(direction, q, k, problem)):
            return backend
    return BACKENDS["triton"]


# shape classes that a report tells apart: (name, query shape, masks); 4096 tokens, heads as in the 3B
CLASSES = (
    ("causal", (1, 32, 4096, 128), {"causal": True}),
    ("window", (1, 32, 4096, 128), {"causal": True, "window": 4096}),
    ("packed", (1, 32, 4096, 128), {"causal": True, "packed": True}),
    ("images", (1, 16, 4096, 64), {"packed": True}),
)


def explain(device: torch.device, dtype: torch.dtype) -> list[str]:
    """For each shape class, which backend computes it on a device, and why those that are faster do not."""
    lines = []
    for name, shape, masks in CLASSES:
        q = torch.empty(shape, dtype=dtype, device="meta")
        cu = torch.empty(9, dtype=torch.int32, device="meta") if masks.get("packed") else None
        flags = torch.are_deterministic_algorithms_enabled()
        problem = Problem(
            cu, cu, None, shape[2], shape[2], masks.get("causal", False), masks.get("window", 0), 1.0, flags
        )
        said = []
        for direction in ("forward", "backward"):
            why = []
            for backend, reason in _candidates(direction, device, q, q, problem):
                if not reason:
                    settled = f" (from call {CUDNN_AFTER + 1} of a shape on)" if backend.name == "cudnn" else ""
                    said.append(f"{direction} {backend.name}{settled}" + (f" [{'; '.join(why)}]" if why else ""))
                    break
                why.append(f"{backend.name}: {reason}")
        lines.append(f"{name}: {', '.join(said)}")
    return [*lines, "padding, static caches: triton", "up to 16 new tokens: triton (split along the keys)"]
