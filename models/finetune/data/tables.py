"""Rows of JSONL, JSON and parquet files, saved datasets and the Hub, read when they are asked for."""

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.records import BadRecord, kind_of

SUFFIXES = (".jsonl", ".json", ".parquet")
_BLOCK = 2**20


class Table(Protocol):
    """Raw rows by index.

    Attributes:
        name, fingerprint: as a Source's.
        columns: of its rows, or of the first readable one; None where none is.
        folder: what relative paths in it are relative to.
    """

    name: str
    fingerprint: str
    columns: tuple[str, ...] | None
    folder: Path | None

    def __len__(self) -> int: ...

    def row(self, i: int) -> dict: ...

    def where(self, i: int) -> str: ...


class JsonLines:
    """A JSONL file of which only the places of its lines are in memory.

    Raises:
        FinetuneError: its first line begins a list.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.name = path, path.parent, path.name
        offsets, lines, digest = [], [], hashlib.blake2b(digest_size=16)
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    offsets.append(at)
                    lines.append(number)
                at += len(line)
        self.offsets, self.lines = np.asarray(offsets, dtype=np.int64), np.asarray(lines, dtype=np.int64)
        self.fingerprint = digest.hexdigest()
        self._refuse_a_list()
        self.columns = _first_columns(self)

    def _refuse_a_list(self) -> None:
        if not len(self) or not self._line(0).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return
        try:
            is_whole = len(self) > 1 and isinstance(self.row(0), list)
        except BadRecord:
            is_whole = False
        if is_whole:
            raise FinetuneError(
                f'{self.where(0)} is a list; each line must be an object, such as {{"messages": [...]}}'
            )
        raise FinetuneError(f"{self.path} is one JSON list, not a line for each record: name it .json")

    def __len__(self) -> int:
        return len(self.offsets)

    def row(self, i: int) -> dict:
        line = self._line(_checked(i, len(self)))
        try:
            return json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise BadRecord(self.where(i), f"the line is no JSON ({error.msg}: character {error.pos + 1})") from error
        except ValueError as error:
            raise BadRecord(self.where(i), f"the line is no JSON ({error})") from error
        except RecursionError as error:
            raise BadRecord(self.where(i), "the line's lists and objects lie too deep in each other") from error

    def _line(self, i: int) -> bytes:
        # opened each time: a handle shared by forked workers would share its position
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[i]))
            return file.readline()

    def where(self, i: int) -> str:
        return f"{self.name}:{self.lines[i]}"


class JsonList:
    """A JSON file of one list, in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.name = path, path.parent, path.name
        data = path.read_bytes()
        try:
            self.rows = json.loads(data)
        except ValueError as error:
            raise FinetuneError(f"{path} is no JSON ({error}); one object a line goes into a .jsonl file") from error
        except RecursionError as error:
            raise FinetuneError(f"{path}: its lists and objects lie too deep in each other") from error
        if not isinstance(self.rows, list):
            raise FinetuneError(f"{path} holds {kind_of(self.rows)}; it must be a list of objects, or .jsonl")
        self.fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.columns = _first_columns(self)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> dict:
        return self.rows[_checked(i, len(self))]

    def where(self, i: int) -> str:
        return f"{self.name} row {i}"


class ArrowRows:
    """A ``datasets.Dataset``, memory-mapped, its images as bytes or paths.

    Args:
        place: prefix of a row's place.
    """

    def __init__(self, data, *, name: str, place: str, fingerprint: str, folder: Path | None = None) -> None:
        self.data, self.name, self.place, self.folder = undecoded(data), name, place, folder
        self.fingerprint, self.columns = fingerprint, tuple(data.column_names)

    def __len__(self) -> int:
        return len(self.data)

    def row(self, i: int) -> dict:
        return self.data[_checked(i, len(self))]

    def where(self, i: int) -> str:
        return f"{self.place}{i}"


class Chained:
    """Several tables, one after the other."""

    def __init__(self, tables: list[Table], *, name: str) -> None:
        self.tables, self.name = tables, name
        self.ends = np.cumsum([len(table) for table in tables])
        self.fingerprint = combined(table.fingerprint for table in tables)
        self.columns = next((table.columns for table in tables if table.columns is not None), None)
        self.folder = tables[0].folder

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, i: int) -> dict:
        table, at = self._find(i)
        return table.row(at)

    def where(self, i: int) -> str:
        table, at = self._find(i)
        return table.where(at)

    def folder_of(self, i: int) -> Path | None:
        return self._find(i)[0].folder

    def _find(self, i: int) -> tuple[Table, int]:
        which = int(np.searchsorted(self.ends, _checked(i, len(self)), side="right"))
        return self.tables[which], i - int(self.ends[which - 1] if which else 0)


