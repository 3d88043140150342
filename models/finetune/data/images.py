"""Image references, opened by their header alone, and decoded upright when the pixels are wanted."""

import io
import struct
import warnings
import zlib
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from m3kernels.models.finetune.data.records import BadRecord, kind_of
from m3kernels.models.finetune.data.urls import fetch, is_url

# Pillow's own limit, twice its MAX_IMAGE_PIXELS
MAX_PIXELS = 178_956_970
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError)
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def localise(reference):
    """A URL's image as ``{"bytes", "path"}``, so that it is fetched once; any other reference as it is."""
    url = reference.get("path") if isinstance(reference, dict) and reference.get("bytes") is None else reference
    if isinstance(url, str) and is_url(url):
        return {"bytes": fetch(url), "path": url}
    return reference


def open_image(reference) -> Image.Image:
    """The image with its header read and no pixel decoded.

    Args:
        reference: a PIL image, a path, an http(s) URL, or ``{"bytes": ..., "path": ...}`` with one of them.

    Raises:
        BadRecord: a missing file, no image, or one of too many pixels.
    """
    if isinstance(reference, Image.Image):
        image = reference
    else:
        stream, label = _stream(localise(reference))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(stream)
        except UnidentifiedImageError as error:
            raise BadRecord("", f"{label} is no image that Pillow knows") from error
        except Image.DecompressionBombError as error:
            raise BadRecord("", f"{label} has too many pixels; allowed: {MAX_PIXELS}") from error
        except _BROKEN as error:
            raise BadRecord("", f"{label} cannot be opened as an image ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadRecord("", f"an image of {image.width} x {image.height} pixels; allowed: {MAX_PIXELS} in all")
    return image


def upright_size(reference) -> tuple[int, int]:
    """(width, height) in pixels once turned as EXIF says, from the header."""
    image = open_image(reference)
    try:
        turned = _orientation(image) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size
    finally:
        if image is not reference:
            image.close()


def decode(reference) -> Image.Image:
    """The image decoded and turned as its EXIF orientation says, in its own mode.

    Raises:
        BadRecord: as :func:`open_image`, or pixels that are corrupt or cut off.
    """
    image = open_image(reference)
    try:
        transpose = _TRANSPOSES.get(_orientation(image))
        image.load()
    except _BROKEN as error:
        raise BadRecord("", f"{_label(reference)} is corrupt ({error})") from error
    return image if transpose is None else image.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    # a PNG without EXIF before its pixels would be decoded by getexif() in search of one after them
    if image.format == "PNG" and "exif" not in image.info and "Raw profile type exif" not in image.info:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return 1


def _stream(reference) -> tuple:
    label = _label(reference)
    if isinstance(reference, dict):
        data = reference.get("bytes")
        if isinstance(data, (bytes, bytearray)):
            return io.BytesIO(data), label
        if data is not None:
            raise BadRecord("", f"an image's bytes are {kind_of(data)}; JSON holds images as paths or URLs")
        reference = reference.get("path")
    if not isinstance(reference, (str, Path)) or not str(reference):
        raise BadRecord("", f"an image is given as {label}; allowed: a path, an http(s) URL, bytes or a PIL image")
    path = Path(reference)
    if path.is_dir():
        raise BadRecord("", f"the image {path} is a folder; an image is one file")
    if path.exists() and not path.is_file():
        raise BadRecord("", f"the image {path} is a pipe or a device; an image is one file")
    if not path.is_file():
        raise BadRecord("", f"the image {path} does not exist")
    return path, label


def _label(reference) -> str:
    if isinstance(reference, dict):
        return str(reference.get("path") or "an image in bytes")
    return str(reference) if isinstance(reference, (str, Path)) else kind_of(reference)
