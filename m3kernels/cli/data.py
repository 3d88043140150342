"""Look at training data before training on it: samples with their supervised tokens, and every record that is bad."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# of bad records, in the summary
REASONS = 20
HELP = "training data: show samples as they are trained on, find bad records"


def _add_set(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_mutually_exclusive_group(required=True)
    sets.add_argument("--maker", nargs="+", metavar="NAME", help="sets by their makers, such as make_cord_v2_dataset")
    sets.add_argument("--train-data-path", nargs="+", metavar="FILE", help="JSONL, JSON or parquet files")
    sets.add_argument("--mock", action="store_true", help="random pictures and words")
    parser.add_argument(
        "--path", nargs="+", metavar="P", help="with --maker, one for each: another Hub id, or a local folder"
    )
    parser.add_argument("--split", help="of the makers' sets (default train)")
    parser.add_argument("--streaming", action="store_true", help="read sets from the Hub as they come")
    parser.add_argument("--image-folder", metavar="DIR", help="what relative image paths are relative to")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_ID", help="whose tokenizer and image sizes are used"
    )
    parser.add_argument("--seq-length", type=int, metavar="N", help="the most tokens of a sample (default 4096)")
    parser.add_argument("--max-image-size", type=int, metavar="N", help="longest side of an image in pixels")
    parser.add_argument("--system-prompt", metavar="TEXT", help="put before conversations without one")
    parser.add_argument(
        "--global-batch-size", type=int, default=32, metavar="N", help="samples a step, for packing (default 32)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|validate")

    inspecting = actions.add_parser("inspect", help="samples with their supervised tokens coloured, and their images")
    _add_set(inspecting)
    inspecting.add_argument(
        "--samples", type=int, default=3, metavar="N", help="the first N, or N forwards (default 3)"
    )
    inspecting.add_argument("--index", type=int, nargs="+", metavar="I", help="these records instead")
    inspecting.add_argument("--packed", action="store_true", help="packed forwards of a training step")
    inspecting.add_argument("--step", type=int, default=0, metavar="K", help="with --packed: which step (default 0)")
    inspecting.add_argument(
        "--seed", type=int, default=1234, metavar="S", help="with --packed: rng.seed (default 1234)"
    )
    inspecting.add_argument("--html", type=Path, metavar="FILE", help="write a page with the images in it instead")

    validating = actions.add_parser("validate", help="read everything once and list bad records; exit code 1 if any")
    _add_set(validating)
    validating.add_argument("--limit", type=int, metavar="N", help="the first N records alone")
    validating.add_argument("--num-workers", type=int, default=2, metavar="N", help="processes that read (default 2)")
    validating.add_argument("--json", action="store_true", help="print one JSON object")


def dataset_config(args: argparse.Namespace):
    """The DatasetConfig that the options stand for; what is not given has its default."""
    from m3kernels.models.finetune.config import DatasetConfig

    given = {
        "type": "mock" if args.mock else "hf" if args.maker else "local",
        "maker_name": tuple(args.maker or ()),
        "path": tuple(args.path or ()),
        "train_data_path": tuple(args.train_data_path or ()),
        "streaming": args.streaming,
    }
    for name in ("split", "image_folder", "seq_length", "max_image_size", "system_prompt"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    return DatasetConfig(**given)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 with bad records; 2 with a message when the set or the checkpoint cannot be read."""
    from m3kernels.models.finetune.config import FinetuneError
    from m3kernels.models.finetune.data.encode import Encoder
    from m3kernels.models.finetune.data.sources import Source, open_source

    # text of any language, also into a pipe that takes ASCII alone
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check(args)
        config = dataset_config(args)
        options = {"max_image_size": config.max_image_size, "system_prompt": config.system_prompt}
        encoder = Encoder.open(args.checkpoint, **options)
        source = open_source(config, "train", seed=getattr(args, "seed", 0))
        if isinstance(source, Source) and not len(source):
            raise FinetuneError(f"{source.name} has no records")
        return {"inspect": _inspect, "validate": _validate}[args.action](args, config, source, encoder)
    except (FinetuneError, OSError) as error:
        print(f"m3kernels data {args.action}: {error}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> None:
    from m3kernels.models.finetune.config import FinetuneError

    if args.path and not args.maker:
        raise FinetuneError("--path goes with --maker; files of your own go to --train-data-path")
    for name, least in (("seq_length", 1), ("global_batch_size", 1), ("samples", 1), ("limit", 0), ("step", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise FinetuneError(f"--{name.replace('_', '-')} {value}; it must be at least {least}")


def _inspect(args: argparse.Namespace, config, source, encoder) -> int:
    from rich.console import Console

    from m3kernels.models.finetune.data.inspect import show_packed, show_samples
    from m3kernels.models.finetune.data.inspect_views import html_page, print_groups

    if args.packed:
        from m3kernels.models.finetune.data.plan import Plan

        sizes = {"global_batch_size": args.global_batch_size, "seq_length": config.seq_length}
        plan = Plan(source, encoder, seed=args.seed, **sizes)
        groups = show_packed(plan, step=args.step, count=args.samples)
    else:
        indices = _indices(args, source)
        groups = show_samples(source, encoder, seq_length=config.seq_length, indices=indices)
    if args.html is None:
        return 1 if print_groups(groups, Console(file=sys.stdout)) else 0
    groups = list(groups)
    args.html.write_text(html_page(groups, title=f"{source.name} for {args.checkpoint}"), encoding="utf-8")
    print(f"samples in {args.html}: {sum(len(group.samples) for group in groups)}")
    return 1 if any(shown.reason is not None for group in groups for shown in group.samples) else 0


def _indices(args: argparse.Namespace, source) -> list[int]:
    from m3kernels.models.finetune.config import FinetuneError
    from m3kernels.models.finetune.data.sources import Source

    count = len(source) if isinstance(source, Source) else None
    if args.index is None:
        return list(range(args.samples if count is None else min(args.samples, count)))
    for index in args.index:
        if index < 0 or (count is not None and index >= count):
            raise FinetuneError(f"--index {index}; {source.name} has {'' if count is None else f'0 to {count - 1}'}")
    return args.index if count is not None else sorted(args.index)


def _validate(args: argparse.Namespace, config, source, encoder) -> int:
    from m3kernels.models.finetune.data.sources import Source
    from m3kernels.models.finetune.data.validate import validate

    total = len(source) if isinstance(source, Source) else args.limit
    total = total if args.limit is None or total is None else min(total, args.limit)
    with _progress(f"reading {source.name}", total) as advance:
        options = {"seq_length": config.seq_length, "limit": args.limit, "num_workers": args.num_workers}
        report = validate(source, encoder, advance=advance, **options)
    if args.json:
        print(json.dumps(report.to_dict(args.global_batch_size), ensure_ascii=False, indent=2))
    else:
        _print_report(report, args.global_batch_size)
    return 1 if report.bad else 0


def _print_report(report, global_batch_size: int) -> None:
    from m3kernels.models.finetune.data.inspect_views import printable

    for bad in report.bad:
        print(printable(f"{bad.where}: {bad.reason}"))
    told = report.to_dict(global_batch_size)
    rows = [
        ("records", f"{told['records']:,}, {len(report.bad):,} bad ({len(report.bad) / max(told['records'], 1):.2%})"),
        ("tokens", f"{told['tokens']:,}, {told['supervised']:,} supervised"),
        ("images", f"{told['images']:,}, of {told['image_tokens']:,} tokens"),
    ]
    if told["samples"]:
        lengths = ", ".join(f"{name} {value:,}" for name, value in told["length"].items())
        packed = f"{told['forwards_per_step']:.1f} forwards of {report.seq_length:,} tokens a step, {told['filled']:.0%} full"
        rows += [
            ("tokens a sample", lengths),
            ("an epoch", f"{told['steps_per_epoch']:,} steps of {global_batch_size:,} samples; packed: {packed}"),
        ]
    if report.cut:
        named = ", ".join(where for where, _ in report.cut[:5]) + (", ..." if len(report.cut) > 5 else "")
        rows.append(("cut at a turn", f"{len(report.cut):,} longer than {report.seq_length:,} tokens: {named}"))
    reasons = report.reasons()
    rows += [("bad", f"{count:,} x {printable(reason)}") for reason, count in reasons[:REASONS]]
    if len(reasons) > REASONS:
        rest = sum(count for _, count in reasons[REASONS:])
        rows.append(("bad", f"{rest:,} for {len(reasons) - REASONS:,} other reasons"))
    print("\n".join(f"{name:<16} {value}" for name, value in rows))


@contextmanager
def _progress(label: str, total: int | None) -> Iterator[Callable[[object], None]]:
    """A bar on stderr, where that is a terminal; yields what moves it on by one record and counts the bad."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[bad]} bad"), console=console, disable=not console.is_terminal
    ) as bar:
        task, bad = bar.add_task(label, total=total, bad=0), 0

        def advance(checked) -> None:
            nonlocal bad
            bad += checked.reason is not None
            bar.update(task, advance=1, bad=bad)

        yield advance
