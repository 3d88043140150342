"""Convert Ministral 3 checkpoints between Hugging Face's format and the native one, and compare the two."""

import argparse
import sys

HELP = "Hugging Face checkpoints to native ones and back, bit for bit"
ACTIONS = {
    "import": "Hugging Face to native",
    "export": "native to Hugging Face, as the source was laid out",
    "verify": "compare tensor by tensor; exit code 1 on a difference",
}
DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of Megatron-Bridge's script, under our names and its own."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    for name, text in ACTIONS.items():
        sub = actions.add_parser(name, help=text, description=text)
        what = "folder or Hub id (needs HF_TOKEN where access is restricted)"
        if name == "export":
            what += "; the layout to write, where it is not that of the checkpoint's own source"
        sub.add_argument("--hf-model", required=name != "export", help=what)
        sub.add_argument("--hf-revision", help="branch, tag or commit of a Hub id")
        sub.add_argument("--checkpoint-path", "--megatron-path", required=True, help="folder of the native checkpoint")
        sub.add_argument("--no-progress", action="store_true", help="no progress bar")
        sub.add_argument(
            "--trust-remote-code", action="store_true", help="without effect: no code of a checkpoint is run"
        )
        sub.add_argument("--device-map", help="without effect: a conversion needs no device")
        if name != "verify":
            sub.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is there")
        if name == "import":
            sub.add_argument(
                "--torch-dtype", choices=DTYPES, help="of all tensors (default: as they are, FP8 as the config says)"
            )
        if name == "export":
            sub.add_argument("--hf-path", required=True, help="folder to write")
            sub.add_argument("--not-strict", action="store_true", help="skip missing and ignore extra tensors")
            sub.add_argument("--fp8", action="store_true", help="FP8 sources: back to E4M3 under the kept scales")


def run(args: argparse.Namespace) -> int:
    """0; 1 where verify found a difference; 2 where something cannot be read or written."""
    from m3kernels.models.ministral3._files import CheckpointError

    if args.trust_remote_code:
        print("--trust-remote-code is without effect: no code of a checkpoint is run")
    if args.device_map is not None:
        print(f"--device-map {args.device_map} is without effect: a conversion needs no device")
    try:
        return {"import": _import, "export": _export, "verify": _verify}[args.action](args)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _import(args: argparse.Namespace) -> int:
    import torch

    from m3kernels.models.ministral3.convert import import_checkpoint

    report = import_checkpoint(
        args.hf_model,
        args.checkpoint_path,
        dtype=getattr(torch, args.torch_dtype) if args.torch_dtype else None,
        revision=args.hf_revision,
        overwrite=args.overwrite,
        progress=not args.no_progress,
    )
    if report.resumed:
        print(f"found finished: {', '.join(report.resumed)}")
    print(f"{report.tensors} tensors, {report.bytes} bytes in {report.folder}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from m3kernels.models.ministral3.convert import export_checkpoint

    report = export_checkpoint(
        args.checkpoint_path,
        args.hf_path,
        hf_model=args.hf_model,
        revision=args.hf_revision,
        strict=not args.not_strict,
        fp8=args.fp8,
        overwrite=args.overwrite,
        progress=not args.no_progress,
    )
    for what, names in (("skipped", report.skipped), ("ignored", report.ignored), ("new scales", report.rescaled)):
        if names:
            print(f"{what}: {', '.join(names)}")
    print(f"{report.tensors} tensors, {report.bytes} bytes in {report.folder}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from m3kernels.models.ministral3.convert import verify_checkpoint

    found = verify_checkpoint(
        args.hf_model, args.checkpoint_path, revision=args.hf_revision, progress=not args.no_progress
    )
    for name, off in found.different.items():
        print(f"{name}: differs by up to {off:.3g}")
    for what, names in (("not in the native checkpoint", found.missing), ("only in the native one", found.extra)):
        if names:
            print(f"{what}: {', '.join(names)}")
    cast = f", {found.cast} of them after the cast to the native dtype" if found.cast else ""
    largest = max(found.different.values(), default=0.0)
    print(f"{found.compared} tensors compared{cast}: {len(found.different)} differ, largest difference {largest:.3g}")
    return 0 if found.equal else 1
