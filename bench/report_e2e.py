"""Tables of host overhead, training steps and decoding."""

from m3kernels.bench.peers import OURS
from m3kernels.bench.report_tables import (
    absent,
    cell,
    copy_rate,
    escape,
    gemm_rate,
    machine,
    markdown,
    other_cell,
    quickest,
    spread,
    status,
)
from m3kernels.bench.rows import EVERYONE, Cell, Source, fastest, groups, is_ours, number, ours_in, peer_title, time_of

# one column for what an op and a model call differently
SAME = {"hf": "eager", "hf+liger": "liger"}
HOST_TITLES = {"eager": "eager, HF"}
COLUMNS = ("hf", "hf+liger")
BY_HAND = (
    " HF + Liger parts: Liger has no Ministral 3 patch, so its RMSNorm, SwiGLU, rotary and loss are put into the model by "
    "hand."
)


def cell_title(key: Cell) -> str:
    """A train or decode cell in words."""
    if key[0] == "train":
        _, size, modality, mode, seq, batch, recompute = key
        return f"{_size(size)} {modality}, {mode}, S {seq}, batch {batch}" + (", recomputed" if recompute else "")
    _, size, batch, prompt, new_tokens, images = key
    if new_tokens == 0:
        return f"{_size(size)} vision tower, {images} images of different sizes"
    prompt = f"{prompt} with {images} image{'s' * (images > 1)}" if images else prompt
    return f"{_size(size)} decode, batch {batch}, prompt {prompt}" + (f", {new_tokens} new" if new_tokens else "")


def _size(size: str) -> str:
    return str(size).upper()


def host_table(source: Source) -> str:
    """What x pass, a column a peer: microseconds a call with their spread."""
    found = groups(source.rows)
    columns = list(dict.fromkeys(SAME.get(r["peer"], r["peer"]) for r in source.rows if not is_ours(r["peer"])))
    columns += list(dict.fromkeys(r["peer"] for r in source.rows if is_ours(r["peer"])))
    lines = []
    for (_, what, which), group in found.items():
        merged = {SAME.get(peer, peer): row for peer, row in group.items()}
        lines.append([str(what).replace("_", " "), which, *(_host_cell(merged.get(p)) for p in columns)])
    titles = [HOST_TITLES.get(p, peer_title(p)) for p in columns]
    return "\n\n".join([markdown(["what", "pass", *titles], lines, left=2), *_reasons(source)])


def _host_cell(row: dict | None) -> str:
    if row is None:
        return "–"
    return row["status"] if time_of(row) is None else spread(time_of(row))


def _reasons(source: Source) -> list[str]:
    """Why rows have no time, each reason once with the peers and what they were to run."""
    reasons: dict[str, list[str]] = {}
    for row in source.rows:
        if row["status"] not in ("ok", "imprecise"):
            name = f"{peer_title(row['peer'])} {' '.join(str(v) for v in cell_words(row))}"
            reasons.setdefault(f"{row['status']}: {row.get('reason') or 'no reason given'}", []).append(name)
    lines = [f"- {escape(reason)} ({escape('; '.join(dict.fromkeys(names)))})" for reason, names in reasons.items()]
    return ["\n".join(lines)] if lines else []


def cell_words(row: dict) -> list[str]:
    return [row["what"].replace("_", " ")] if row["kind"] == "host" else [cell_title(groups([row]).popitem()[0])]


def host_caption(source: Source) -> str:
    return (
        f"Host time of issuing one call in microseconds, median (p20–p80), on {machine(source)}. Inputs are so small that "
        f"the GPU waits for the host: what short sequences, decoding and small batches pay{absent(source)}."
    )


def ends(keys: list[Cell]) -> list[Cell]:
    """Of each model trained one way the shortest and the longest step; every cell of decoding."""
    models: dict[tuple, list[Cell]] = {}
    for key in keys:
        models.setdefault(key[:4] if key[0] == "train" else key, []).append(key)
    return [key for cells in models.values() for key in dict.fromkeys((cells[0], cells[-1]))]


def compact(sources: list[Source], brief: bool = False) -> str:
    """Training steps and decoded tokens: the best peers beside ours. Milliseconds, and GiB of ours and of HF.

    Args:
        brief: only the :func:`ends`.
    """
    titles = [
        "ms a step or a token",
        "HF",
        "HF + Liger parts",
        "other best",
        "m3kernels",
        "over the best peer",
        "peak GiB (HF)",
    ]
    lines = []
    for source in sources:
        found = groups(source.rows)
        for key in ends(list(found)) if brief else found:
            group = found[key]
            best, ours, peer = quickest(group), ours_in(group), fastest(group, ours=False)
            cells = [cell_title(key), *(cell(group.get(p), best) for p in COLUMNS), other_cell(group, best, COLUMNS)]
            lines.append([*cells, _named(ours, best, OURS), _over(peer, ours), _memory(ours, group.get("hf"))])
    return markdown(titles, lines)


