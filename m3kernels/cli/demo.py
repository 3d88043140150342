"""``m3kernels demo``: a small Ministral 3, patched, learns to read handwritten digits from pages.

Only the standard library is imported here, so that ``m3kernels --help`` is quick and works without the demo's packages.
"""

import argparse
import importlib
import sys
from pathlib import Path

HELP = "train a small Ministral 3 on pages of handwritten digits; needs pip install 'm3kernels[demo]'"
DTYPES = ("float32", "bfloat16")
PACKAGES = ("mistral_common.protocol.instruct.chunk", "cv2", "sklearn", "PIL", "matplotlib", "rich")
FAILED, INTERRUPTED = 1, 130


class DemoError(RuntimeError):
    """The demo cannot run, or did not reach what it promises; the message says why."""


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser or subparser."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU, else cpu")
    add("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, bfloat16 on cuda); AdamW works in fp32")
    add("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    add("--steps", type=_positive, metavar="N", help="training steps; when given, no accuracy is required at the end")
    add("--eval-samples", type=_positive, default=300, metavar="N", help="held-out questions (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and pages (default: %(default)s)")
    add("--no-patch", action="store_true", help="run transformers as it is; slower, since every token gets its logits")


def _check_packages() -> None:
    """Raises DemoError when a package that the demo needs beyond m3kernels' own is missing or broken."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        # mistral-common with an unsuitable numpy raises more than ImportError
        except Exception as error:
            raise DemoError(
                f"cannot import {package} ({type(error).__name__}: {error}); the demo's packages come with: "
                "pip install 'm3kernels[demo]'"
            ) from error


def _device(asked: str | None) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise DemoError(
            f"--device cuda was given, but torch {torch.__version__} sees no CUDA GPU; use --device cpu, or install a CUDA "
            "build of torch on a machine with an NVIDIA GPU"
        )
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    """Run the demo with the options of :func:`add_arguments`.

    Returns:
        0; 1 when something it needs is missing, or the errors, the accuracy or the reloaded checkpoint are not what they
        must be; 130 after Ctrl-C. Every file it leaves is complete, whichever way it ends.
    """
    saved: list[Path] = []
    try:
        _check_packages()
        args.device = _device(args.device)
        from m3kernels.cli.demo_session import run_session

        run_session(args, saved)
    except KeyboardInterrupt:
        written = ", ".join(str(path) for path in saved)
        kept = f"saved before that: {written}" if saved else f"nothing was saved, {args.output} is as it was"
        print(f"\nInterrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    except (DemoError, OSError) as error:
        print(f"m3kernels demo: {error}", file=sys.stderr)
        return FAILED
    return 0
