"""The finetune script of Megatron-Bridge's page, on top of ``m3kernels finetune``.

    torchrun --nproc-per-node=8 finetune_ministral3_vl.py --pretrained-checkpoint DIR --dataset-type hf \\
        --peft-scheme lora dataset.maker_name=make_cord_v2_dataset train.global_batch_size=32 train.train_iters=1000
"""

import sys

from m3kernels.cli.finetune import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