def _named(row: dict | None, best: dict | None, column: str = "") -> str:
    """A time, and whose it is where the column does not say so."""
    named = row is None or row["peer"] == column or row["status"] == "missing"
    return cell(row, best) + ("" if named else f" ({peer_title(row['peer'])})")


def _over(peer: dict | None, ours: dict | None) -> str:
    if peer is None or ours is None or time_of(ours) is None:
        return "–"
    return f"{time_of(peer).median / time_of(ours).median:.2f}×"


def _memory(ours: dict | None, base: dict | None) -> str:
    mine, theirs = ((r or {}).get("peak_gib") for r in (ours, base))
    text = number(mine)
    return text if theirs is None else f"{text} ({number(theirs)})"


def train_table(source: Source) -> str:
    """Every peer of every cell."""
    titles = ["cell", "peer", "attention", "ms a step", "tokens/s", "MFU", "peak GiB", "weights GiB"]
    titles += ["loss error", "norm error", "gradient error", "status"]
    lines = []
    for where, row in _cells(source):
        line = [
            where,
            peer_title(row["peer"]),
            row.get("attention") or "–",
            _time(row),
            number(row.get("tokens_per_s")),
        ]
        line += [_percent(row.get("mfu")), number(row.get("peak_gib")), number(row.get("weights_gib"))]
        line += [_error(row.get(f"{name}_error")) for name in ("loss", "grad_norm", "grad")]
        lines.append([*line, status(row)])
    return markdown(titles, lines, left=3)


def decode_table(source: Source) -> str:
    """Every peer of every cell."""
    titles = ["cell", "peer", "ms a token", "first token ms", "tokens/s", "copy rate", "peak GiB", "logits error"]
    titles += ["same argmax", "status"]
    lines = []
    for where, row in _cells(source):
        line = [where, peer_title(row["peer"]), _time(row), number(row.get("ttft_ms")), number(row.get("tokens_per_s"))]
        line += [_percent(row.get("bandwidth_share")), number(row.get("peak_gib")), _error(row.get("logits_error"))]
        lines.append([*line, _percent(row.get("argmax_agreement")), status(row)])
    return markdown(titles, lines, left=2)


def generation_table(source: Source) -> str:
    """A line a cell, a column a peer: milliseconds a token, and to the first one."""
    found = groups(source.rows)
    peers = list(dict.fromkeys(row["peer"] for row in source.rows if row["peer"] != EVERYONE))
    lines = [[cell_title(key), *(_token(group.get(peer)) for peer in peers)] for key, group in found.items()]
    return markdown(["ms a token (ms to the first)", *map(peer_title, peers)], lines)


def _token(row: dict | None) -> str:
    if row is None:
        return "–"
    if time_of(row) is None:
        return row["status"]
    first = row.get("ttft_ms")
    return number(time_of(row).median) + ("" if first is None else f" ({number(first)})")


def _cells(source: Source) -> list[tuple[str, dict]]:
    """(title, row); the title stands with the first row of its cell only."""
    found = []
    for key, group in groups(source.rows).items():
        found += [("" if i else cell_title(key), row) for i, row in enumerate(group.values())]
    return found


def _time(row: dict) -> str:
    return spread(time_of(row))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def brief_caption(models: list[Source], before: Source | None) -> str:
    """Under README's table; ``before``: the source whose machine was already named."""
    what = {
        "train": "A step is forward and backward without an optimizer",
        "decode": "A token is decoded after the prompt",
    }
    parts = []
    for known, source in zip([before, *models], models):
        parts.append(f"{what[source.suite]}, on {machine(source, known)}.{allowed(source)}{by_hand(source)}")
    return " ".join([*parts, "Medians; GiB: peak of allocated memory, weights included."])


def train_caption(source: Source) -> str:
    return (
        f"One training step (forward and backward, no optimizer) on {machine(source)}. Median (p20–p80); MFU: the FLOPs of "
        f"the step, recomputing not counted, as a share of a bare GEMM's {gemm_rate(source)}; peak: allocated memory, weights "
        f"included.{allowed(source)}{by_hand(source)}"
    )


def decode_caption(source: Source) -> str:
    return (
        f"One decoded token on {machine(source)}. Median (p20–p80); copy rate: bytes of weights and cache that a token must "
        f"read, over its time, as a share of the measured {copy_rate(source)}. torch.compile: `generate()` compiles the forward "
        f"by itself when it is given a static cache.{allowed(source)}{by_hand(source)}"
    )


def by_hand(source: Source) -> str:
    return BY_HAND if any("liger" in row["peer"].split("+") for row in source.rows) else ""


def allowed(source: Source) -> str:
    """What a peer's results may differ by, which the rows carry."""
    for row in source.rows:
        if isinstance(row.get("bound"), dict):
            named = ", ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in row["bound"].items())
            return f" Each peer equals Hugging Face's own model before it is timed; bounds: {named}."
    return ""
