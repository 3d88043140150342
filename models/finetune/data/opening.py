"""Sets by path or Hub id and split, for makers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.tables import (
    SUFFIXES,
    ArrowRows,
    Chained,
    Table,
    TableSource,
    bars_on_terminals,
    convert_each,
    need_datasets,
    open_file,
    require_columns,
    undecoded,
)

# how folders and file names spell a split
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


class NoSplit(FinetuneError):
    """A set that has not the split asked for."""


@dataclass(frozen=True)
class RowStream:
    """Rows of the Hub as records, as they come; a bad one comes as its BadRecord.

    Attributes:
        first: how many rows were skipped.
    """

    data: object
    name: str
    fingerprint: str
    convert: Callable[[dict, Path | None], dict]
    first: int = 0

    def __iter__(self) -> Iterator[dict | BadRecord]:
        return convert_each(iter(self.data.skip(self.first)), f"{self.name}:", self.first, self.convert)

    def skip(self, n: int) -> "RowStream":
        return replace(self, first=self.first + n)


def open_rows(
    path: str,
    *,
    split: str,
    columns: tuple[str, ...],
    convert: Callable[[dict, Path | None], dict],
    subset: str | None = None,
    streaming: bool = False,
) -> TableSource | RowStream:
    """A set whose rows become records.

    Args:
        path: a file, a folder of JSONL, JSON or parquet files, one that ``datasets.save_to_disk`` wrote, or a Hub id.
        columns: that each row must have.
        subset: configuration of a set on the Hub.
        streaming: read a set from the Hub as it comes.

    Raises:
        NoSplit: the set is there, this split of it is not.
        FinetuneError: nothing there, or other columns.
    """
    place = Path(path)
    # one that is missing is not asked of the Hub
    is_file = place.is_file() or (place.suffix in SUFFIXES and not place.exists())
    if streaming and not place.exists() and not is_file:
        return _stream(path, split=split, columns=columns, convert=convert, subset=subset)
    if is_file:
        table = open_file(place)
    elif (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        table = _saved(place, split)
    elif place.is_dir():
        table = open_folder(place, split)
    else:
        table = _hub(path, split, subset)
    source = TableSource(table, convert)
    source.check_columns(columns)
    return source


def open_folder(folder: Path, split: str) -> Table:
    """The files of a folder that belong to a split by their name or folder; all of them are train where none does."""
    splits = _splits_of_files(folder)
    if not splits:
        raise FinetuneError(f"{folder} holds no {', '.join(SUFFIXES)} file")
    found = sorted({name for name in splits.values() if name}) or ["train"]
    default = None if any(splits.values()) else "train"
    chosen = [file for file, name in splits.items() if (name or default) == _spelled(split)]
    if not chosen:
        raise NoSplit(f"{folder} has no split {split!r}; it has: {', '.join(found)}")
    tables = [open_file(file) for file in chosen]
    return tables[0] if len(tables) == 1 else Chained(tables, name=folder.name)


def names_splits(path: Path) -> bool:
    """Whether a path is a folder that tells splits apart, by the names of its files or as a saved DatasetDict."""
    return (path / "dataset_dict.json").is_file() or (path.is_dir() and any(_splits_of_files(path).values()))


def _splits_of_files(folder: Path) -> dict[Path, str | None]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith("."))
    # a folder of JSONL or parquet may hold other JSON beside it, such as dataset_infos.json
    lines = [file for file in files if file.suffix != ".json"]
    return {file: _split_of(file.relative_to(folder)) for file in lines or files}


def _split_of(file: Path) -> str | None:
    words = [part.lower() for part in file.parts[:-1]] + [file.stem.lower().replace("_", "-").split("-")[0]]
    return next((_spelled(word) for word in reversed(words) if _spelled(word) in SPLIT_NAMES), None)


def _spelled(split: str) -> str:
    return next((name for name, spellings in SPLIT_NAMES.items() if split.lower() in spellings), split)


def _saved(folder: Path, split: str) -> Table:
    datasets = need_datasets("saved datasets")
    with bars_on_terminals():
        data = datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        if split not in data:
            raise NoSplit(f"{folder} has no split {split!r}; it has: {', '.join(data)}")
        data = data[split]
    elif _spelled(split) != "train":
        raise NoSplit(f"{folder} is one saved set without splits; it is taken as train")
    return _arrow(data, f"{folder.name}[{split}]")


def _hub(path: str, split: str, subset: str | None) -> Table:
    return _arrow(_load(path, split, subset, streaming=False), f"{path}[{split}]")


def _arrow(data, name: str) -> ArrowRows:
    return ArrowRows(data, name=name, place=f"{name}:", fingerprint=data._fingerprint)


def _stream(path: str, *, split: str, columns, convert, subset: str | None) -> RowStream:
    data = undecoded(_load(path, split, subset, streaming=True))
    if data.column_names is not None:
        require_columns(path, tuple(data.column_names), columns)
    version = getattr(data.info, "version", None)
    size = getattr(data.info, "dataset_size", None)
    return RowStream(data, f"{path}[{split}]", f"{path}-{subset}-{split}-{version}-{size}", convert)


def _load(path: str, split: str, subset: str | None, *, streaming: bool):
    if Path(path).is_absolute() or len(Path(path).parts) > 2:
        raise FinetuneError(f"{path} does not exist; allowed: a file, a folder, or a Hub id owner/name")
    datasets = need_datasets("sets of the Hub")
    try:
        with bars_on_terminals():
            return datasets.load_dataset(path, subset, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        if str(error).startswith(("Unknown split", "Bad split")):
            raise NoSplit(f"{path} has no split {split!r}: {error}") from error
        raise FinetuneError(
            f"the set {path} cannot be opened ({error}); is it a folder here or a Hub id, and HF_TOKEN set where it "
            "needs one?"
        ) from error
