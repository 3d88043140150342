"""What every op shares: the choice of a backend, guarded launches, and one registration for eager and compiled calls."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from m3kernels.ops._triton import HAS_TRITON, INTERPRET, knobs

BACKENDS = ("auto", "triton", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)


# ops that DTensors may go through; m3kernels.parallel adds those whose sharding it registers
sharded_ops: set[str] = set()


class KernelLaunchError(RuntimeError):
    """A Triton kernel failed to compile or to launch; the message names the op and the shapes."""


def use_triton(op: str, backend: str, *tensors: Tensor, inductor_fuses: bool = False) -> bool:
    """Whether a call takes the kernel. ``auto`` does on CUDA/ROCm (anywhere under ``TRITON_INTERPRET=1``) in fp32, bf16, fp16.

    With ``inductor_fuses`` it does not while ``torch.compile`` traces inference: Inductor fuses the plain PyTorch form with
    its neighbours, which a kernel of its own, opaque to it, prevents (decoding a token: docs/performance.md).

    Raises:
        ValueError: unknown backend, tensors on different devices, or ``triton`` asked for where it cannot run.
        TypeError: a tensor that is not floating point; a DTensor where the op's sharding is not registered, or beside
            plain tensors.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    device = tensors[0].device
    for t in tensors:
        if t.dtype in TRITON_DTYPES and type(t) in PLAIN and t.device == device:
            continue
        if t.device != device:
            found = ", ".join(str(t.device) for t in tensors)
            raise ValueError(f"{op}: all tensors must be on one device, got {found}; move them with .to({device})")
        if not t.is_floating_point() or t.dtype.itemsize < 2:
            raise TypeError(
                f"{op}: needs floating-point tensors of 16 bits or more, got {t.dtype}; dequantise it first"
            )
        if type(t).__name__ == "DTensor":
            check_dtensors(op, *tensors)
    if backend == "reference":
        return False
    if backend == "auto" and inductor_fuses and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return False
    why_not = why_no_triton(device.type) or next(
        (f"{t.dtype} is not one of fp32, bf16, fp16" for t in tensors if t.dtype not in TRITON_DTYPES), ""
    )
    if backend == "triton" and why_not:
        raise ValueError(f"{op}: backend='triton' cannot run here: {why_not}; use backend='auto' or 'reference'")
    return not why_not


def is_dtensor(t: Tensor) -> bool:
    """By name: the module of DTensor is not imported where nobody uses one."""
    return type(t).__name__ == "DTensor"


def check_dtensors(op: str, *tensors: Tensor) -> None:
    """Refuses DTensors that ``op`` has no sharding for, and those beside plain tensors."""
    if op not in sharded_ops:
        raise TypeError(
            f"{op}: DTensor is not supported; pass the local shard (tensor.to_local()). "
            "import m3kernels.parallel registers how rms_norm, add_rms_norm, rotary, rotary_2d and swiglu are sharded"
        )
    if not all(map(is_dtensor, tensors)):
        raise TypeError(
            f"{op}: DTensors and plain tensors do not mix; distribute the plain ones: "
            "distribute_tensor(t, mesh, [Replicate()])"
        )


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv`` in plain Python: Triton's own costs microseconds a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, for ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """(..., width) as (rows, width) with unit stride in the last dimension; copies only what cannot be addressed."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def why_no_triton(device_type: str) -> str:
    if not HAS_TRITON:
        return "triton is not installed (pip install 'triton>=3.6')"
    if device_type != "cuda" and not INTERPRET:
        return f"tensors are on {device_type}; kernels run on cuda (or anywhere with TRITON_INTERPRET=1)"
    return ""


def launch(op: str, kernel, grid: tuple[int, ...], *args, **meta) -> tuple | None:
    """Launch ``kernel`` on the device of its first tensor; a failure names the op and the shapes.

    ``args`` are the kernel's arguments up to its constexprs, ``meta`` the constexprs in their order, and launch options.
    Returns the compiled kernel and its constexprs' values where it was launched by itself.
    """
    first = next(a for a in args if isinstance(a, Tensor))
    try:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return _run(kernel, grid, args, meta)
        return _run(kernel, grid, args, meta)
    except Exception as error:
        raise launch_failed(op, args, grid, error) from error


def launch_failed(op: str, args: Sequence, grid: tuple[int, ...], error: Exception) -> KernelLaunchError:
    tensors = [a for a in args if isinstance(a, Tensor)]
    shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
    return KernelLaunchError(f"{op}: kernel launch failed on {tensors[0].device} for {shapes}, grid {grid}: {error}")


# the release whose compiled kernels' own interface is known here
LAUNCHES_OF = "3.6."
NO_HOOKS = (None, None)
_compiled: dict[tuple, tuple] = {}


@cache
def _launches_directly() -> bool:
    if INTERPRET or not HAS_TRITON or not torch.cuda.is_available() or torch.version.hip:
        return False
    return version("triton").startswith(LAUNCHES_OF)


