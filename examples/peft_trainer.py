"""Train a LoRA (or DoRA) on a Ministral 3 with Hugging Face's Trainer, without and with m3kernels, and compare.

    python examples/peft_trainer.py                               # a tiny random model, on any machine
    python examples/peft_trainer.py --model mistralai/Ministral-3-3B-Base-2512 --device cuda --dora

Both runs start from the same weights and take the same batches, in fp32. The adapter of the second is saved and loaded in
plain PEFT. Exits 1 if any loss of the second run, or that of the loaded adapter, is off by more than 1e-4 of it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import load
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

import m3kernels

BOUND = 1e-4  # fp32 rounding is about 1e-6 of a loss; the steps of an optimizer make it grow
LENGTH = 128  # tokens a sample


class Clock(TrainerCallback):
    """Seconds that each step takes, optimizer included."""

    def __init__(self):
        self.seconds = []

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.begin)


def base(args: argparse.Namespace):
    """(model, rows to train on), the same at every call."""
    set_seed(0)
    model, tokenizer = load(args.model, torch.float32, vision=True)
    tokens = tokenizer(Path(__file__).read_text())["input_ids"]
    rows = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH, LENGTH // 2)]
    return model, [{"input_ids": row, "labels": row} for row in rows]


def train(args: argparse.Namespace, patched: bool) -> tuple[list[float], float, PeftModel]:
    """(losses, seconds a step, the trained model)."""
    model, rows = base(args)
    # "q_proj" and the like would take the vision tower's too
    targets = m3kernels.peft.target_modules(model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_dora=args.dora))
    if patched:
        print(m3kernels.patch(model))
    else:
        model.print_trainable_parameters()

    clock = Clock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2 if args.model is None else 1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # the first step compiles kernels
    return losses, statistics.median(clock.seconds[1:] or clock.seconds), model


def differ(ours: list[float], plain: list[float]) -> float:
    """The largest relative difference; NaN where one is NaN."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(plain, dtype=torch.float64)
    return ((a - b).abs() / b.abs()).max().item()


@torch.no_grad()
def loss_of(model: PeftModel, rows: list[dict], device: str) -> float:
    batch = {k: v.to(device) for k, v in default_data_collator(rows[:4]).items()}
    return model.to(device).eval()(**batch).loss.item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or name of a Ministral 3; a tiny random one if left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dora", action="store_true", help="DoRA: a trained magnitude for each output as well")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("peft-output"), help="where the adapter goes")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA GPU; pass --device cpu")

    plain, plain_seconds, model = train(args, patched=False)
    del model  # one at a time: real ones are large
    ours, our_seconds, model = train(args, patched=True)
    apart = differ(ours, plain)
    print(f"\n{'step':>8} {'transformers':>14} {'m3kernels':>14} {'relative':>10}")
    for step, (a, b) in enumerate(zip(plain, ours), start=1):
        print(f"{step:>8} {a:>14.6f} {b:>14.6f} {differ([b], [a]):>10.1e}")
    print(f"{'s a step':>8} {plain_seconds:>14.4f} {our_seconds:>14.4f}")
    print(f"largest difference {apart:.1e}, allowed {BOUND:.0e}")

    model.save_pretrained(args.output)
    fresh, rows = base(args)
    trained = loss_of(model, rows, args.device)
    del model
    again = loss_of(PeftModel.from_pretrained(fresh, args.output), rows, args.device)
    reloaded = differ([again], [trained])
    print(f"adapter in {args.output}, loaded in plain PEFT: loss {again:.6f}, difference {reloaded:.1e}")
    # "not <=": NaN fails
    return int(not (apart <= BOUND and reloaded <= BOUND))


if __name__ == "__main__":
    sys.exit(main())
