"""Where records come from, by index or as a stream."""

from collections.abc import Iterator
from typing import Literal, Protocol, runtime_checkable

from m3kernels.models.finetune.config import DatasetConfig
from m3kernels.models.finetune.data.makers.mock import make_mock_dataset


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
    """Records as they come. One that is bad is yielded as its BadRecord: an iterator that raises is over."""

    name: str
    fingerprint: str

    def __iter__(self) -> Iterator[dict]: ...

    def skip(self, n: int) -> "Stream": ...


def open_source(
    config: DatasetConfig, split: Literal["train", "valid", "test"], *, seed: int
) -> Source | Stream | None:
    if config.type == "mock":
        return make_mock_dataset(split=split)
    raise NotImplementedError(config.type)
