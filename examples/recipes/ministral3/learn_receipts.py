"""A small Ministral 3 learns to read receipts from nothing, then dark ones by LoRA, DoRA or its projector alone.

    python learn_receipts.py out            # about 6 minutes on one H100; --quick is a try on a CPU

    python learn_receipts.py --report SUMMARY.json      # the table in docs/finetune.md, from a kept file

Writes the checkpoints, adapters and metrics of four runs, ``summary.json`` and ``receipts.png`` into the folder. Adapters are
reloaded in plain transformers and PEFT, which must give the same answers.
"""

import argparse
import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import receipts
import tiny_checkpoint
import torch
from torch import nn

from m3kernels.bench.report import insert
from m3kernels.cli.demo_model import ModelSize
from m3kernels.models.finetune.config import DatasetConfig, FinetuneConfig
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.sources import open_source
from m3kernels.models.finetune.metrics import METRICS, read_metrics, smoothed
from m3kernels.models.finetune.progress import versions
from m3kernels.models.finetune.trainer import finetune
from m3kernels.models.recipes import ministral3_3b_finetune_config

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

IGNORED = -100
# what share of receipts must be read without one mistake
DOCS = Path(__file__).parents[3] / "docs" / "finetune.md"
BEGIN, END = "<!-- receipts -->", "<!-- /receipts -->"
TITLES = {"full": "all weights, from random ones", "lora": "LoRA", "dora": "DoRA", "projector": "the projector alone"}
REQUIRED = {"full": 0.85, "lora": 0.75, "dora": 0.75, "projector": 0.5}


@dataclass(frozen=True)
class Plan:
    """Attributes: receipts to train on, steps of the first run and of those that follow, receipts a step, model."""

    count: int = 24_000
    steps: int = 1500
    more_steps: int = 500
    batch: int = 64
    workers: int = 8
    size: ModelSize = ModelSize(
        hidden=256, layers=4, heads=8, kv_heads=4, intermediate=768, vision_hidden=192, vision_layers=4, vision_heads=6,
        vision_intermediate=576, original_positions=64,
    )  # fmt: skip


QUICK = Plan(count=256, steps=6, more_steps=3, batch=8, workers=0, size=ModelSize(hidden=64, intermediate=128))


