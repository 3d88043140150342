"""docs/benchmarks.md with its plots, and the tables of README and of docs' pages, from result files.

    python -m m3kernels.bench.report [--check] [--file FILE.jsonl] [--musts]

Each section takes the newest file under bench/results that holds rows of its kind (or ``--file`` for all). README.md is
rewritten between ``<!-- bench -->`` and ``<!-- /bench -->``, docs/attention.md and docs/adapters.md likewise (always from the
newest file of their grid), docs/generation.md between ``<!-- decode -->`` and ``<!-- /decode -->``, docs/benchmarks.md as a
whole, and so is every picture under docs/bench. ``--check`` writes nothing and exits 1 when any of them is not what the files
give; a picture carries a digest of its file, so it needs no matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path

from m3kernels.bench import (
    adapter_grid,
    attention_grid,
    report_draw,
    report_e2e,
    report_plots,
    report_tables,
    results,
    targets,
)
from m3kernels.bench.report_targets import targets_table
from m3kernels.bench.rows import Source, sources

ROOT = Path(__file__).resolve().parents[1]
# where the package is installed without its tree
ELSEWHERE = Path("bench-report")
# not bench:ops, as it was: training and decoding stand between them too
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
# pages whose tables come from a grid's own file, and how the grid shows it
GRIDS = {"attention": attention_grid.show, "adapters": adapter_grid.show}
COMMAND = "m3kernels bench report"
SECTIONS = {"ops": "Ops", "host": "Host overhead", "train": "Training", "decode": "Decoding"}


def readme_section(found: dict[str, Source]) -> str:
    """README's tables: our ops, and where there are results a line for each model cell."""
    parts = []
    if "ops" in found:
        parts += [report_tables.readme_ops(found["ops"]), report_tables.ops_caption(found["ops"])]
    models = [found[suite] for suite in ("train", "decode") if suite in found]
    if models:
        parts += [report_e2e.compact(models, brief=True), report_e2e.brief_caption(models, found.get("ops"))]
    parts.append(
        "Every peer with its spread, host time, memory, errors, targets and plots: [`docs/benchmarks.md`](docs/benchmarks.md)."
    )
    return "\n\n".join(parts)


