"""Users' own files."""

from functools import partial
from pathlib import Path

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.opening import open_rows
from m3kernels.models.finetune.data.rows import CONVERSATIONS, read_row
from m3kernels.models.finetune.data.tables import TableSource


def make_local_dataset(*, path: str, split: str = "train", streaming: bool = False, image_folder: str | None = None):
    """A file, or a folder's files, of rows with messages, conversations or conversation.

    Args:
        image_folder: what relative image paths are relative to; by default the folder of the row's own file.
    """
    convert = partial(_record, image_folder=None if image_folder is None else Path(image_folder))
    source = open_rows(path, split=split, columns=(), convert=convert, streaming=streaming)
    given = source.table.columns if isinstance(source, TableSource) else None
    if given is not None and not set(given) & set(CONVERSATIONS):
        raise FinetuneError(f"{path} has the columns {', '.join(given)}; one of {', '.join(CONVERSATIONS)} is needed")
    return source


def _record(row: dict, folder: Path | None, *, image_folder: Path | None) -> dict:
    return read_row(row, folder=image_folder or folder)
