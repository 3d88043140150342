"""Bars, dots and lines as SVG: what report_plots' panels look like. The same bytes for the same panels and matplotlib."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from m3kernels.bench.peers import ORDER, OURS
from m3kernels.bench.rows import EVERYONE, Source, is_ours, peer_title

# Okabe and Ito's colours, which people with any colour vision tell apart; ours is the vermilion one. There are more peers
# than colours: those that share one meet in no panel, or differ by FA4, and are told apart by hatch, marker and dashes
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, PINK = "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #cc79a7".split()
COLOURS = {
    "eager": "#9a9a9a",
    "hf": "#9a9a9a",
    "torch.compile": SKY,
    "liger": GREEN,
    "hf+liger": GREEN,
    "torch": ORANGE,
}
COLOURS |= {"hf+compile": SKY, "hf+compile-whole": BLUE, "quack": PINK, "cce": BLUE, OURS: "#d55e00"}
COLOURS |= {"sdpa flash": PINK, "cudnn": BLUE, "flex": SKY, "fa2": ORANGE, "fa3": YELLOW, "fa4": BLACK}
COLOURS |= {"peft": GREEN, "peft+compile": SKY, "bf16 weight": BLUE}
SPARE = (YELLOW, PINK, BLUE, BLACK, ORANGE, SKY)
MARKERS = "ovs^DPX<>ph"
HATCHES = (None, "////", "....", "xxxx")
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "svg.hashsalt": "m3kernels",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "hatch.linewidth": 0.6,
}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.axisbelow": True}


@dataclass(frozen=True)
class Entry:
    """One peer's value and its text; without a value the text says what became of it."""

    peer: str
    value: float | None
    text: str


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from ``base``, grouped: (label, entries)."""

    title: str
    unit: str
    groups: list[tuple[str, list[Entry]]]
    base: float = 0.0
    log: bool = False

    def peers(self) -> Iterable[str]:
        return (entry.peer for _, entries in self.groups for entry in entries)

    def height(self) -> float:
        """In bars."""
        return sum(self._slots(label, entries) + 0.7 for label, entries in self.groups) + 3.2

    @staticmethod
    def _slots(label: str, entries: list[Entry]) -> float:
        """Of bars; a label of several lines needs as much where there are few bars."""
        return max(len(entries), 1.1 * len(label.splitlines()))

    def draw(self, axes, looks: "Looks") -> None:
        y, ticks = 0.0, []
        for label, entries in self.groups:
            slots = self._slots(label, entries)
            ticks.append((y + (slots - 1) / 2, label))
            for i, entry in enumerate(entries):
                self._bar(axes, looks, y + (slots - len(entries)) / 2 + i, entry)
            y += slots + 0.7
        axes.set_ylim(y - 0.9, -0.8)
        axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
        axes.tick_params(axis="y", length=0)
        self._scale(axes)
        axes.axvline(self.base, color="black", linewidth=0.8)

    def _bar(self, axes, looks: "Looks", y: float, entry: Entry) -> None:
        if entry.value is not None:
            hatch = looks.hatch(entry.peer)
            colour = looks.colour(entry.peer)
            axes.barh(
                y, entry.value - self.base, 0.86, self.base, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
        at = self.base if entry.value is None else max(entry.value, self.base)
        weight = "bold" if is_ours(entry.peer) else "normal"
        axes.annotate(
            entry.text, (at, y), (3, 0), textcoords="offset points", va="center", fontsize=6.5, fontweight=weight
        )

    def _scale(self, axes) -> None:
        values = [e.value for _, entries in self.groups for e in entries if e.value is not None] or [1.0]
        axes.set_xlabel(self.unit)
        if not self.log:
            axes.set_xlim(self.base, self.base + 1.22 * (max(values) - self.base or 1.0))
            return
        axes.set_xscale("log")
        low, high = min(*values, self.base), max(*values, self.base)
        axes.set_xlim(0.85 * low, high * (high / low) ** 0.18 * 1.3)
        steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if high > 2.5 * low else (0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 2)
        ticks = [t for t in steps if 0.85 * low <= t <= 1.3 * high]
        axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axes.minorticks_off()


@dataclass(frozen=True)
class Dots:
    """A line per label with each peer's value on it, and a bar where the limit is."""

    title: str
    unit: str
    groups: list[tuple[str, list[Entry]]]
    limits: list[float]

    def peers(self) -> Iterable[str]:
        return (entry.peer for _, entries in self.groups for entry in entries)

    def height(self) -> float:
        """In bars."""
        return 1.9 * len(self.groups) + 4

    def draw(self, axes, looks: "Looks") -> None:
        for y, ((_, entries), limit) in enumerate(zip(self.groups, self.limits)):
            axes.axhline(y, color="#dddddd", linewidth=0.7, zorder=0)
            axes.plot([limit, limit], [y - 0.45, y + 0.45], color="black", linewidth=1.6)
            for entry in entries:
                if entry.value is not None:
                    self._dot(axes, looks, y, entry)
            failed = ", ".join(f"{peer_title(e.peer)} {e.text}" for e in entries if e.value is None)
            axes.annotate(
                failed, (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=6
            )
        axes.set_yticks(range(len(self.groups)), [label for label, _ in self.groups])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(self.groups) - 0.4, -0.6)
        axes.set_xlim(0)
        axes.set_xlabel(self.unit)

    @staticmethod
    def _dot(axes, looks: "Looks", y: float, entry: Entry) -> None:
        """Ours is a ring, so that a peer at the same place is seen inside it."""
        colour, marker = looks.colour(entry.peer), looks.marker(entry.peer)
        if is_ours(entry.peer):
            axes.scatter(
                entry.value, y, marker=marker, s=58, facecolors="none", edgecolors=colour, linewidths=2, zorder=4
            )
        else:
            axes.scatter(
                entry.value, y, marker=marker, s=32, color=colour, edgecolors="white", linewidths=0.4, zorder=3
            )


