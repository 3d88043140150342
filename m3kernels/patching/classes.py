"""Class swapping: the one mechanism by which a module gets a fused forward.

``module.__class__`` becomes a subclass of the module's own class that carries the parent's name, so that everything that
looks a class up by name keeps working: ``save_pretrained``, output capture, FSDP wrap policies, PEFT, attention switching.
No class, module global or torch function is rebound: other models in the process are untouched.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import nn

logger = logging.getLogger("m3kernels")

# our attention's name in transformers, and what an attention module's config named before, kept on the module
ATTENTION = "m3kernels"
ATTENTION_WAS = "_m3k_attention_was"

# on a fused attention or MLP: the adapters of its projections may be taken together; on a model: the head's into the loss
TOGETHER = "_m3k_lora"

# name: (forward, facts); the name is what pickles refer to
FORWARDS: dict[str, tuple[Callable, Callable[[type], dict]]] = {}


def fused_forward(name: str, facts: Callable[[type], dict] = lambda original: {}) -> Callable:
    """Register a function as a forward that :func:`fuse` can give to a module.

    ``facts(original)`` is evaluated once per class and becomes class attributes: what the forward needs to know of the
    class that it stands in for, without looking it up on every call or under ``torch.compile``.
    """

    def register(forward: Callable) -> Callable:
        FORWARDS[name] = (forward, facts)
        return forward

    return register


@functools.cache
def fused_class(original: type, name: str) -> type:
    """The subclass of ``original`` whose forward is ``FORWARDS[name]``."""
    fused, facts = FORWARDS[name]

    # generate() and the Trainer read the signature through this
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if not is_fused(self):  # bound before unpatch() by something that wraps forwards: accelerate, TRL
            return original.forward(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    namespace = {
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_m3k_original": original,
        "_m3k_forward": name,
        **facts(original),
    }
    return type(original)(original.__name__, (original,), namespace)


def _reduce_ex(self, protocol):
    # by its name the class would be found again as the unfused parent
    _, _, state, *rest = object.__reduce_ex__(self, 2)
    cls = next(c for c in type(self).__mro__ if "_m3k_original" in vars(c))
    return (_rebuild, (cls._m3k_original, cls._m3k_forward), state, *rest)


def _rebuild(original: type, name: str):
    import m3kernels.patching.rules  # noqa: F401  registers every forward, and imports transformers

    cls = fused_class(original, name)
    return cls.__new__(cls)


def is_fused(module: nn.Module) -> bool:
    return hasattr(type(module), "_m3k_original")


def fuse(module: nn.Module, name: str) -> None:
    module.__class__ = fused_class(type(module), name)


def unfuse(module: nn.Module) -> None:
    module.__class__ = type(module)._m3k_original


def check_unfusable(module: nn.Module) -> None:
    """Raises RuntimeError when another library has derived a class from ours since (FSDP2's ``fully_shard`` does)."""
    cls = type(module)
    if "_m3k_original" not in vars(cls):
        raise RuntimeError(
            f"{cls.__name__} was wrapped after patching (by fully_shard, for example) and cannot be restored in place; "
            "unpatch before wrapping"
        )


def is_switched(module: nn.Module) -> bool:
    """Whether a patch pointed this attention module's config to our attention."""
    return ATTENTION_WAS in vars(module)


def switch_attention(modules: list[nn.Module]) -> None:
    """Point the configs of attention modules to our attention, as ``set_attn_implementation`` would."""
    names = [module.config._attn_implementation or "sdpa" for module in modules]
    for module, name in zip(modules, names):
        module.__dict__[ATTENTION_WAS] = name
        module.config._attn_implementation = ATTENTION


def switch_attention_back(modules: list[nn.Module]) -> None:
    """The way back, but for configs that name yet another implementation by now."""
    for module in modules:
        was = module.__dict__.pop(ATTENTION_WAS)
        if module.config._attn_implementation == ATTENTION:
            module.config._attn_implementation = was


def takes_together(module: nn.Module) -> bool:
    return TOGETHER in vars(module)


def take_together(module: nn.Module, on: bool) -> None:
    """Whether a fused attention or MLP takes the adapters of its projections together, or a model its head's into the loss."""
    if on:
        module.__dict__[TOGETHER] = True
    else:
        module.__dict__.pop(TOGETHER, None)


def original_forward(module: nn.Module) -> Callable:
    """The unfused forward, as a function of ``self``."""
    return type(module)._m3k_original.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module's parts instead of the module would skip a hook or a forward set on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or nn.modules.module._has_any_global_hook()
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Neither sharded nor quantised: exactly what a kernel can address."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point()


_noted: set[tuple[str, str]] = set()


def note_fallback(op: str, reason: str) -> None:
    """Tell once that a patched module takes its unfused path, and why."""
    if torch.compiler.is_compiling() or (op, reason) in _noted:
        return
    _noted.add((op, reason))
    logger.warning("m3kernels: %s runs unfused: %s", op, reason)
