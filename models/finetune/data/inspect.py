"""Samples as they are trained on, in pieces that can be shown: text, control tokens and images, supervised or not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from m3kernels.models.finetune.data.encode import Encoded, Encoder
from m3kernels.models.finetune.data.images import decode
from m3kernels.models.finetune.data.pixels import TOKEN_PIXELS
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.data.reading import walk
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.sources import Source, Stream

PICTURE_SIDE = 512


@dataclass(frozen=True)
class Span:
    """Tokens of one kind.

    Attributes:
        kind: text, control (one control token) or image (all tokens of one image).
        text: what they stand for.
        tokens: how many.
        supervised: whether the loss counts them.
    """

    kind: Literal["text", "control", "image"]
    text: str
    tokens: int
    supervised: bool


@dataclass(frozen=True, eq=False)
class Shown:
    """A sample.

    Attributes:
        where: its place.
        spans: of all its tokens; none of a bad one.
        pictures: its images, no longer than 512 pixels a side.
        sizes: (height, width) in pixels that the model sees each in.
        cut_turns: messages cut off at the end to fit.
        reason: what is wrong with a bad one.
    """

    where: str
    spans: tuple[Span, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    cut_turns: int = 0
    reason: str | None = None

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    @property
    def supervised(self) -> int:
        return sum(span.tokens for span in self.spans if span.supervised)


@dataclass(frozen=True, eq=False)
class Group:
    """Samples that share a forward, or one alone.

    Attributes:
        title: what the forward is; empty of a sample alone.
        samples: in their order.
    """

    title: str
    samples: tuple[Shown, ...]


def spans_of(encoder: Encoder, encoded: Encoded) -> tuple[Span, ...]:
    """All tokens of a sample, divided where their kind or supervision changes."""
    tokens, supervised = encoded.tokens.tolist(), encoded.supervised.tolist()
    sizes, found, at = iter(encoded.sizes), [], 0
    while at < len(tokens):
        name = encoder.control(tokens[at])
        stop = at + 1
        if tokens[at] == encoder.image_token:
            rows, columns = (side // TOKEN_PIXELS for side in next(sizes))
            # each row has a token that ends it
            stop = at + rows * (columns + 1)
            found.append(Span("image", f"image, {columns} x {rows} tokens", stop - at, supervised[at]))
        elif name is not None:
            found.append(Span("control", name, 1, supervised[at]))
        else:
            while stop < len(tokens) and supervised[stop] == supervised[at] and encoder.control(tokens[stop]) is None:
                stop += 1
            found.append(Span("text", encoder.decode(tokens[at:stop]), stop - at, supervised[at]))
        at = stop
    return tuple(found)


def show_encoded(encoder: Encoder, encoded: Encoded, where: str) -> Shown:
    """Raises BadRecord for an image that cannot be decoded."""
    pictures = tuple(_picture(reference, size) for reference, size in zip(encoded.images, encoded.sizes))
    return Shown(where, spans_of(encoder, encoded), pictures, encoded.sizes, encoded.cut_turns)


def show_samples(
    source: Source | Stream, encoder: Encoder, *, seq_length: int, indices: Sequence[int]
) -> Iterator[Group]:
    """Records by their indices, each as a group of its own; indices of a stream must rise."""
    for where, record in walk(source, indices):
        try:
            if isinstance(record, BadRecord):
                raise record
            shown = show_encoded(encoder, encoder.encode(record, seq_length=seq_length), where)
        except BadRecord as error:
            shown = Shown(error.where or where, reason=error.reason)
        yield Group("", (shown,))


def show_packed(plan: Plan, *, step: int, count: int) -> Iterator[Group]:
    """The first ``count`` micro batches of a step, as one rank alone has them. Records replaced come with their reasons,
    once each."""
    layout = plan.layout(step, 1)
    # one may be tried for several places
    bad = dict.fromkeys(pair for sample in layout.samples for pair in sample.bad)
    if bad:
        shown = tuple(Shown(where, reason=reason) for where, reason in bad)
        yield Group(f"step {step}: bad records that others stand in for", shown)
    for n, places in enumerate(layout.bins[0][:count]):
        samples = []
        for place in places:
            sample = layout.samples[place]
            try:
                samples.append(show_encoded(plan.encoder, sample.encoded, sample.where))
            except BadRecord as error:
                samples.append(Shown(sample.where, reason=error.reason))
        tokens = sum(len(layout.samples[place].encoded.tokens) for place in places)
        filled = f" of {plan.seq_length} ({tokens / plan.seq_length:.0%})" if plan.pack else ""
        yield Group(f"step {step}, forward {n + 1} of {len(layout.bins[0])}: {tokens} tokens{filled}", tuple(samples))


def _picture(reference, size: tuple[int, int]) -> Image.Image:
    """An image in the model's proportions, over white as the model sees it."""
    image = decode(reference).convert("RGBA")
    height, width = size
    scale = min(1, PICTURE_SIDE / max(size))
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
