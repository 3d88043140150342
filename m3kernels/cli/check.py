"""Run the parity suite on this machine, and on a model of yours: our error beside eager PyTorch's own, against fp64."""

import argparse
import importlib.util

import torch

from m3kernels.ops._common import use_triton

HELP = "parity of ops and of a patched model on this machine, as a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="also check this Ministral 3 checkpoint, patched; FP8, too"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda when there is one")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="one dtype only (default: all that fit)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="length of the text for --model (default 512)")
    parser.add_argument(
        "--no-gradients", action="store_true", help="with --model: compare outputs only, needs less memory"
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="these ops only, and no model (rms_norm, swiglu, ...)")
    parser.add_argument("--small", action="store_true", help="small shapes only")


def _dtypes(args: argparse.Namespace, device: str) -> list[torch.dtype]:
    if args.dtype:
        return [getattr(torch, args.dtype)]
    # on the CPU, bf16 kernels can only be interpreted, and the interpreter's bf16 is wrong
    return [torch.float32, torch.float16] + [torch.bfloat16] * (device == "cuda")


def _op_rows(args: argparse.Namespace, device: str, progress) -> list:
    from m3kernels.parity.ops import CASES, measure

    real = device == "cuda" and not args.small
    cases = [case for case in CASES if not args.op or case.name.split()[0] in args.op]
    unknown = set(args.op or ()) - {case.name.split()[0] for case in CASES}
    if unknown:
        known = ", ".join(dict.fromkeys(case.name.split()[0] for case in CASES))
        raise SystemExit(f"m3kernels check: no op {', '.join(sorted(unknown))}; allowed: {known}")
    jobs = [
        (case, shape, dtype)
        for case in cases
        for dtype in _dtypes(args, device)
        for shape in case.small + (case.real if real else ())
    ]
    rows = []
    for case, shape, dtype in progress(jobs, "ops"):
        rows += measure(case, shape, dtype, device)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _tiny_model_rows(args: argparse.Namespace, device: str, progress) -> list:
    from m3kernels.parity.model import measure_model, tiny_batch, tiny_model, with_adapters

    rows, has_peft = [], importlib.util.find_spec("peft") is not None
    if not has_peft:
        print("peft is not installed: its models are not checked (pip install peft)")
    for dtype in progress(_dtypes(args, device), "tiny model"):
        if device == "cpu" and dtype != torch.float32:
            continue
        rows += measure_model(tiny_model().to(device, dtype), tiny_batch(device), "patched tiny model")
        for dora in (False, True) if has_peft else ():
            model = with_adapters(tiny_model().to(device, dtype), dora)
            rows += measure_model(model, tiny_batch(device), f"patched PEFT {'DoRA' if dora else 'LoRA'} model")
    return rows


def _own_model_rows(args: argparse.Namespace, device: str) -> list:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config

    from m3kernels.parity.model import fp8_weight_error, has_fp8, measure_model, text_batch
    from m3kernels.patching.api import transformers_version

    config = AutoConfig.from_pretrained(args.model)
    auto = AutoModelForCausalLM if config.model_type == "ministral3" else AutoModelForImageTextToText
    options = {"dtype": getattr(torch, args.dtype) if args.dtype else "auto"}
    fp8, quantization = None, getattr(config, "quantization_config", None)
    if quantization is not None and quantization["quant_method"] == "fp8":
        if args.dtype == "float32" and transformers_version() < (5, 24):
            print(f"note: transformers {transformers.__version__} reads FP8 checkpoints in bf16: checked in bf16")
            options["dtype"] = torch.bfloat16
        fp8 = auto.from_pretrained(args.model, **options).to(device)
        if not has_fp8(fp8):
            print(f"note: on {device} transformers dequantises FP8 checkpoints: FP8 layers are not checked")
        options["quantization_config"] = FineGrainedFP8Config(**{**quantization, "dequantize": True})
    model = auto.from_pretrained(args.model, **options).to(device)
    if fp8 is not None:
        _dequantise_exactly(model, args.model, options["dtype"])
    parameters = sum(p.numel() for p in model.parameters())
    # an fp64 copy with gradients takes 16 bytes a parameter
    truth = torch.float64 if parameters < 1e9 else torch.float32
    if model.dtype == truth:
        truth = torch.float64
    batch = text_batch(model, device, args.tokens)
    error = fp8_weight_error(model, batch)
    name = str(model.dtype).removeprefix("torch.")
    print(
        f"FP8 weights (quantize='fp8': text layers, a scale for each output channel, activations in {name}) against {name}: "
        f"relative error of logits {error.logits:.2e}; the likeliest token stays at {error.same} of {error.tokens}"
    )
    return measure_model(model, batch, args.model, truth_dtype=truth, gradients=not args.no_gradients, fp8=fp8)


def _dequantise_exactly(model: torch.nn.Module, folder: str, dtype: torch.dtype | str) -> None:
    """The weights of a checkpoint in one dtype: transformers 5.17 dequantises to bf16 whatever was asked for."""
    from m3kernels.models.ministral3.weights import Checkpoint, runtime_name

    checkpoint = Checkpoint.open(folder)
    dtype = checkpoint.float_dtype if dtype == "auto" else dtype
    for name, parameter in model.named_parameters():
        parameter.data = checkpoint.read(runtime_name(name), dtype=dtype).to(parameter.device)


def _progress():
    try:
        from rich.progress import track
    except ImportError:
        return lambda jobs, label: jobs
    return lambda jobs, label: track(jobs, description=f"checking {label}", transient=True)


def run(args: argparse.Namespace) -> int:
    """Prints the table; exit code 1 when any row fails."""
    from m3kernels.parity.core import FACTOR, table

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    runs_kernels = use_triton("check", "auto", torch.empty(1, device=device))
    progress = _progress()
    rows = _op_rows(args, device, progress)
    if not args.op:
        rows += _tiny_model_rows(args, device, progress)
    if args.model and not args.op:
        rows += _own_model_rows(args, device)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(
        f"\nrelative Frobenius error against fp64; allowed: {FACTOR} x eager's own error and the scatter of few values"
    )
    if not runs_kernels:
        print(f"note: on {device} the plain PyTorch references were checked, not the kernels (those need a CUDA GPU)")
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0
