"""Receipts as nested fields: naver-clova-ix/cord-v2."""

import json
from pathlib import Path

from m3kernels.models.finetune.data.makers.fields import image_field, text_field
from m3kernels.models.finetune.data.opening import open_rows
from m3kernels.models.finetune.data.records import BadRecord, question
from m3kernels.models.finetune.data.rows import locate_images

PROMPT = "Describe this image."


def make_cord_v2_dataset(path: str | None = None, split: str = "train", streaming: bool = False):
    """Rows of ``image`` and ``ground_truth``, JSON with ``gt_parse`` or ``gt_parses``, of which the first is taken."""
    return open_rows(
        path or "naver-clova-ix/cord-v2",
        split=split,
        columns=("image", "ground_truth"),
        convert=_record,
        streaming=streaming,
    )


def json_to_tokens(value) -> str:
    """Donut's spelling of a parse: ``<s_key>...</s_key>`` with keys in descending order, lists joined by ``<sep/>``."""
    if isinstance(value, dict):
        if set(value) == {"text_sequence"}:
            return str(value["text_sequence"])
        return "".join(f"<s_{key}>{json_to_tokens(value[key])}</s_{key}>" for key in sorted(value, reverse=True))
    if isinstance(value, list):
        return "<sep/>".join(json_to_tokens(item) for item in value)
    return str(value)


def _record(row: dict, folder: Path | None) -> dict:
    try:
        truth = json.loads(text_field(row, "ground_truth"))
    except ValueError as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("", f"ground_truth is no JSON ({error})") from error
    truth = truth if isinstance(truth, dict) else {}
    parses = truth["gt_parses"] if isinstance(truth.get("gt_parses"), list) else [truth.get("gt_parse")]
    if not parses or not isinstance(parses[0], dict):
        raise BadRecord(
            "", f"ground_truth has {sorted(truth)}; it needs an object gt_parse, or a list gt_parses of them"
        )
    record = question([image_field(row, "image")], PROMPT, json_to_tokens(parses[0]))
    return locate_images(record, folder)
