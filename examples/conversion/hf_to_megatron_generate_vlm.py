"""The flags of Megatron-Bridge's generation script, on top of ``m3kernels generate``.

    python hf_to_megatron_generate_vlm.py --hf_model_path mistralai/Ministral-3-3B-Instruct-2512-BF16 \\
        --megatron_model_path native/3b --image_path cat.png --prompt "Describe this image." --max_new_tokens 100

    torchrun --nproc-per-node=2 hf_to_megatron_generate_vlm.py --hf_model_path DIR --image_path cat.png --tp 2
"""

import argparse
import os
import sys

from m3kernels.cli import generate

PROMPT = "Describe this image."
MAX_NEW_TOKENS = 20
# why another number than 1 is refused
SPLITS = {
    "pp": "a token passes through every stage before the next can begin: pipeline stages would wait for each other",
    "ep": "Ministral 3 has no experts to spread",
    "etp": "Ministral 3 has no experts to split",
}


def main(argv: list[str] | None = None) -> int:
    parser = generate.parser_of(
        os.path.basename(__file__), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bridge = parser.add_argument_group("of Megatron-Bridge")
    bridge.add_argument("--megatron-model-path", metavar="DIR", help="another name of --checkpoint-path")
    for name, reason in SPLITS.items():
        bridge.add_argument(f"--{name}", type=int, default=1, metavar="1", help=f"1 alone: {reason}")
    bridge.add_argument("--trust-remote-code", action="store_true", help="accepted; no remote code is ever run")
    parser.set_defaults(max_new_tokens=MAX_NEW_TOKENS)
    args = parser.parse_args(generate.dashed(sys.argv[1:] if argv is None else argv))
    for name, reason in SPLITS.items():
        if getattr(args, name) != 1:
            parser.error(f"--{name} {getattr(args, name)}; allowed: 1 ({reason}); take --tp")
    if args.megatron_model_path is not None and args.checkpoint_path is not None:
        parser.error("--megatron-model-path is --checkpoint-path: give one")
    if args.trust_remote_code and os.environ.get("RANK", "0") == "0":
        print("note: --trust-remote-code has no effect here", file=sys.stderr)
    args.checkpoint_path = args.checkpoint_path or args.megatron_model_path
    if args.prompt is None and args.batch_file is None:
        args.prompt = PROMPT
    return generate.answer(args, name=parser.prog)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