def config(plan: Plan, name: str, folder: Path, data: Path, checkpoint: Path, **peft) -> FinetuneConfig:
    """A run on receipts; without ``peft`` of all weights."""
    full = not peft
    projector = name == "projector"
    made = ministral3_3b_finetune_config(
        name=name,
        dir=str(folder),
        pretrained_checkpoint=str(checkpoint),
        dataset_type="hf",
        peft=None if full or projector else peft["scheme"],
        freeze_language_model=True if projector else None,
        freeze_vision_model=True if projector else None,
        train_iters=plan.steps if full else plan.more_steps,
        global_batch_size=plan.batch,
        seq_length=16384,
        finetune_lr=1e-3 if full else 2e-3,
        lr_warmup_iters=(plan.steps if full else plan.more_steps) // 20,
        eval_interval=max(1, (plan.steps if full else plan.more_steps) // 8),
        save_interval=0,
    )
    dataset = dataclasses.replace(made.dataset, path=(str(data),), num_workers=plan.workers)
    validation = dataclasses.replace(made.validation, eval_iters=-(-200 // plan.batch), generate_samples=1)
    logger = dataclasses.replace(made.logger, log_interval=200)
    return dataclasses.replace(made, dataset=dataset, validation=validation, logger=logger)


@torch.no_grad()
def read_by(model: nn.Module, checkpoint: Path, data: Path, device: str) -> list[bool]:
    """Whether transformers' model reads each receipt of the validation set without a mistake, under teacher forcing."""
    source = open_source(
        DatasetConfig(type="hf", maker_name=("make_cord_v2_dataset",), path=(str(data),)), "valid", seed=0
    )
    encoder, right = Encoder.open(checkpoint), []
    for i in range(len(source)):
        encoded = encoder.encode(source[i])
        ids = torch.tensor(encoded.tokens, device=device)[None]
        (pixels,) = encoder.pixels(encoded)
        out = model(
            input_ids=ids,
            pixel_values=torch.from_numpy(pixels)[None].to(device, model.dtype),
            image_sizes=torch.tensor(encoded.sizes),
        ).logits[0]
        targets = torch.tensor(encoded.supervised, device=device)[1:]
        right.append(bool((out[:-1].argmax(-1) == ids[0, 1:])[targets].all()))
    return right


def reload(base: Path, adapter: Path | None, device: str, dtype: torch.dtype) -> nn.Module:
    """The model in plain transformers, with an adapter in plain PEFT."""
    from peft import PeftModel
    from transformers import Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration.from_pretrained(base, dtype=dtype).to(device).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def last_exact(run: Path) -> float:
    return [row["valid_exact"] for row in read_metrics(run / METRICS) if "valid_exact" in row][-1]


def plot(folder: Path, runs: dict[str, Path]) -> None:
    """Loss and receipts read without a mistake, of all runs."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, run in runs.items():
        rows = read_metrics(run / METRICS)
        train = [row for row in rows if "loss" in row]
        valid = [row for row in rows if "valid_exact" in row]
        left.plot([r["step"] for r in train], smoothed([r["loss"] for r in train], 0.98), label=name)
        right.plot([r["step"] for r in valid], [r["valid_exact"] for r in valid], marker="o", label=name)
    left.set(xlabel="step", ylabel="training loss per supervised token", yscale="log")
    right.set(xlabel="step", ylabel="validation receipts without a mistake", ylim=(0, 1))
    right.legend()
    figure.savefig(folder / "receipts.png", dpi=110)


def table(summary: dict, name: str) -> str:
    """For the docs, with the picture beside it."""
    lines = ["| trained | receipts | read without a mistake | required | reloaded in plain transformers and PEFT |"]
    lines.append("|---|---|---:|---:|---:|")
    before = summary["dark receipts before"]
    for kind, title in TITLES.items():
        found = summary[kind]
        again = f"{found['reloaded']:.1%}" if "reloaded" in found else "–"
        set_of = "black on white" if kind == "full" else "white on black"
        lines.append(f"| {title} | {set_of} | {found['exact']:.1%} | {summary['required'][kind]:.0%} | {again} |")
    note = f"Of 200 receipts of digits that training did not see. Before the finetunes {before:.1%} of those in white on black "
    note += f"were read. {summary['seconds']} s in all on one {summary['machine']}; `{name}`."
    picture = "![Loss and receipts read without a mistake](finetune/receipts.png)"
    return "\n".join(lines) + f"\n\n{note}\n\n{picture}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("receipts-run"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--report", type=Path, metavar="SUMMARY", help="write the table of docs/finetune.md")
    args = parser.parse_args()
    if args.report is not None:
        summary = json.loads(args.report.read_text(encoding="utf-8"))
        DOCS.write_text(insert(DOCS, table(summary, args.report.parent.name), BEGIN, END), encoding="utf-8")
        return 0
    folder, plan, began = args.folder, QUICK if args.quick else Plan(), time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    light = receipts.write(folder / "light", count=plan.count)
    dark = receipts.write(folder / "dark", count=plan.count // 3, dark=True)
    start = tiny_checkpoint.write(folder / "start", size=plan.size)

    full = finetune(config(plan, "full", folder, light, start))
    base = full.exported["model"]
    dtype = torch.float32
    before = read_by(reload(base, None, device, dtype), start, dark, device)
    summary = {"dark receipts before": sum(before) / len(before), "full": {"exact": last_exact(full.folder)}}
    runs = {"full": full.folder}
    for name in ("lora", "dora", "projector"):
        run = finetune(config(plan, name, folder, dark, base, scheme=name))
        runs[name] = run.folder
        adapter = run.exported.get("adapter")
        model = reload(base if adapter else run.exported["model"], adapter, device, dtype)
        again = read_by(model, start, dark, device)
        summary[name] = {"exact": last_exact(run.folder), "reloaded": sum(again) / len(again)}
    summary["required"] = REQUIRED
    summary["seconds"] = round(time.time() - began)
    summary["machine"] = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    summary["versions"] = versions(("torch", "transformers", "peft", "m3kernels"))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    plot(folder, runs)
    print(json.dumps(summary, indent=2))
    missed = [name for name, least in REQUIRED.items() if summary[name]["exact"] < least]
    if missed and not args.quick:
        print(f"below what is required: {', '.join(missed)}")
    return 0 if args.quick else bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
