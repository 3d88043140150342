"""Where records come from, by index or as a stream."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from m3kernels.models.finetune.config import DatasetConfig, FinetuneError
from m3kernels.models.finetune.data.makers import find_maker
from m3kernels.models.finetune.data.makers.local import make_local_dataset
from m3kernels.models.finetune.data.makers.mock import make_mock_dataset
from m3kernels.models.finetune.data.mixture import Mixture
from m3kernels.models.finetune.data.opening import NoSplit, names_splits
from m3kernels.models.finetune.data.records import BadRecord

TYPES = ("mock", "hf", "local", "preloaded")
Split = Literal["train", "valid", "test"]


@runtime_checkable
class Source(Protocol):
    """Records by index.

    Attributes:
        name: what it is called in messages.
        fingerprint: changes when the data does.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict:
        """The canonical record, its images not decoded.

        Raises:
            BadRecord: a row that is none.
        """

    def where(self, i: int) -> str:
        """A record's place, such as ``train.jsonl:12``."""


@runtime_checkable
class Stream(Protocol):
    """Records as they come. A bad one is yielded as its BadRecord, not raised: an iterator that raises is over."""

    name: str
    fingerprint: str

    def __iter__(self) -> Iterator[dict | BadRecord]: ...

    def skip(self, n: int) -> "Stream":
        """The same after n more records, bad ones counted."""


def open_source(
    config: DatasetConfig, split: Split, *, seed: int, say: Callable[[str], None] = lambda text: None
) -> Source | Stream | None:
    """The records of a split, of one set or several mixed.

    Args:
        seed: of a mixture's order.
        say: is told of each maker that is left out, since it has not this split.

    Returns:
        None where a validation or test split was not named and is not there.

    Raises:
        FinetuneError: unknown names, files that are missing or of other columns, a train split that is not there.
    """
    if config.type not in TYPES:
        raise FinetuneError(f"dataset.type={config.type!r}; allowed: {', '.join(TYPES)}")
    if config.type == "mock":
        return make_mock_dataset(split=split)
    sources = _made(config, split, say) if config.type == "hf" else _local(config, split)
    if len(sources) < 2:
        return sources[0] if sources else None
    if not all(isinstance(source, Source) for source in sources):
        raise FinetuneError("streamed sets are not mixed; take one maker, or dataset.streaming=false")
    return Mixture(sources, weights=config.weights if split == "train" else (), seed=seed)


def _made(config: DatasetConfig, split: Split, say: Callable[[str], None]) -> list:
    if not config.maker_name:
        raise FinetuneError("dataset.type=hf needs dataset.maker_name, such as make_cord_v2_dataset")
    if config.path and len(config.path) != len(config.maker_name):
        raise FinetuneError(
            f"dataset.path has {len(config.path)} entries for {len(config.maker_name)} makers; one for each is needed"
        )
    name = {"train": config.split, "valid": config.valid_split, "test": "test"}[split]
    makers = [find_maker(maker) for maker in config.maker_name]
    sources = []
    for maker, label, path in zip(makers, config.maker_name, config.path or [None] * len(makers)):
        try:
            sources.append(maker(path=path, split=name, streaming=config.streaming))
        except NoSplit as error:
            if split == "train" or (split == "valid" and name != DatasetConfig.valid_split):
                raise
            say(f"note: {label} is not in the {'validation' if split == 'valid' else split} set: {error}")
    return sources


def _local(config: DatasetConfig, split: Split) -> list:
    paths = {"train": config.train_data_path, "valid": config.valid_data_path, "test": config.test_data_path}[split]
    if not paths and split == "train":
        raise FinetuneError("dataset.type=local needs dataset.train_data_path, a JSONL, JSON or parquet file")
    name = {"train": "train", "valid": "validation", "test": "test"}[split]
    return [
        # a folder whose files name no split is the one that its option asks for
        make_local_dataset(
            path=path, split=name if names_splits(Path(path)) else "train", image_folder=config.image_folder
        )
        for path in paths
    ]
