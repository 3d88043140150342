"""Print versions, the GPU, which backends were found, and what to install for more."""

import argparse
import platform
from importlib import metadata

import torch

from m3kernels.ops._attention_backends import explain
from m3kernels.ops._common import why_no_triton

HELP = "versions, GPU, backends found, and what to install for more"

# distribution: (oldest supported, what it is for, how to get it)
REQUIRED = {
    "torch": ("2.11", "everything", "https://pytorch.org/get-started (choose your CUDA or CPU build)"),
    "transformers": ("5.17", "patching", "pip install 'transformers>=5.17'"),
    "safetensors": ("0.5", "checkpoints", "pip install safetensors"),
}
OPTIONAL = {
    "triton": ("3.6", "kernels", "pip install 'triton>=3.6'"),
    "peft": ("0.18", "LoRA and DoRA", "pip install 'm3kernels[train]'"),
    "mistral-common": ("1.9", "demo, tokenizer", "pip install 'm3kernels[demo]'"),
    "accelerate": ("1.0", "Trainer", "pip install 'm3kernels[train]'"),
    "liger-kernel": ("0.8", "benchmark peer", "pip install 'm3kernels[bench]'"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _package_lines() -> tuple[list[str], bool]:
    lines, healthy = [], True
    for name, (oldest, purpose, remedy) in (REQUIRED | OPTIONAL).items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and _release(version) >= _release(oldest)
        if fits:
            lines.append(f"  ok       {name} {version}")
        else:
            healthy &= name not in REQUIRED
            found = f"{version} is older than {oldest}" if version else "not installed"
            lines.append(f"  {'MISSING' if name in REQUIRED else 'missing'}  {name}: {found}; for {purpose}: {remedy}")
    return lines, healthy


def _device_lines() -> list[str]:
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
        return [f"  none usable (torch is a {build}); ops run as plain PyTorch references"]
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"  cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        )
    return lines


def run(args: argparse.Namespace) -> int:
    """Prints the report; exit code 1 when something required is missing or too old."""
    from m3kernels import __version__

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines, healthy = _package_lines()
    reason = why_no_triton(device)
    print(f"m3kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages", *lines, sep="\n")
    print("GPU", *_device_lines(), sep="\n")
    print("backends")
    print(f"  {'no ' if reason else 'yes'}  triton{': ' + reason if reason else ' kernels on ' + device}")
    print("  yes  reference: plain PyTorch, on any device")
    print("attention")
    if reason or device == "cpu":
        print("  the model's own implementation: ours needs a GPU and triton")
    else:
        print(*("  " + line for line in explain(torch.device("cuda"), torch.bfloat16)), sep="\n")
    return 0 if healthy else 1
