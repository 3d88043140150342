"""Inspected samples on a terminal, and as one HTML page."""

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.text import Text

from m3kernels.models.finetune.data.inspect import Group, Shown

MARKS = ("⟦", "⟧")
# a record could otherwise steer the terminal
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_VISIBLE |= {code: f"\\x{code:02x}" for code in range(128, 160)}
STYLES = {True: "bold green", False: "default"}
CONTROL = "dim"
COLUMNS = 48
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #1f2328 }}
section {{ border: 1px solid #d1d9e0; border-radius: 6px; margin: 1em 0; padding: 0 1em }}
h2 {{ font-size: 1.1em }} h3 {{ font-size: 1em; font-family: monospace; overflow-wrap: anywhere }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 monospace }}
img {{ max-width: 100%; border: 1px solid #d1d9e0; margin: 0 .5em .5em 0; vertical-align: top }}
.supervised {{ background: #aceebb }} .control, .image {{ color: #57606a; font-size: .9em }}
.control.supervised, .image.supervised {{ color: #116329 }} .bad {{ color: #cf222e }} .note {{ color: #57606a }}
</style>
<h1>{title}</h1>
<p class="note"><span class="supervised">green</span>: supervised tokens, which the loss counts.
<span class="control">grey</span>: control tokens. Point at a piece for its number of tokens.</p>
{body}
</html>
"""


def print_groups(groups: Iterable[Group], console: Console) -> int:
    """Prints samples as they come; returns how many of them are bad.

    Supervised tokens are green; where there are no colours they stand in brackets. Images are drawn on a terminal of
    true or 256 colours alone.
    """
    bare = console.color_system is None or console.no_color
    how = f"in {MARKS[0]}{MARKS[1]}" if bare else "green"
    console.print(Text(f"supervised tokens are {how}"), style=CONTROL)
    bad = 0
    for group in groups:
        if group.title:
            console.print(Text(f"\n== {group.title}", style="bold"), soft_wrap=True)
        for shown in group.samples:
            bad += shown.reason is not None
            _print_sample(shown, console, bare)
    return bad


def _print_sample(shown: Shown, console: Console, bare: bool) -> None:
    where = Text(f"\n{printable(shown.where)}", style="bold")
    console.print(where, Text(counts(shown), style=CONTROL), soft_wrap=True)
    if shown.reason is not None:
        console.print(Text(printable(shown.reason), style="red"), soft_wrap=True)
        return
    if not bare and console.color_system in ("256", "truecolor"):
        for picture in shown.pictures:
            console.print(blocks(picture, min(COLUMNS, console.width)))
    line, open_mark = Text(), False
    for span in shown.spans:
        if bare and span.supervised != open_mark:
            line.append(MARKS[0] if span.supervised else MARKS[1])
            open_mark = span.supervised
        style = STYLES[span.supervised] if span.kind == "text" or span.supervised else CONTROL
        line.append(f"[{span.text}]" if span.kind == "image" else printable(span.text), style=style)
    if open_mark:
        line.append(MARKS[1])
    console.print(line, soft_wrap=bare)


def printable(text: str) -> str:
    """Text with its control characters shown as symbols, line breaks and tabs apart."""
    return text.translate(_VISIBLE)


def counts(shown: Shown) -> str:
    """What is told beside a sample's place."""
    if shown.reason is not None:
        return "bad record"
    parts = [f"{shown.tokens} tokens, {shown.supervised} supervised"]
    parts += [f"image {n}: {width} x {height} pixels" for n, (height, width) in enumerate(shown.sizes, 1)]
    parts += [f"{shown.cut_turns} messages cut off at the end"] if shown.cut_turns else []
    return "; ".join(parts)


def blocks(picture: Image.Image, columns: int) -> Text:
    """A picture in coloured half blocks, two pixels a character."""
    rows = max(1, round(picture.height * columns / picture.width / 2))
    pixels = picture.resize((columns, 2 * rows)).load()
    text = Text(end="")
    for row in range(rows):
        for column in range(columns):
            upper, lower = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (pixels[column, 2 * row + n] for n in (0, 1)))
            text.append("▀", style=Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def html_page(groups: Iterable[Group], *, title: str) -> str:
    """A page that needs nothing else: its images are in it."""
    sections = []
    for group in groups:
        heading = f"<h2>{html.escape(group.title)}</h2>" if group.title else ""
        sections.append(f"<section>{heading}{''.join(map(_html_sample, group.samples))}</section>")
    return _PAGE.format(title=html.escape(title), body="\n".join(sections))


def _html_sample(shown: Shown) -> str:
    head = f'<h3>{html.escape(shown.where)}</h3><p class="note">{html.escape(counts(shown))}</p>'
    if shown.reason is not None:
        return f'{head}<p class="bad">{html.escape(shown.reason)}</p>'
    pictures = "".join(f'<img alt="image {n}" src="{_png(image)}">' for n, image in enumerate(shown.pictures, 1))
    spans = []
    for span in shown.spans:
        classes = f"{span.kind} supervised" if span.supervised else span.kind
        text = f"[{span.text}]" if span.kind == "image" else span.text
        spans.append(f'<span class="{classes}" title="{span.tokens} tokens">{html.escape(text)}</span>')
    return f"{head}<p>{pictures}</p><pre>{''.join(spans)}</pre>"


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
