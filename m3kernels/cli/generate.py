"""Answer a prompt with images, or a file of prompts, with a Ministral 3 checkpoint on one GPU, several (torchrun) or a CPU."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

HELP = "text and images in, text out: one prompt or a file of them, streamed, on one process or under torchrun"
OWN_PARSER = True  # its flags are spelt with - or _
DTYPES = ("float32", "float16", "bfloat16")
# of a group of processes; reading a checkpoint from a slow disk is part of it
TIMEOUT_MINUTES = 30.0


def parser_of(prog: str = "m3kernels generate", **options) -> argparse.ArgumentParser:
    """The command's flags; ``options`` go to ArgumentParser."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, **{"description": __doc__, **options})
    model = parser.add_argument_group("model")
    model.add_argument("--hf-model-path", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint")
    model.add_argument(
        "--checkpoint-path", metavar="DIR", help="weights from a native checkpoint, by m3kernels convert"
    )
    model.add_argument("--adapter", metavar="DIR", help="LoRA or DoRA in PEFT's format, merged when it is loaded")
    model.add_argument("--revision", "--hf-revision", metavar="R", help="branch, tag or commit of a Hub id")
    model.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    model.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if there is one"
    )
    model.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs that share each layer, under torchrun")
    model.add_argument("--fp8", action="store_true", help="hold the text layers' weights in FP8 (E4M3)")
    model.add_argument("--kv-dtype", choices=("fp8",), help="hold keys and values in FP8")

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", metavar="TEXT", help="images stand where it has [IMG], or before it")
    prompt.add_argument("--image-path", action="append", default=[], metavar="FILE_OR_URL", help="may be repeated")
    prompt.add_argument("--system", metavar="TEXT", help="system prompt")
    prompt.add_argument("--shipped-system", action="store_true", help="the checkpoint's own, of its SYSTEM_PROMPT.txt")
    prompt.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="leave the text alone, without chat template (default: where the checkpoint has none)",
    )
    prompt.add_argument("--batch-file", metavar="FILE", help="JSONL of prompts or conversations instead of --prompt")
    prompt.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (default 16)")

    answer = parser.add_argument_group("answer")
    answer.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default 100")
    answer.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: likeliest token")
    answer.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    answer.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0: all tokens")
    answer.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default 0)")
    answer.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    answer.add_argument("--stream", action="store_true", help="print text as it comes")
    answer.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines there, one a prompt")
    answer.add_argument("--overwrite", action="store_true", help="replace --output's file")
    return parser


def dashed(arguments: list[str]) -> list[str]:
    """Flags spelt with ``_`` as they are declared."""
    pairs = (argument.partition("=") for argument in arguments)
    return [(f.replace("_", "-") if f.startswith("--") else f) + equals + value for f, equals, value in pairs]


def run(arguments: list[str]) -> int:
    """Exit code: 0; 2 with a message where nothing can be generated; 130 after Ctrl-C, with what there was."""
    parser = parser_of()
    return answer(parser.parse_args(dashed(arguments)), name=parser.prog)


def answer(args: argparse.Namespace, *, name: str) -> int:
    """Generates for parsed flags; exit codes as of :func:`run`. Of several ranks the first one prints."""
    from m3kernels.models.finetune.config import FinetuneError
    from m3kernels.models.generation.prompt import GenerationError
    from m3kernels.models.ministral3 import AdapterError, CheckpointError, ConfigError
    from m3kernels.parallel import ParallelError

    first = os.environ.get("RANK", "0") == "0"
    # text of any language, also into a pipe that takes ASCII alone
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _processes(args) as mesh:
            return _generate(args, mesh, first)
    except (
        GenerationError,
        CheckpointError,
        ConfigError,
        AdapterError,
        ParallelError,
        FinetuneError,
        OSError,
    ) as error:
        if first:
            print(f"{name}: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator:
    """The mesh of torchrun's processes; None for one by itself."""
    from m3kernels.models.finetune.process import process_group
    from m3kernels.models.generation.loading import default_device
    from m3kernels.models.generation.prompt import GenerationError
    from m3kernels.parallel import make_mesh

    if args.tp < 1:
        raise GenerationError(f"--tp {args.tp}; allowed: 1 and more")
    device = default_device(args.device)
    if args.tp == 1 and "RANK" not in os.environ:
        yield None
        return
    with process_group(TIMEOUT_MINUTES, device.type):
        yield make_mesh(args.tp, 1, device_type=device.type)


def _generate(args: argparse.Namespace, mesh, first: bool) -> int:
    import torch

    from m3kernels.cli.generate_output import Output, reading_bar
    from m3kernels.models.generation.chat import Chat
    from m3kernels.models.generation.engine import Generator
    from m3kernels.models.generation.loading import default_device, find, load
    from m3kernels.models.generation.prefill import planned
    from m3kernels.models.generation.prompt import Sampling
    from m3kernels.models.generation.requests import Request, read_requests
    from m3kernels.models.generation.session import Session
    from m3kernels.models.generation.text import Reader

    _check(args)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    sampling = Sampling(**options)
    chat = Chat.open(args.hf_model_path, system=args.system, shipped_system=args.shipped_system, revision=args.revision)
    Reader(chat, stop=args.stop)
    paths = {"checkpoint_path": args.checkpoint_path, "adapter": args.adapter, "revision": args.revision}
    found = find(args.hf_model_path, **paths, tp=args.tp)

    def check(prompt, where: str) -> None:
        planned(prompt, found.config, sampling, where)

    if args.batch_file is None:
        encoded = chat.encode(args.prompt, args.image_path, raw=args.raw)
        check(chat.with_pixels(encoded), "the prompt")
        requests = [Request("the prompt", None, encoded)]
    else:
        with reading_bar(args.batch_file, first) as advance:
            requests = read_requests(args.batch_file, chat, raw=args.raw, check=check, advance=advance)
    with Output(args, chat, requests, first) as output:
        for notice in found.notices:
            output.note(notice)
        if chat.raw and args.raw is None:
            output.note(
                "the checkpoint has no chat template: prompts are taken as they are (--no-raw puts them into a chat)"
            )
        model = load(
            found,
            dtype=args.dtype and getattr(torch, args.dtype),
            fp8=args.fp8,
            device=default_device(args.device),
            mesh=mesh,
            progress=output.shows_progress,
        )
        session = Session(chat, Generator(model, kv_dtype=args.kv_dtype))
        return output.answer_all(session, sampling)


def _check(args: argparse.Namespace) -> None:
    from m3kernels.models.generation.loading import check_fp8
    from m3kernels.models.generation.prompt import GenerationError

    if (args.prompt is None) == (args.batch_file is None):
        raise GenerationError("give either --prompt TEXT or --batch-file FILE")
    if args.batch_file is not None and args.image_path:
        raise GenerationError('--image-path goes with --prompt; lines of --batch-file have {"images": [...]}')
    if args.batch_file is not None and args.stream:
        raise GenerationError("--stream goes with --prompt; answers to a --batch-file are lines of JSON")
    check_fp8(args.fp8, args.adapter, args.tp)
    if args.batch_size < 1:
        raise GenerationError(f"--batch-size {args.batch_size}; allowed: 1 and more")
    if args.output is not None:
        if args.output.exists() and not args.overwrite:
            raise GenerationError(f"--output {args.output} exists: choose another file, or pass --overwrite")
        if not args.output.parent.is_dir():
            raise GenerationError(f"--output {args.output}: the folder {args.output.parent} does not exist: make it")
