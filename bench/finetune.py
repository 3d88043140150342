"""Whole finetune steps of Ministral 3 at real shapes, optimizer included: m3kernels' trainer beside Hugging Face's.

    python -m m3kernels.bench.finetune --out FILE.ndjson [--size 3b] [--mode full lora] [--peers NAME ...]
    python -m m3kernels.bench.finetune --report FILE.ndjson          # the table in docs/finetune.md, from a kept file

A step is what a user waits for: batch to the GPU, forward, backward, clipping, AdamW. All peers train the same random
checkpoint, of bf16, on the same random tokens with every label supervised, one row a step. Each runs in a process of its
own, since what one leaves in the allocator is another's lack of memory. Hugging Face's Trainer has weights and moments in
bf16, ours masters and moments in fp32 unless the row says stochastic: the memory is not that of the same thing.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from m3kernels.bench.model_shapes import LORA_TARGETS, PAD_TOKEN, SIZES, build, step_flops
from m3kernels.bench.results import commit
from m3kernels.bench.train_peers import become, liger
from m3kernels.models.finetune.progress import versions

DOCS = Path(__file__).parents[1] / "docs" / "finetune.md"
BEGIN, END = "<!-- steps -->", "<!-- /steps -->"
WARMUP, LR = 3, 1e-5
HF, LIGER, MIXED, STOCHASTIC = "HF Trainer", "HF Trainer + Liger parts", "m3kernels", "m3kernels, bf16 stochastic"
PEERS = (HF, LIGER, MIXED, STOCHASTIC)
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "liger-kernel", "m3kernels")


@dataclass(frozen=True)
class Job:
    """One peer's steps."""

    peer: str
    size: str
    mode: str
    seq: int
    steps: int
    checkpoint: str


def tokens(job: Job, step: int) -> torch.Tensor:
    """(seq,) random ids of a step, on the host."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(PAD_TOKEN + 1, SIZES[job.size].vocab, (job.seq,), generator=generator)


def ours(job: Job) -> tuple[list[float], list[float]]:
    """(milliseconds, loss) of each step of our trainer."""
    from m3kernels.models.finetune.build import build as build_run
    from m3kernels.models.finetune.build import model_on_meta, open_checkpoint
    from m3kernels.models.finetune.data.plan import MicroBatch, StepBatch
    from m3kernels.models.finetune.process import process_group
    from m3kernels.models.finetune.step import run_step, share
    from m3kernels.models.recipes import RECIPES
    from m3kernels.parallel import make_mesh

    config = RECIPES[job.size](
        pretrained_checkpoint=job.checkpoint,
        peft=None if job.mode == "full" else job.mode,
        precision_config="bf16_stochastic" if job.peer == STOCHASTIC else "bf16_mixed",
        finetune_lr=LR,
        lr_warmup_iters=0,
        tensor_model_parallel_size=1,
    )
    with process_group(10) as process:
        source = open_checkpoint(config)
        model = model_on_meta(config, source)
        built = build_run(model, config, source, make_mesh(), process.device, progress=False)

        def step(i: int) -> float:
            ids = tokens(job, i)
            labels = ids.clone()
            labels[0] = -100
            micro = MicroBatch(ids, labels, (0, job.seq), None, (), (f"row {i}",), job.seq - 1)
            batch = StepBatch(i, (micro,), job.seq, job.seq - 1, job.seq, 1, (), 1, 0, 0)
            return run_step(built, batch, share(built, batch, False, False), config, i, lambda doing: None).loss

        return timed(step, job.steps)


def timed(step: Callable[[int], float], steps: int) -> tuple[list[float], list[float]]:
    spans, losses = [], []
    for i in range(WARMUP + steps):
        if i == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        losses.append(step(i))
        torch.cuda.synchronize()
        spans.append(1e3 * (time.perf_counter() - began))
    return spans[WARMUP:], losses


def trainer(job: Job) -> tuple[list[float], list[float]]:
    """(milliseconds, loss) of each step of transformers' Trainer, with PEFT where adapters are trained."""
    from transformers import Ministral3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = Ministral3ForCausalLM.from_pretrained(job.checkpoint, dtype=torch.bfloat16, device_map="cuda")
    model.config.use_cache = False
    if job.mode != "full":
        from peft import LoraConfig, get_peft_model

        options = {"r": 32, "lora_alpha": 32, "target_modules": LORA_TARGETS, "use_dora": job.mode == "dora"}
        model = get_peft_model(model, LoraConfig(**options))
    spans, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == WARMUP:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            spans.append(1e3 * (time.perf_counter() - self.began))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    rows = [{"input_ids": ids, "labels": ids} for ids in (tokens(job, i) for i in range(WARMUP + job.steps))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            max_steps=len(rows),
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.033,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=True,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # by the forward's signature, which Liger's part replaces
            disable_tqdm=True,
        )
        with become(model, (liger,) if job.peer == LIGER else ()):
            Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return spans[WARMUP:], losses


