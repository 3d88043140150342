"""Trains our own Ministral 3 on any number of processes, sharded by --tp, and prints one loss whatever the layout.

    python examples/parallel.py --steps 5
    torchrun --nproc-per-node=4 examples/parallel.py --tp 2 --steps 5

Without --model it is a random tiny one on random tokens, on the CPU over gloo, or on GPUs over NCCL. The batch is the same for
every layout, so the losses are, too; --dtype float64 shows it to twelve digits.
"""

import argparse
import os

import torch
import torch.distributed as dist
from tiny import tiny_config

import m3kernels
from m3kernels.models.ministral3 import Config, Ministral3, parallelize, set_recompute
from m3kernels.models.ministral3.recompute import RUN
from m3kernels.parallel import make_mesh

VOCAB = 264


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a checkpoint; a random tiny model by default")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer; the others split the batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="rows a step, over all ranks")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", choices=tuple(RUN), default="none")
    parser.add_argument("--plain", action="store_true", help="without the kernels")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    mesh = make_mesh(tp=args.tp) if dist.is_initialized() else None
    rank, ranks = (mesh.get_local_rank("dp"), mesh["dp"].size()) if mesh else (0, 1)
    if args.batch % ranks:
        parser.error(f"--batch {args.batch} does not divide over {ranks} data-parallel ranks")

    model = make_model(args, mesh, device)
    set_recompute(model, args.recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.text.vocab_size
    # a few rows that repeat, so that there is something to learn
    rows = torch.randint(5, vocab, (4 * args.batch, args.seq), generator=generator)
    for step in range(args.steps):
        chosen = torch.randint(len(rows), (args.batch,), generator=generator)
        ids = rows[chosen].chunk(ranks)[rank].to(device)
        loss = model(ids, labels=ids, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not mesh or dist.get_rank() == 0:
            print(f"step {step + 1:3}  loss {loss.item():.12g}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_model(args: argparse.Namespace, mesh, device) -> Ministral3:
    """Patched, then sharded; weights are drawn alike on every rank, or read into the shards."""
    dtype = getattr(torch, args.dtype)
    patch = (lambda model: None) if args.plain else m3kernels.patch
    if args.model:
        options = {"dtype": dtype, "device": device, "mesh": mesh, "prepare": patch, "progress": mesh is None}
        return Ministral3.from_pretrained(args.model, **options).train()
    torch.manual_seed(0)
    model = Ministral3(Config.from_hf(tiny_config(VOCAB))).to(device, dtype).train()
    patch(model)
    return parallelize(model, mesh) if mesh else model


if __name__ == "__main__":
    main()
