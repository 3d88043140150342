"""Questions about medical images: mmoukouba/MedPix-VQA."""

from pathlib import Path

from m3kernels.models.finetune.data.makers.fields import image_field, text_field
from m3kernels.models.finetune.data.opening import open_rows
from m3kernels.models.finetune.data.records import question
from m3kernels.models.finetune.data.rows import locate_images


def make_medpix_dataset(path: str | None = None, split: str = "train", streaming: bool = False):
    """Rows of ``image_id``, which is the image itself, ``question`` and ``answer``."""
    return open_rows(
        path or "mmoukouba/MedPix-VQA",
        split=split,
        columns=("image_id", "question", "answer"),
        convert=_record,
        streaming=streaming,
    )


def _record(row: dict, folder: Path | None) -> dict:
    record = question([image_field(row, "image_id")], text_field(row, "question"), text_field(row, "answer"))
    return locate_images(record, folder)
