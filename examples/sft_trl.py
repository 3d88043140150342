"""Finetune a Ministral 3 on conversations with TRL's SFTTrainer, LoRA and m3kernels: one added line.

    python examples/sft_trl.py                                    # a tiny random model, on any machine
    python examples/sft_trl.py --model mistralai/Ministral-3-3B-Reasoning-2512 --dataset trl-lib/Capybara --packing

SFTTrainer computes its loss itself, in chunks; norms, rotary embedding and SwiGLU run fused.
"""

import argparse
import sys

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tiny import load
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import m3kernels


def additions() -> Dataset:
    """Questions that a tiny model can learn the form of."""
    sums = [(a, b) for a in range(12) for b in range(12)]
    turns = [[{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": f"{a + b}"}] for a, b in sums]
    return Dataset.from_dict({"messages": turns})


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or name of a Ministral 3; a tiny random one if left out")
    parser.add_argument("--dataset", help="a dataset with a 'messages' column; small sums if left out")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--packing", action="store_true", help="several conversations a row")
    parser.add_argument("--no-patch", action="store_true", help="train with transformers' own layers, to compare")
    args = parser.parse_args(argv)

    set_seed(0)
    model, tokenizer = load(args.model, torch.bfloat16)
    if not args.no_patch:
        print(m3kernels.patch(model))

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="sft-output",
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2 if args.model is None else 1e-4,
            packing=args.packing,
            max_length=64 if args.model is None else 4096,
            bf16=args.model is not None,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset(args.dataset, split="train") if args.dataset else additions(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    sys.exit(not main())