@dataclass(frozen=True)
class Lines:
    """Each peer's values over labelled sizes in order: peer -> (value or None, hollow) per label."""

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[tuple[float | None, bool]]]

    def peers(self) -> Iterable[str]:
        return self.series

    def height(self) -> float:
        """In bars."""
        return 17

    def draw(self, axes, looks: "Looks") -> None:
        for peer, points in self.series.items():
            at = [(x, y, hollow) for x, (y, hollow) in enumerate(points) if y is not None]
            width, colour = (2.2 if is_ours(peer) else 1.2), looks.colour(peer)
            line = {"color": colour, "linewidth": width, "linestyle": looks.dashes(peer), "zorder": 2}
            axes.plot([x for x, _, _ in at], [y for _, y, _ in at], **line)
            for x, y, hollow in at:
                look = {"marker": looks.marker(peer), "s": 34, "zorder": 3, "edgecolors": colour}
                axes.scatter(x, y, facecolors="white" if hollow else colour, **look)
        axes.set_xticks(range(len(self.labels)), ["\n".join(label.rsplit(" ", 1)) for label in self.labels])
        axes.set_xlim(-0.3, len(self.labels) - 0.7)
        axes.set_ylim(0)
        axes.set_ylabel(self.unit)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)


Panel = Bars | Dots | Lines