def launch_hooks() -> tuple:
    """A profiler's hooks, or ``NO_HOOKS``: Triton's own chains would be called at every launch, empty as they are."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else NO_HOOKS


def _run(kernel, grid: tuple[int, ...], args: tuple, meta: dict) -> tuple | None:
    """``kernel[grid](*args, **meta)``; a call that is compiled already skips what Triton does to find that out.

    That is half of a launch's time on the host. What a compiled kernel depends on, beside its constexprs: each argument's
    type, whether a pointer or an integer is a multiple of 16, whether an integer is 1 or beyond 32 bits.
    """
    if not _launches_directly():
        kernel[grid](*args, **meta)
        return None
    device = torch.cuda.current_device()
    key = (kernel.fn, device, *meta.items(), *map(_kind, args))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **meta)
        given, rest = kernel.params[: len(args)], kernel.params[len(args) :]
        as_said = not any(p.is_constexpr for p in given) and all(p.is_constexpr and p.name in meta for p in rest)
        if as_said and hasattr(compiled, "packed_metadata"):  # compiled by now: Triton can do that in the background
            _compiled[key] = compiled, tuple(meta[p.name] for p in rest)
        return None
    compiled, constexprs = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    hooks = launch_hooks()
    metadata = None if hooks is NO_HOOKS else compiled.launch_metadata((x, y, z), stream, *args, *constexprs)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, metadata, *hooks, *args, *constexprs)
    return found


def _kind(a) -> object:
    """What of an argument a compiled kernel depends on."""
    kind = type(a)
    if kind is int:
        return a == 1, a & 15 == 0, -(2**31) <= a < 2**31, a < 2**63
    if isinstance(a, Tensor):
        return a.dtype, a.data_ptr() & 15 == 0
    if isinstance(a, float):  # numpy's double, too
        return float
    if kind is bool or a is None:
        return kind
    # a tensor descriptor: the rest of it is read at the launch
    return a.base.dtype, tuple(a.block_shape), id(a.layout)


@cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of ``device``; under the interpreter a small number, since programs run one after the other."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlap_meta(device: torch.device) -> dict:
    """A launch's ``OVERLAP`` and its options: whether it may begin while the one before it ends (Hopper and later).

    Such a kernel must wait (``gdc_wait``) before it reads what any other wrote, in every program, and lets the next begin
    (``gdc_launch_dependents``) only after that. Weights may be read before: what writes them, an optimizer or a copy, must
    then be a kernel that does not let the next begin.
    """
    nvidia = device.type == "cuda" and not torch.version.hip and not INTERPRET
    overlaps = nvidia and torch.cuda.get_device_capability(device)[0] >= 9
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


def records() -> bool:
    """Whether anything would want a derivative of a call: without it, autograd.Function is microseconds for nothing."""
    return (
        torch.is_grad_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class _RefuseDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: str, *grads: Tensor):
        ctx.op = op
        return grads if len(grads) > 1 else grads[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: double backward is not implemented; use backend='reference' where second derivatives are needed"
        )


def _flat(grads: tuple) -> tuple:
    """torch.library hands over the gradients of a list of outputs as one list."""
    return tuple(grads[0]) if len(grads) == 1 and isinstance(grads[0], (list, tuple)) else grads


def fused_op(
    name: str,
    *,
    forward: Callable,
    forward_fake: Callable,
    backward: Callable,
    backward_fake: Callable,
    setup_context: Callable,
    gradients: Callable,
) -> Callable:
    """One differentiable op out of two launchers, reached with little overhead in eager mode and traceable in compiled mode.

    ``torch.library`` dispatch costs about 60 us a call, so eager calls go straight to an ``autograd.Function``; under
    ``torch.compile``, and with DTensors, the same launchers are reached as ``torch.ops.m3kernels.<name>`` and
    ``<name>_backward``.

    Args:
        forward, backward: launchers with annotated signatures; they return new tensors, several of them as a tuple or
            a list, and never write their inputs.
        forward_fake, backward_fake: shapes and dtypes of what they return.
        setup_context: ``(ctx, inputs, output)``, saves what the backward needs.
        gradients: ``(ctx, run_backward, *output_grads)``, returns one gradient per input of ``forward``.
    """
    registered = torch.library.custom_op(f"m3kernels::{name}", forward, mutates_args=())
    registered.register_fake(forward_fake)
    registered_backward = torch.library.custom_op(f"m3kernels::{name}_backward", backward, mutates_args=())
    registered_backward.register_fake(backward_fake)
    registered.register_autograd(
        lambda ctx, *grads: gradients(ctx, registered_backward, *_flat(grads)), setup_context=setup_context
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx, *grads):
            if not torch.is_grad_enabled():
                return gradients(ctx, backward, *grads)
            with torch.no_grad():
                grads = gradients(ctx, backward, *grads)
            at = [i for i, g in enumerate(grads) if g is not None]
            refusing = _RefuseDoubleBackward.apply(name, *(grads[i].detach().requires_grad_() for i in at))
            refusing = refusing if isinstance(refusing, tuple) else (refusing,)
            out = list(grads)
            for i, g in zip(at, refusing):
                out[i] = g
            return tuple(out)

    Eager.__name__ = Eager.__qualname__ = name

    def call(*inputs):
        # of DTensors all tensors are, or check_dtensors has refused them
        if torch.compiler.is_compiling() or is_dtensor(inputs[0]):
            return registered(*inputs)
        return Eager.apply(*inputs) if records() else forward(*inputs)

    return call
