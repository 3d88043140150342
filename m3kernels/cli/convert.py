"""Convert Ministral 3 checkpoints between Hugging Face's format and the native one, on the CPU, file by file."""

import argparse
import sys

HELP = "checkpoints: Hugging Face's format to the native one and back, and their comparison"
DTYPES = ("float32", "float16", "bfloat16")


def _checkpoint_path(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--checkpoint-path", "--megatron-path", required=True, metavar="DIR", help=text)


def _progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_actions(parser)


def add_actions(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Adds import, export and verify with their options; returns their parsers."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|export|verify")

    importing = actions.add_parser("import", help="Hugging Face to native; goes on where it was interrupted")
    importing.add_argument("--hf-model", required=True, metavar="DIR_OR_ID", help="local folder or Hub id (HF_TOKEN)")
    _checkpoint_path(importing, "native checkpoint to write")
    importing.add_argument("--torch-dtype", choices=DTYPES, help="of all tensors (default: as there; FP8: bfloat16)")
    importing.add_argument("--revision", "--hf-revision", help="branch, tag or commit of a Hub id")
    _overwrite(importing)
    _progress(importing)

    exporting = actions.add_parser("export", help="native to Hugging Face, with the source's names, files and dtypes")
    exporting.add_argument(
        "--hf-model", metavar="DIR_OR_ID", help="whose layout to write (default: the import's source)"
    )
    _checkpoint_path(exporting, "native checkpoint, or the folder of its iter_N or step-N folders")
    exporting.add_argument("--hf-path", required=True, metavar="DIR", help="folder to write")
    exporting.add_argument("--fp8", action="store_true", help="quantise what the source has in FP8, with its scales")
    exporting.add_argument(
        "--not-strict", action="store_true", help="leave out missing and unknown tensors, and say so"
    )
    _overwrite(exporting)
    _progress(exporting)

    verifying = actions.add_parser("verify", help="compare tensor by tensor; exit code 1 if any differs")
    verifying.add_argument("--hf-model", required=True, metavar="DIR_OR_ID")
    _checkpoint_path(verifying, "native checkpoint, or the folder of its iter_N or step-N folders")
    _progress(verifying)
    return [importing, exporting, verifying]


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 when verify finds a difference; 2 with a message when a checkpoint cannot be converted."""
    import torch

    from m3kernels.models.ministral3 import convert

    progress = not args.no_progress
    try:
        if args.action == "verify":
            result = convert.verify_checkpoint(args.hf_model, args.checkpoint_path, progress=progress)
        elif args.action == "import":
            result = convert.import_checkpoint(
                args.hf_model,
                args.checkpoint_path,
                dtype=args.torch_dtype and getattr(torch, args.torch_dtype),
                revision=args.revision,
                overwrite=args.overwrite,
                progress=progress,
            )
        else:
            result = convert.export_checkpoint(
                args.checkpoint_path,
                args.hf_path,
                args.hf_model,
                fp8=args.fp8,
                strict=not args.not_strict,
                overwrite=args.overwrite,
                progress=progress,
            )
    except (convert.CheckpointError, OSError) as error:
        print(f"m3kernels convert {args.action}: {error}", file=sys.stderr)
        return 2
    print(result)
    return 1 if args.action == "verify" and result.differences else 0