def page(found: dict[str, Source]) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        f"Made by `{COMMAND}` from the files under [`bench/results`](../bench/results); do not edit.",
    ]
    for suite, heading in SECTIONS.items():
        parts.append(f"## {heading}")
        if suite not in found:
            parts.append(f"No result file holds this yet: `m3kernels bench {suite}` on a GPU writes one.")
            continue
        summary, details = SECTION[suite](found[suite])
        parts += [*summary, report_tables.broken(found[suite]), *pictures(found[suite]), *details]
    parts += ["## Targets", targets_table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(source: Source) -> list[str]:
    """The section's plots; one without rows for it says so."""
    parts = []
    for plot in report_plots.PLOTS:
        if plot.suite == source.suite:
            has = bool(plot.panels(source.rows))
            parts.append(
                f"![{plot.title}](bench/{plot.name}.svg)\n\n{plot.title}. {plot.legend}"
                if has
                else f"{plot.title}: {plot.without}"
            )
    return parts


def ops_section(source: Source) -> tuple[list[str], list[str]]:
    """What stands before a section's pictures, and after them."""
    note = "Median (p20–p80); host µs: time until the call returns; peak: allocated above the inputs."
    details = ["### Every peer of every op", note, report_tables.every_peer(source)]
    return [report_tables.overview(source), report_tables.ops_caption(source)], details


def host_section(source: Source) -> tuple[list[str], list[str]]:
    return [report_e2e.host_table(source), report_e2e.host_caption(source)], []


def train_section(source: Source) -> tuple[list[str], list[str]]:
    details = ["### Every peer of every step", report_e2e.train_table(source)]
    return [report_e2e.compact([source]), report_e2e.train_caption(source)], details


def decode_section(source: Source) -> tuple[list[str], list[str]]:
    details = ["### Every peer of every decoding", report_e2e.decode_table(source)]
    return [report_e2e.compact([source]), report_e2e.decode_caption(source)], details


def generation_section(source: Source) -> str:
    """The table of docs/generation.md."""
    return f"{report_e2e.generation_table(source)}\n\n{report_e2e.decode_caption(source)}"


SECTION = {"ops": ops_section, "host": host_section, "train": train_section, "decode": decode_section}


def newest_grid(name: str) -> Path | None:
    """The grid's file with the latest date in its header."""
    found = results.RESULTS.glob(f"*/*-{name}.json")
    return max(found, key=lambda path: (json.loads(path.read_text())["machine"]["date"], path), default=None)


def grid_section(name: str, path: Path) -> str:
    """The tables of docs/<name>.md."""
    found = json.loads(path.read_text())
    source = Source(name, path, found["machine"], [], [])
    link = f"[`{source.name}`](../bench/results/{source.name})"
    said = report_tables.machine(source).replace(f"`{source.name}`", link)
    return f"Measured on {said}.\n\n{GRIDS[name](found)}"


def insert(path: Path, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The file with ``text`` between its two markers.

    Raises:
        OSError, ValueError: it cannot be read, or a marker is missing.
    """
    page = path.read_text()
    if begin not in page or end not in page:
        raise ValueError(f"{path.name} has no place for the tables: put {begin} and {end} on lines of their own")
    before, after = page.split(begin, 1)[0], page.split(end, 1)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def place() -> Path:
    """The source tree; ``./bench-report``, without a README, where there is none."""
    return ROOT if results.in_tree() else ELSEWHERE


def texts(found: dict[str, Source]) -> dict[Path, str]:
    """What each generated text file must hold.

    Raises:
        OSError, ValueError: README.md or a grid's page cannot be read or has no markers.
    """
    found_texts = {place() / "docs" / "benchmarks.md": page(found)}
    if place() == ROOT:
        readme = ROOT / "README.md"
        found_texts = {readme: insert(readme, readme_section(found))} | found_texts
        for name in GRIDS:
            page_of, measured = ROOT / "docs" / f"{name}.md", newest_grid(name)
            if measured is not None:
                markers = f"<!-- {name} -->", f"<!-- /{name} -->"
                found_texts[page_of] = insert(page_of, grid_section(name, measured), *markers)
        if "decode" in found:
            page_of, markers = ROOT / "docs" / "generation.md", ("<!-- decode -->", "<!-- /decode -->")
            found_texts[page_of] = insert(page_of, generation_section(found["decode"]), *markers)
    return found_texts


def differences(found: dict[str, Source]) -> list[str]:
    """One line for every generated file that is not what the results give."""
    lines = []
    for path, text in texts(found).items():
        if not path.is_file() or path.read_text() != text:
            lines.append(f"{path.relative_to(place())} is not what the result files give")
    pictures = wanted(found)
    for path, plot in pictures.items():
        if not path.is_file():
            lines.append(f"{path.relative_to(place())} is missing")
        elif report_draw.stamp(found[plot.suite]) not in path.read_text():
            lines.append(f"{path.relative_to(place())} shows other results than {found[plot.suite].name}")
    return lines + [f"{path.relative_to(place())} belongs to no plot" for path in stray(pictures)]


def wanted(found: dict[str, Source]) -> dict[Path, report_plots.Plot]:
    """The pictures that there are rows for."""
    plots = [plot for plot in report_plots.PLOTS if plot.suite in found and plot.panels(found[plot.suite].rows)]
    return {place() / "docs" / "bench" / f"{plot.name}.svg": plot for plot in plots}


def stray(pictures: dict[Path, report_plots.Plot]) -> list[Path]:
    return sorted(path for path in (place() / "docs" / "bench").glob("*.svg") if path not in pictures)


def write(found: dict[str, Source]) -> None:
    """Writes the texts and all pictures, and removes pictures that no longer belong.

    Raises:
        ImportError: matplotlib is not installed; the texts are written then, the pictures are as they were.
    """
    for path, text in texts(found).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pictures = wanted(found)
    for path, plot in pictures.items():
        source = found[plot.suite]
        report_draw.save(plot.panels(source.rows), plot.columns, plot.title, source, path)
    for path in stray(pictures):
        path.unlink()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a generated file differs")
    parser.add_argument("--file", type=Path, help="default: for each section the newest under bench/results")
    parser.add_argument("--musts", action="store_true", help="print which targets hold, and write nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 when ``--check`` finds a difference, 2 when there is nothing to read or nowhere to write."""
    args = parse(argv)
    try:
        found = sources(args.file)
        if not found:
            where = args.file or results.RESULTS
            print(f"no results in {where}: run m3kernels bench on a GPU first", file=sys.stderr)
            return 2
        if args.musts:
            print("\n".join(targets.table(s.rows, s.head) for suite, s in found.items() if suite != "host"))
            return 0
        if args.check:
            lines = differences(found)
            if lines:
                print("\n".join([*lines, f"run {COMMAND}"]), file=sys.stderr)
            return int(bool(lines))
        write(found)
        if place() == ELSEWHERE:
            print(f"wrote {ELSEWHERE / 'docs'} (in a clone it would be docs/ and README.md)")
    except ImportError:
        print(
            f"matplotlib is not installed: the plots under {place() / 'docs' / 'bench'} were not drawn", file=sys.stderr
        )
    except (OSError, ValueError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