def measure(job: Job) -> dict:
    """A row."""
    spans, losses = (ours if job.peer in (MIXED, STOCHASTIC) else trainer)(job)
    ms = statistics.median(spans)
    flops = step_flops(SIZES[job.size], "text", job.mode, 1, job.seq).total
    return {
        "kind": "finetune", "peer": job.peer, "size": job.size, "mode": job.mode, "seq": job.seq, "steps": job.steps,
        "ms": ms, "fastest_ms": min(spans), "slowest_ms": max(spans), "tokens_per_s": 1e3 * job.seq / ms,
        "tflops": flops / ms / 1e9, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_loss": losses[0], "last_loss": losses[-1], "gpu": torch.cuda.get_device_name(), "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }  # fmt: skip


def checkpoint(size: str, folder: Path) -> Path:
    """Random bf16 weights of the language model as a Hugging Face checkpoint, which every peer starts from."""
    model = build(SIZES[size], "text", torch.device("cuda"))
    model.save_pretrained(folder)
    return folder


def run(args: argparse.Namespace) -> int:
    """Rows, one after the other; what fails is a row with its reason."""
    with tempfile.TemporaryDirectory() as folder:
        make = f"from m3kernels.bench.finetune import *; checkpoint({args.size!r}, Path({folder!r}))"
        subprocess.run([sys.executable, "-c", make], check=True)
        for mode in args.mode:
            for peer in args.peers:
                job = Job(peer, args.size, mode, args.seq, args.steps, folder)
                code = f"import json; from m3kernels.bench.finetune import *; print(json.dumps(measure({job!r})))"
                ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                lines = ended.stdout.strip().splitlines()
                if ended.returncode:
                    reason = (ended.stderr.strip().splitlines() or ["no output"])[-1]
                    row = {
                        "kind": "finetune",
                        "peer": peer,
                        "size": args.size,
                        "mode": mode,
                        "seq": args.seq,
                        "failed": reason,
                    }
                else:
                    row = json.loads(lines[-1])
                print(show(row), flush=True)
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


def show(row: dict) -> str:
    name = f"{row['size']} {row['mode']:<5} S{row['seq']} {row['peer']:<28}"
    if "failed" in row:
        return f"{name} failed: {row['failed']}"
    return (
        f"{name} {row['ms']:7.1f} ms {row['tokens_per_s']:7.0f} tokens/s {row['tflops']:4.0f} TFLOP/s peak "
        f"{row['peak_gib']:5.1f} GiB  loss {row['first_loss']:.4f} to {row['last_loss']:.4f}"
    )


def table(rows: list[dict], name: str) -> str:
    """For the docs, with what it was measured on."""
    lines = ["| step | peer | ms | tokens/s | TFLOP/s | peak GiB |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        what = f"{row['size'].upper()} {row['mode']}, {row['seq']} tokens"
        if "failed" in row:
            lines.append(f"| {what} | {row['peer']} | {row['failed']} | | | |")
            continue
        lines.append(
            f"| {what} | {row['peer']} | {row['ms']:.0f} | {row['tokens_per_s']:.0f} | {row['tflops']:.0f} | "
            f"{row['peak_gib']:.1f} |"
        )
    first = next(row for row in rows if "failed" not in row)
    software = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    note = f"Medians of {first['steps']} steps, optimizer included, on one {first['gpu']}; {software}; "
    modes = {row["mode"]: row["commit"] for row in rows if "failed" not in row}
    note += ", ".join(f"{mode} at commit {commit}" for mode, commit in modes.items()) + f"; `{name}`."
    return "\n".join(lines) + f"\n\n{note}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="3b")
    parser.add_argument("--mode", nargs="+", choices=("full", "lora", "dora"), default=["full", "lora"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("finetune.ndjson"))
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table of docs/finetune.md")
    args = parser.parse_args(argv)
    if args.report is not None:
        rows = [json.loads(line) for line in args.report.read_text(encoding="utf-8").splitlines()]
        from m3kernels.bench.report import insert

        DOCS.write_text(insert(DOCS, table(rows, args.report.name), BEGIN, END), encoding="utf-8")
        return 0
    if not torch.cuda.is_available():
        print("bench finetune needs a CUDA GPU with 80 GB for the 3B's full steps; torch sees none", file=sys.stderr)
        return 2
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
