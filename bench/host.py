"""Host overhead: Python time of one op call and of one patched decoder layer, beside the peers'.

    python -m m3kernels.bench.host [--peers NAME ...] [--quick] [--out FILE.jsonl]

Inputs are so small that the GPU is done before the host is: what is timed is the time to issue the work, which short
sequences, decoding and small batches pay in full. Needs a CUDA GPU; without one it says so and exits 2.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from m3kernels.bench import measure, peers, train_peers
from m3kernels.bench.cases import OPS
from m3kernels.bench.model_shapes import Size, build
from m3kernels.bench.spec import Shape

FORWARD, BOTH = "forward", "forward+backward"
LAYER = "decoder layer"
SMALL = Size(layers=1, hidden=256, intermediate=512, heads=4, kv_heads=2, vocab=1024)
LAYER_PEERS = ("hf", "hf+liger", peers.OURS)
# small enough for a few microseconds of GPU time a kernel
SHAPES: dict[str, Shape] = {
    "rms_norm": {"rows": 16, "width": 1024},
    "add_rms_norm": {"rows": 16, "width": 1024},
    "rotary": {
        "batch": 1,
        "seq": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 128,
        "first": 0,
        "llama4": (0.1, 16384),
    },
    "swiglu": {"rows": 16, "width": 1024},
    "linear_cross_entropy": {"tokens": 16, "vocab": 1024, "hidden": 256, "trained": True},
    "lora_linear": {"rows": 16, "width": 1024, "out": 1024, "rank": 16, "dora": False},
}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_us(run: Callable[[], object], calls: int, batches: int) -> list[float]:
    """Microseconds of host time a call, one value a batch; the queue is empty when a batch begins."""
    for _ in range(10):
        run()
    found = []
    for _ in range(batches):
        _wait()
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        found.append(1e6 * (time.perf_counter() - begun) / calls)
    _wait()
    return found


def _forward_and_backward(forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]) -> Callable[[], object]:
    grads = [torch.ones_like(out) for out in forward()]
    return lambda: torch.autograd.grad(forward(), leaves, grads)


def op_trials(op: str, build: peers.Builder, device: torch.device) -> dict[str, Callable[[], object]]:
    """One op as one peer does it: forward while gradients are wanted, and forward with backward."""
    shape, generator = SHAPES[op], torch.Generator(device).manual_seed(1)
    wrt = OPS[op].wrt(shape)
    inputs = OPS[op].inputs(shape, device, generator)
    inputs = {name: t.requires_grad_(name in wrt) if t.is_floating_point() else t for name, t in inputs.items()}
    function = build(shape, inputs)
    leaves = [inputs[name] for name in wrt]
    return {FORWARD: lambda: function(inputs), BOTH: _forward_and_backward(lambda: function(inputs), leaves)}


def layer_trials(model: nn.Module, device: torch.device) -> dict[str, Callable[[], object]]:
    """One decoder layer of a small model as it stands, patched or not, on 16 tokens."""
    layer = model.model.layers[0]
    hidden = torch.randn(1, 16, model.config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(16, device=device)[None]
    with torch.no_grad():
        table = model.model.rotary_emb(hidden, positions)
    leaves = [hidden, *(p for p in layer.parameters())]

    def forward() -> tuple[Tensor, ...]:
        return (layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=table),)

    return {FORWARD: forward, BOTH: _forward_and_backward(forward, leaves)}


def small_model(device: torch.device) -> nn.Module:
    """One layer of the real structure, small; random weights."""
    return build(SMALL, "text", device).train()


def _row(what: str, peer: str, which: str, samples: list[float]) -> dict:
    stats = measure.Stats.of(samples)
    row = {"kind": "host", "what": what, "pass": which, "peer": peer, "status": "ok", "reason": ""}
    return row | {"us": stats.median, "p20": stats.p20, "p80": stats.p80, "samples": stats.samples}


def _failed(what: str, peer: str, which: str, error: Exception) -> dict:
    status = "missing" if isinstance(error, ImportError) else "failed"
    row = {"kind": "host", "what": what, "pass": which, "peer": peer, "status": status, "reason": measure.reason(error)}
    return row | {"us": None, "p20": None, "p80": None, "samples": 0}


def _sample(found: dict[str, list[float] | Exception], once: Callable[[str], list[float]]) -> None:
    """One turn of every peer that has not failed yet."""
    for peer, samples in found.items():
        if not isinstance(samples, Exception):
            try:
                samples += once(peer)
            except Exception as error:  # a peer's failure is a result, not the end of the run
                found[peer] = error


def _rows(what: str, which: str, found: dict[str, list[float] | Exception]) -> Iterator[dict]:
    for peer, samples in found.items():
        make = _failed if isinstance(samples, Exception) else _row
        yield make(what, peer, which, samples)


def _interleaved(what: str, trials: dict[str, dict[str, Callable]], rounds: int, calls: int) -> Iterator[dict]:
    for which in (FORWARD, BOTH):
        found: dict[str, list[float] | Exception] = {peer: [] for peer in trials}
        for _ in range(rounds):
            _sample(found, lambda peer, which=which: host_us(trials[peer][which], calls, 3))
        yield from _rows(what, which, found)


def bench_host(device: torch.device, quick: bool, chosen: tuple[str, ...]) -> Iterator[dict]:
    """Rows of every op and of the decoder layer; a peer that cannot run gives its reason."""
    rounds, calls = (3, 50) if quick else (7, 100)
    for op in SHAPES:
        trials = {}
        for peer in peers.ORDER:
            build = peers.PEERS[op].get(peer)
            # compiled functions have guards of their own, a cost of calling them and not of the op
            if build is None or peer not in (*chosen, "eager") or "compile" in peer:
                continue
            try:
                trials[peer] = op_trials(op, build, device)
                host_us(trials[peer][BOTH], 2, 1)
            except Exception as error:  # a peer's failure is a result, not the end of the run
                trials.pop(peer, None)
                for which in (FORWARD, BOTH):
                    yield _failed(op, peer, which, error)
        yield from _interleaved(op, trials, rounds, calls)
    yield from bench_layer(device, rounds, calls // 2, chosen)


def bench_layer(device: torch.device, rounds: int, calls: int, chosen: tuple[str, ...]) -> Iterator[dict]:
    """One model, made each peer's in turn; what a peer cannot do is its row."""
    model = small_model(device)
    for which in (FORWARD, BOTH):
        found: dict[str, list[float] | Exception] = {peer: [] for peer in LAYER_PEERS if peer in (*chosen, "hf")}

        def once(peer: str, which: str = which) -> list[float]:
            with train_peers.become(model, train_peers.PEERS[peer]):
                return host_us(layer_trials(model, device)[which], calls, 3)

        for _ in range(rounds):
            _sample(found, once)
        yield from _rows(LAYER, which, found)


def show(row: dict) -> str:
    head = f"host {row['what']:<22} {row['pass']:<18} {row['peer']:<14}"
    if row["us"] is None:
        return f"{head} {row['status']}: {row['reason']}"
    return f"{head} {row['us']:7.1f} us  ({row['p20']:.1f} to {row['p80']:.1f})"


if __name__ == "__main__":
    from m3kernels.bench.run import main_of

    sys.exit(main_of("host"))