class Looks:
    """Colour, marker, hatch and dashes of every peer of one figure."""

    def __init__(self, panels: list[Panel]):
        present = dict.fromkeys(p for panel in panels for p in panel.peers() if p != EVERYONE)
        known = [peer for peer in ORDER if peer in present and not is_ours(peer)]
        others = [peer for peer in present if peer not in known and not is_ours(peer)]
        self.order = known + others + [peer for peer in present if is_ours(peer)]
        families = {p: OURS if is_ours(p) else p.removesuffix("+fa4") for p in self.order}
        self._colours = {p: COLOURS[family] for p, family in families.items() if family in COLOURS}
        unknown = [peer for peer in self.order if peer not in self._colours]
        free = [c for c in SPARE if c not in self._colours.values()] or list(SPARE)
        self._colours |= {peer: free[i % len(free)] for i, peer in enumerate(unknown)}

    def colour(self, peer: str) -> str:
        return self._colours[peer]

    def marker(self, peer: str) -> str:
        return "o" if peer == OURS else MARKERS[1 + self.order.index(peer) % (len(MARKERS) - 1)]

    def hatch(self, peer: str) -> str | None:
        return HATCHES[self._nth(peer)]

    def dashes(self, peer: str) -> str:
        return DASHES[self._nth(peer)]

    def _nth(self, peer: str) -> int:
        """How many with the same colour come before; with FA4 at least one, so that it looks so wherever it stands."""
        earlier = [self.colour(p) for p in self.order[: self.order.index(peer)]].count(self.colour(peer))
        return max(earlier, int(peer.endswith("+fa4"))) % len(HATCHES)


def _legend(figure, panels: list[Panel], looks: Looks, title: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles, lines = [], isinstance(panels[0], Lines)
    for peer in looks.order:
        look = {"color": looks.colour(peer), "label": peer_title(peer)}
        if isinstance(panels[0], Bars):
            handles.append(
                Patch(facecolor=look["color"], label=look["label"], hatch=looks.hatch(peer), edgecolor="white")
            )
        else:
            look |= {"marker": looks.marker(peer), "linestyle": looks.dashes(peer) if lines else ""}
            ring = {"markerfacecolor": "none", "markeredgewidth": 2} if is_ours(peer) and not lines else {}
            handles.append(Line2D([], [], **look, **ring))
    if any(isinstance(panel, Dots) for panel in panels):
        handles.append(Line2D([], [], color="black", marker="|", markersize=9, linewidth=0, label="measured limit"))
    look = {"frameon": False, "fontsize": 8, "title_fontsize": 9.5, "alignment": "left"}
    figure.legend(handles=handles, loc="outside upper left", ncols=min(8, len(handles)), title=title, **look)


def _columns(panels: list[Panel], count: int) -> list[list[Panel]]:
    """Panels in order, one column after the other, about equally high."""
    total, columns, filled = sum(p.height() for p in panels), [[]], 0.0
    for panel in panels:
        if columns[-1] and len(columns) < count and filled + panel.height() / 2 > len(columns) * total / count:
            columns.append([])
        columns[-1].append(panel)
        filled += panel.height()
    return columns


def figure(panels: list[Panel], columns: int, title: str):
    """A figure of all panels in columns, with one legend; the caller closes it."""
    from matplotlib import pyplot as plt

    looks, stacked = Looks(panels), _columns(panels, columns)
    highest = max(sum(p.height() for p in column) for column in stacked)
    made = plt.figure(figsize=(10, 0.9 + 0.125 * highest), layout="constrained")
    grid = made.add_gridspec(1, len(stacked))
    for i, column in enumerate(stacked):
        heights = [p.height() for p in column]
        spare = highest - sum(heights)
        cells = grid[i].subgridspec(len(column) + (spare > 0.5), 1, height_ratios=heights + [spare] * (spare > 0.5))
        for j, panel in enumerate(column):
            axes = made.add_subplot(cells[j])
            axes.set_title(panel.title)
            panel.draw(axes, looks)
    _legend(made, panels, looks, title)
    return made


def save(panels: list[Panel], columns: int, title: str, source: Source, target: Path) -> None:
    """Draws one picture, with its file's digest inside.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(STYLE):
        made = figure(
            panels, columns, f"{title}: {source.head['gpu']}, {source.head['date'][:10]}, {source.head['commit']}"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(target, format="svg", metadata={"Date": None, "Description": stamp(source)})
        plt.close(made)


def stamp(source: Source) -> str:
    """What a picture says about the results that it shows."""
    return f"{source.name} sha256 {source.digest}"
