"""Visual puzzles of several images: the subset raven of HuggingFaceM4/the_cauldron."""

from pathlib import Path

from m3kernels.models.finetune.data.makers.fields import text_field
from m3kernels.models.finetune.data.opening import NoSplit, open_rows
from m3kernels.models.finetune.data.records import BadRecord, question
from m3kernels.models.finetune.data.rows import locate_images
from m3kernels.models.finetune.data.tables import Every

# the set has the split train alone: every 20th of its rows validates
HELD_OUT = 20


def make_raven_dataset(path: str | None = None, split: str = "train", streaming: bool = False):
    """Rows of ``images``, a list, and ``texts``, of which the first turn, ``user`` and ``assistant``, is taken.

    Where the set has no validation split, 5 % of train are it, the same in every run.
    """
    arguments = {"path": path or "HuggingFaceM4/the_cauldron", "streaming": streaming}
    if split not in ("train", "validation"):
        return _open(split=split, **arguments)
    validation = None
    try:
        validation = _open(split="validation", **arguments)
    except NoSplit:
        if streaming:
            return _streamed(split, **arguments)
    if split == "validation" and validation is not None:
        return validation
    train = _open(split="train", **arguments)
    return train if validation is not None else Every(train, HELD_OUT, taken=split == "validation")


def _streamed(split: str, *, path: str, streaming: bool):
    if split == "validation":
        raise NoSplit(f"{path} has no validation split to stream; set dataset.streaming=false, or eval_interval=0")
    return _open(path=path, split=split, streaming=streaming)


def _open(*, path: str, split: str, streaming: bool):
    return open_rows(
        path, split=split, columns=("images", "texts"), convert=_record, subset="raven", streaming=streaming
    )


def _record(row: dict, folder: Path | None) -> dict:
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not images or any(image is None for image in images):
        raise BadRecord("", "images is no list of one image or more")
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], dict):
        raise BadRecord("", "texts is no list of turns with user and assistant")
    record = question(images, text_field(texts[0], "user"), text_field(texts[0], "assistant"))
    return locate_images(record, folder)
