"""Checked access to a row's fields, shared by makers."""

from m3kernels.models.finetune.data.records import BadRecord, kind_of


def text_field(row: dict, name: str) -> str:
    """A text that is not empty, or BadRecord."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        given = repr(value[:60]) if isinstance(value, str) else kind_of(value)
        raise BadRecord("", f"{name} is {given}; it must be text that is not empty")
    return value


def image_field(row: dict, name: str):
    """An image reference that is there, or BadRecord."""
    value = row.get(name)
    if value is None or (isinstance(value, dict) and value.get("bytes") is None and not value.get("path")):
        raise BadRecord("", f"{name} has no image")
    return value
