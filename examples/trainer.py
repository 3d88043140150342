"""Finetune a Ministral 3 with Hugging Face's Trainer and m3kernels: one added line.

python examples/trainer.py                                    # a tiny random model, on any machine
python examples/trainer.py --model mistralai/Ministral-3-3B-Base-2512 --text my_notes.txt --bf16
"""

import argparse
import sys
from pathlib import Path

import torch
from tiny import load
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

import m3kernels


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or name of a Ministral 3; a tiny random one if left out")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text file to train on (this one)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-patch", action="store_true", help="train with transformers' own layers, to compare")
    args = parser.parse_args(argv)

    set_seed(0)
    model, tokenizer = load(args.model, torch.bfloat16 if args.bf16 else torch.float32)
    if not args.no_patch:
        print(m3kernels.patch(model))

    tokens = tokenizer(args.text.read_text())["input_ids"]
    rows = [tokens[i : i + args.length] for i in range(0, len(tokens) - args.length, args.length // 2)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="trainer-output",
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=2e-3 if args.model is None else 1e-5,
            bf16=args.bf16,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    sys.exit(not main())
