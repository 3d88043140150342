"""The one table of how parameters are split over tensor-parallel ranks: sharding, loading, checks and the docs read it."""

import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path

from m3kernels.models.ministral3.config import Config
from m3kernels.models.ministral3.merging import LORA_A, LORA_B, MAGNITUDE, is_adapter
from m3kernels.parallel import ParallelError

TEXT = "model.language_model."
LAYER = TEXT + "layers.*."
BEGIN, END = "<!-- placements -->", "<!-- /placements -->"


@dataclass(frozen=True)
class Row:
    """Parameters of one kind.

    Attributes:
        names: pattern of transformers' runtime names.
        dim: which dimension is split, None for none.
        reads, leaves: what comes in before the product, and what happens to its result.
    """

    names: str
    dim: int | None
    reads: str = ""
    leaves: str = ""

    @property
    def placement(self) -> str:
        """As DTensor has it."""
        return "Replicate" if self.dim is None else f"Shard({self.dim})"

    @property
    def gradient(self) -> str:
        """What becomes of the gradient: every rank saw other tokens with a whole parameter, so there it is summed."""
        return "summed over tp" if self.dim is None else self.placement


ROWS = (
    Row(TEXT + "embed_tokens.weight", 0, "all ids", "reduce-scatter over tokens"),
    Row(LAYER + "input_layernorm.weight", None, "this rank's tokens", "all-gather of tokens"),
    Row(LAYER + "self_attn.[qkv]_proj.weight", 0, "all tokens", "this rank's heads"),
    Row(LAYER + "self_attn.o_proj.weight", 1, "this rank's heads", "reduce-scatter over tokens"),
    Row(LAYER + "post_attention_layernorm.weight", None, "this rank's tokens", "all-gather of tokens"),
    Row(LAYER + "mlp.gate_proj.weight", 0, "all tokens", "this rank's part of F"),
    Row(LAYER + "mlp.up_proj.weight", 0, "all tokens", "this rank's part of F"),
    Row(LAYER + "mlp.down_proj.weight", 1, "this rank's part of F", "reduce-scatter over tokens"),
    Row(TEXT + "norm.weight", None, "this rank's tokens", "all-gather of tokens"),
    Row("lm_head.weight", 0, "all tokens", "this rank's part of the vocabulary, into the loss"),
    Row("model.vision_tower.*", None, "all images", "each rank places the image tokens of its own slice"),
    Row("model.multi_modal_projector.*", None, "all images", "each rank places the image tokens of its own slice"),
)


# how an adapter's parts are split, by how its layer's weight is. A column layer's A and a row layer's B see a part of the sum
# on every rank: both are whole, and their gradients are summed
ADAPTERS = {
    0: (
        Row(f"*.{LORA_A}", None, "all tokens", "rank R, the same on all ranks"),
        Row(f"*.{LORA_B}", 0, "rank R", "with the layer's"),
        Row(f"*.{MAGNITUDE}", 0, "norms of this rank's rows", "with the layer's"),
    ),
    1: (
        Row(f"*.{LORA_A}", 1, "this rank's part of the input", "rank R, a part of the sum"),
        Row(f"*.{LORA_B}", None, "rank R, a part of the sum", "added to the layer's part of the sum"),
        Row(
            f"*.{MAGNITUDE}", None, "norms of rows, their squares summed over tp", "scales the layer's part of the sum"
        ),
    ),
    None: (
        Row(f"*.{LORA_A}", None, "as the layer", "rank R"),
        Row(f"*.{LORA_B}", None, "rank R", "with the layer's"),
        Row(f"*.{MAGNITUDE}", None, "norms of all rows", "with the layer's"),
    ),
}
LAYERS = {0: "of q, k, v, gate, up", 1: "of o, down", None: "in vision tower and projector"}


def row_of(name: str) -> Row:
    """The row that a parameter belongs to; an adapter's part goes by its layer's weight.

    Raises:
        ParallelError: no row has it.
    """
    if is_adapter(name):
        dim = row_of(name.rpartition(".")[0] + ".weight").dim
        return next(row for row in ADAPTERS[dim] if fnmatch.fnmatchcase(name, row.names))
    for row in ROWS:
        if fnmatch.fnmatchcase(name, row.names):
            return row
    raise ParallelError(f"parameter {name} is in no row of the placement table: add one to sharding.ROWS")


def check(config: Config, tp: int) -> None:
    """Raises ParallelError where a size of the model does not divide, with what to do about it."""
    text = config.text
    kv = text.num_kv_heads
    if kv % tp:
        allowed = [n for n in range(1, kv + 1) if not kv % n]
        raise ParallelError(
            f"tp={tp} does not divide the {kv} key-value heads; allowed: {', '.join(map(str, allowed))}. "
            "For more ranks raise dp instead"
        )
    if text.intermediate_size % tp:
        raise ParallelError(f"tp={tp} does not divide intermediate_size {text.intermediate_size}: take a smaller tp")
    if text.vocab_rows % tp:
        rows = -(-text.vocab_size // tp) * tp
        raise ParallelError(
            f"tp={tp} does not divide the vocabulary of {text.vocab_rows}: pad it to {rows} rows with "
            f"Ministral3.from_pretrained(..., pad_vocab_to={tp}); save_pretrained strips them again"
        )


def table() -> str:
    """The rows as Markdown, for the docs."""
    lines = ["| parameter | placement on tp | gradient | reads | result |", "|---|---|---|---|---|"]
    for row in ROWS:
        lines.append(f"| `{row.names}` | {row.placement} | {row.gradient} | {row.reads} | {row.leaves} |")
    for dim, rows in ADAPTERS.items():
        for row in rows:
            name = f"`{row.names}` {LAYERS[dim]}"
            lines.append(f"| {name} | {row.placement} | {row.gradient} | {row.reads} | {row.leaves} |")
    return "\n".join(lines)


def write_into(path: str | os.PathLike) -> None:
    """Puts the table between the marks of a Markdown file."""
    path = Path(path)
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    write_into("docs/parallel.md")