@dataclass(frozen=True)
class TableSource:
    """A table's rows as records.

    Attributes:
        convert: makes the record of a row; takes the row, and the folder of its relative paths.
    """

    table: Table
    convert: Callable[[dict, Path | None], dict]

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def fingerprint(self) -> str:
        return self.table.fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        try:
            row = self.table.row(i)
            folder = self.table.folder_of(i) if isinstance(self.table, Chained) else self.table.folder
            return self.convert(row, folder)
        except BadRecord as error:
            raise error.at(self.where(i)) from error

    def where(self, i: int) -> str:
        return self.table.where(i)

    def check_columns(self, needed: tuple[str, ...]) -> None:
        """Raises FinetuneError where the rows have not all of these columns."""
        if self.table.columns is not None:
            require_columns(self.name, self.table.columns, needed)


@dataclass(frozen=True)
class Every:
    """Every n-th record of a source, or all the others: a fixed validation split where a set has none."""

    source: TableSource
    step: int
    taken: bool

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-{self.step}-{self.taken}"

    def __len__(self) -> int:
        held_out = len(self.source) // self.step
        return held_out if self.taken else len(self.source) - held_out

    def __getitem__(self, i: int) -> dict:
        return self.source[self._index(i)]

    def where(self, i: int) -> str:
        return self.source.where(self._index(i))

    def _index(self, i: int) -> int:
        i = _checked(i, len(self))
        return (i + 1) * self.step - 1 if self.taken else i + i // (self.step - 1)


def require_columns(name: str, given: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Raises FinetuneError naming both."""
    missing = [column for column in needed if column not in given]
    if missing:
        raise FinetuneError(
            f"{name} has the columns {', '.join(given)}; needed: {', '.join(needed)} (missing: {', '.join(missing)}). "
            "Rename its columns, or use the maker of its schema"
        )


def open_file(path: Path) -> Table:
    """A JSONL, JSON or parquet file.

    Raises:
        FinetuneError: no such file, another kind, or one that is damaged.
    """
    if path.exists() and not path.is_file():
        raise FinetuneError(f"the data file {path} is a folder, pipe or device; allowed: a file, {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FinetuneError(f"the data file {path} does not exist")
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".json":
        return JsonList(path)
    if path.suffix == ".parquet":
        datasets = need_datasets("parquet files")
        try:
            with bars_on_terminals():
                data = datasets.load_dataset("parquet", data_files=str(path), split="train")
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise FinetuneError(f"{path} is no parquet file, or a damaged one ({error})") from error
        return ArrowRows(
            data, name=path.name, place=f"{path.name} row ", fingerprint=file_fingerprint(path), folder=path.parent
        )
    raise FinetuneError(f"{path} is of an unknown kind; allowed: {', '.join(SUFFIXES)}")


def need_datasets(what: str):
    """Hugging Face's datasets library, which JSON and JSONL do without."""
    try:
        import datasets
    except ImportError as error:
        raise FinetuneError(f"{what} need the datasets library; pip install 'm3kernels[train]'") from error
    return datasets


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Within it datasets draws progress bars only where stderr is a terminal: in a pipe each state of a bar is a line."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def undecoded(data):
    """The same Dataset or IterableDataset, its images as bytes or paths, also those in lists."""
    from datasets import Image, List

    with bars_on_terminals():
        for name, feature in (data.features or {}).items():
            if isinstance(feature, Image):
                data = data.cast_column(name, Image(decode=False))
            elif isinstance(feature, List) and isinstance(feature.feature, Image):
                data = data.cast_column(name, List(Image(decode=False)))
    return data


def file_fingerprint(path: Path) -> str:
    """Of size, modification time, first and last megabyte: large files are not read for it."""
    stat = path.stat()
    digest = hashlib.blake2b(f"{stat.st_size}-{stat.st_mtime_ns}".encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_BLOCK))
        file.seek(max(0, stat.st_size - _BLOCK), os.SEEK_SET)
        digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def combined(fingerprints) -> str:
    return hashlib.blake2b("\n".join(fingerprints).encode(), digest_size=16).hexdigest()


def convert_each(rows: Iterator[dict], place: str, start: int, convert: Callable) -> Iterator[dict | BadRecord]:
    """Records of streamed rows; a bad one comes as its BadRecord, since an iterator that raises is over."""
    for n, row in enumerate(rows, start):
        try:
            yield convert(row, None)
        except BadRecord as error:
            yield error.at(f"{place}{n}")


def _first_columns(table) -> tuple[str, ...] | None:
    for i in range(min(len(table), 100)):
        try:
            row = table.row(i)
        except BadRecord:
            continue
        if isinstance(row, dict):
            return tuple(row)
    return None


def _checked(i: int, length: int) -> int:
    if not 0 <= i < length:
        raise IndexError(f"record {i} of {length}")
    return int(i)
