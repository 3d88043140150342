"""``patch``, ``unpatch``, ``patched``, ``is_patched``."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from m3kernels.ops._common import HAS_TRITON, why_no_triton
from m3kernels.patching.classes import fuse, fused_class, is_fused, is_switched, switch_attention, take_together
from m3kernels.patching.report import PatchReport, Skip, changed_by_patches, restore

OLDEST_TRANSFORMERS = (5, 17)


class PatchError(RuntimeError):
    """A model cannot be patched as asked; nothing was changed."""


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP, FSDP1, DataParallel or torch.compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif type(model).__module__.startswith("torch.") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def transformers_version() -> tuple[int, int]:
    """Major and minor."""
    import transformers

    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


def _check_transformers() -> None:
    import transformers

    if transformers_version() < OLDEST_TRANSFORMERS:
        raise PatchError(
            f"transformers {transformers.__version__} is too old: before 5.17 its Ministral 3 takes the query scale from "
            "the cache position, which is wrong with left padding and packing; pip install 'transformers>=5.17'"
        )


def _check_root(base: nn.Module) -> str:
    from m3kernels.patching.rules import MULTIMODAL, ROOTS

    for cls in type(base).__mro__:
        if cls.__name__ in ROOTS.get(cls.__module__, ()):
            text = getattr(getattr(base.config, "text_config", None), "model_type", "ministral3")
            if cls.__module__ == MULTIMODAL and text != "ministral3":
                raise PatchError(f"{cls.__name__} holds a {text!r} text model; supported there: 'ministral3'")
            return cls.__name__
    supported = ", ".join(name for names in ROOTS.values() for name in names)
    raise PatchError(f"{type(base).__name__} is not supported; m3kernels patches {supported} (also inside PEFT or DDP)")


def _chosen_ops(ops: str | Iterable[str]) -> list[str]:
    from m3kernels.patching.rules import OPS

    return list(OPS) if ops == "all" else _chosen("op", ops, OPS, "'all' or any of")


def _chosen_parts(adapters: str | Iterable[str]) -> list[str]:
    from m3kernels.patching.rules import PARTS

    if adapters == "none":
        return []
    return (
        list(PARTS) if adapters == "all" else _chosen("part for adapters", adapters, PARTS, "'all', 'none' or any of")
    )


def _chosen(what: str, names: str | Iterable[str], allowed: Iterable[str], or_else: str) -> list[str]:
    allowed = list(allowed)
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {what} {name!r}{hint} Allowed: {or_else} {', '.join(allowed)}")
    return [name for name in allowed if name in chosen]


def _parts(base: nn.Module) -> dict[int, str]:
    """Which part a module belongs to, by id; modules of the text model are left out."""
    from m3kernels.patching.rules import PARTS

    return {
        id(inner): part
        for module in base.modules()
        for part, owners in PARTS.items()
        if any((c.__module__, c.__name__) in owners for c in type(module).__mro__)
        for inner in module.modules()
    }


def _plan(
    base: nn.Module, ops: list[str], parts: dict[int, str], wanted: list[str], strict: bool
) -> tuple[list, list[Skip], dict[str, int]]:
    """(modules to fuse with their rules, modules skipped, modules fused already per op)."""
    from m3kernels.patching.rules import RULES

    rules = {(rule.source, rule.name): rule for rule in RULES if rule.op in ops}
    todo, skipped, done = [], [], dict.fromkeys(ops, 0)
    for name, module in base.named_modules():
        cls = type(module)
        original = getattr(cls, "_m3k_original", cls)
        exact = rules.get((original.__module__, original.__name__))
        rule = exact or next((r for c in cls.__mro__ if (r := rules.get((c.__module__, c.__name__)))), None)
        if rule is None:
            continue
        if is_fused(module):
            done[rule.op] += 1
        elif rule.op == "lora_linear" and (part := parts.get(id(module), "text")) not in wanted:
            skipped.append(Skip(rule.op, name, f"adapters of {part} are left to PEFT (adapters=...)"))
        elif exact is None:
            skipped.append(Skip(rule.op, name, f"{cls.__name__} is derived from {rule.name}: patch before wrapping"))
        elif "forward" in vars(module):
            skipped.append(Skip(rule.op, name, "its forward was replaced on the instance"))
        elif wrong := rule.mismatch(module):
            if strict:
                raise PatchError(
                    f"{name or rule.name}: {wrong}, which the rule for {rule.op} counts on; this transformers release has "
                    "changed the class. Pass strict=False to leave it unfused, and please report it"
                )
            skipped.append(Skip(rule.op, name, wrong))
        elif rule.op != "linear_cross_entropy" and (reason := rule.why_not(module)):
            skipped.append(Skip(rule.op, name, reason))
        else:
            todo.append((name, module, rule))
    return todo, skipped, done


def _drop_lonely_tables(todo: list, skipped: list[Skip]) -> list:
    """An fp32 table is only for attention layers that take one: where one of them stays unfused, the table stays too."""
    unfused = {skip.op for skip in skipped if skip.op in ("rotary", "rotary_2d")}
    kept = []
    for name, module, rule in todo:
        if rule.op in unfused and rule.forward.endswith("_table"):
            skipped.append(Skip(rule.op, name, "an attention layer stays unfused and needs the table in its own dtype"))
        else:
            kept.append((name, module, rule))
    return kept


def _attention_modules(base: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[Skip]]:
    """(attention modules to point to our attention, those that keep theirs)."""
    from m3kernels.patching.rules import ATTENTION_MODULES

    todo, skipped = [], []
    for name, module in base.named_modules():
        if is_switched(module) or not any(
            (c.__module__, c.__name__) in ATTENTION_MODULES for c in type(module).__mro__
        ):
            continue
        if module.config.output_attentions:
            skipped.append(Skip("attention", name, "config.output_attentions wants weights, which eager attention has"))
        else:
            todo.append((name, module))
    return todo, skipped


def _backend(base: nn.Module) -> str:
    """What the ops will run on, judged by the model's first parameter."""
    parameter = next(base.parameters(), torch.empty(0))
    if parameter.device.type == "meta":
        return "decided when weights are loaded"
    if why_no_triton(parameter.device.type):
        return f"reference ({'triton is not installed' if not HAS_TRITON else f'model on {parameter.device.type}'})"
    if parameter.dtype == torch.float64:
        return "reference (model in float64)"
    return "triton"


