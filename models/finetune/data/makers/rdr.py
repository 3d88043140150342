"""Pictures of items with their description: quintend/rdr-items."""

from pathlib import Path

from m3kernels.models.finetune.data.makers.fields import image_field, text_field
from m3kernels.models.finetune.data.opening import open_rows
from m3kernels.models.finetune.data.records import question
from m3kernels.models.finetune.data.rows import locate_images

PROMPT = "Describe this image."


def make_rdr_dataset(path: str | None = None, split: str = "train", streaming: bool = False):
    """Rows of ``image`` and ``text``; the set has the split train alone."""
    return open_rows(
        path or "quintend/rdr-items", split=split, columns=("image", "text"), convert=_record, streaming=streaming
    )


def _record(row: dict, folder: Path | None) -> dict:
    return locate_images(question([image_field(row, "image")], PROMPT, text_field(row, "text")), folder)