def _describe_attention(base: nn.Module) -> list[str]:
    """Which backend each shape class takes, as far as the model's device says."""
    from m3kernels.ops._attention_backends import explain

    parameter = next(base.parameters(), torch.empty(0))
    if parameter.device.type != "cuda" or why_no_triton("cuda"):
        return ["attention by m3kernels on a GPU; elsewhere by the implementation that the model had"]
    # FSDP2 may store weights in one dtype and gather them in another
    dtype = getattr(getattr(base, "layout", None), "dtype", None) or parameter.dtype
    return ["attention by shape class:", *("  " + line for line in explain(parameter.device, dtype))]


def patch(
    model: nn.Module,
    *,
    ops: str | Iterable[str] = "all",
    attention: str = "auto",
    adapters: str | Iterable[str] = ("text", "vision", "projector"),
    strict: bool = True,
) -> PatchReport:
    """Give a Ministral 3 model, Hugging Face's or our own, fused forwards, in place; results stay those of the unpatched model.

    Only this instance changes: its modules get subclasses of their own classes. Saving, loading, PEFT, Trainer, generate,
    gradient checkpointing and ``torch.compile`` work as before. On CUDA the Triton kernels run, elsewhere the plain
    PyTorch references (the report says which), and so they do in inference that ``torch.compile`` traces, where Inductor
    fuses them. Where nothing records gradients, layers of a Hugging Face model take up to 16 tokens a row and 64 in all by
    the decode ops, compiled or not. Patching twice changes nothing more. Patch before ``fully_shard``.

    Args:
        model: ``Ministral3ForCausalLM``, ``Mistral3ForConditionalGeneration``, one of their inner models or heads, or
            any of these inside PEFT, DDP or ``torch.compile`` wrappers; or ``m3kernels.models.ministral3.Ministral3``.
        ops: "all", or any of "rms_norm", "add_rms_norm", "rotary", "rotary_2d", "attention", "swiglu",
            "fp8_linear" (transformers' FP8 layers, as its dequantised ones compute), "lora_linear" (PEFT's LoRA and DoRA
            layers, those too that are made after patching), "linear_cross_entropy".
        attention: "auto" sets the configs' attention implementation to ours, which takes the fastest backend that is
            right for a call; "keep" keeps the model's own.
        adapters: which parts' PEFT layers run fused, those too that are made after patching: any of "text" (with the head,
            whose low-rank part joins the loss), "vision" and "projector", or "none". The others run PEFT's forward, reported.
        strict: raise when a class differs from what its rule was written for, instead of leaving it unfused.

    Returns:
        A :class:`PatchReport`: what runs fused, what does not and why; ``report.restore()`` undoes it.

    Raises:
        PatchError: another architecture, a transformers older than 5.17, or (strict) a class that has changed.
        ValueError: an unknown op, attention or part.
    """
    if attention not in ("auto", "keep"):
        raise ValueError(f"attention must be 'auto' (ours) or 'keep' (the model's own), got {attention!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch needs a model (torch.nn.Module), got {type(model).__name__}")
    _check_transformers()
    base = unwrap(model)
    architecture = _check_root(base)
    chosen = [op for op in _chosen_ops(ops) if op != "attention" or attention == "auto"]
    wanted = _chosen_parts(adapters)
    from m3kernels.patching.rules import PROJECTING, prepare

    earlier = changed_by_patches(model)
    parts = _parts(base)
    todo, skipped, counts = _plan(base, chosen, parts, wanted, strict)
    todo = _drop_lonely_tables(todo, skipped)
    for _, module, rule in todo:
        fused_class(type(module), rule.forward)  # cached; what it raises, it raises before anything is changed
    for name, module, rule in todo:
        reason = ""
        if rule.op == "linear_cross_entropy":
            take_together(module, "text" in wanted)
            reason = rule.why_not(module)  # fusing the head is part of what it does
        if reason:
            take_together(module, False)
            skipped.append(Skip(rule.op, name, reason))
        else:
            fuse(module, rule.forward)
            counts[rule.op] += 1
    prepare(base)
    taking = (*PROJECTING, "linear_cross_entropy") if "lora_linear" in chosen else ("linear_cross_entropy",)
    for module in base.modules():
        if getattr(type(module), "_m3k_forward", "") in taking and parts.get(id(module), "text") in wanted:
            take_together(module, True)
    described = [f"attention: the model's own ({getattr(base.config, '_attn_implementation', None)})"]
    if "attention" in chosen:
        switching, keeping = _attention_modules(base)
        switch_attention([module for _, module in switching])
        skipped += keeping
        counts["attention"] = sum(
            is_switched(m) or getattr(type(m), "_m3k_forward", "") == "native_attention" for m in base.modules()
        )
        described = _describe_attention(base)
    return PatchReport(
        model=model,
        architecture=architecture,
        patched=counts,
        skipped=skipped,
        backend=dict.fromkeys(chosen, _backend(base)),
        attention=described,
        earlier=earlier,
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`: every module gets its own class back. Returns the model; unpatched models pass through.

    Raises:
        RuntimeError: when ``fully_shard`` has wrapped patched modules since; nothing is changed then.
    """
    restore(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any module of the model runs a fused forward or our attention."""
    return any(is_fused(module) or is_switched(module) for module in model.modules())


@contextmanager
def patched(model: nn.Module, **options) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches inside the block only. Options as :func:`patch`."""
    with patch(model, **options) as report:
        yield report
