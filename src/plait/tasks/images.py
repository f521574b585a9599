"""Images of rows: read from files, bytes or data sets, decoded by PIL, and refused with the reason where they are broken."""

from __future__ import annotations

import base64
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from plait.errors import TaskError
from plait.extras import optional
from plait.records import Record
from plait.tasks.inputs import FileColumn, Row
from plait.tasks.row_files import encoded_file

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # those that PIL decodes itself
_MOST_PIXELS = 64_000_000  # of one decoded image: 256 MB with four channels
_THUMBNAIL = (128, 128)  # pixels, at most


class ImageSizes(Record):
    """The images of a split.

    Attributes:
        formats: how many there are of each.
        smallest: width and height of the one with fewest pixels.
        median: of the one in the middle.
        largest: of the one with most.
        bytes: of all encoded images.
    """

    formats: dict[str, int]
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    bytes: int


def image_bytes(row: Row, column: FileColumn, where: str) -> bytes | TaskError:
    """Return the encoded image of a row, which can be decoded; or why there is none.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    optional("PIL.Image", "vision", f"{where}: decoding images")
    return encoded_file(row, column, where, _problem)


def decoded(data: bytes) -> Any:
    """Return an image of PIL in RGB, turned as its camera was held; of an animation the first."""
    pil, operations = _pil(), optional("PIL.ImageOps", "vision", "an image")
    with warnings.catch_warnings(action="ignore"), pil.open(io.BytesIO(data), formats=_FORMATS) as image:
        return operations.exif_transpose(image).convert("RGB")


def thumbnail(images: Sequence[bytes]) -> str:
    """Return images as one small JPEG in a `data:` address, for a page: side by side where there are several."""
    small, stream = [decoded(data) for data in images], io.BytesIO()
    for image in small:
        image.thumbnail(_THUMBNAIL)
    row = small[0]
    if len(small) > 1:
        row = _pil().new("RGB", (sum(image.width for image in small), max(image.height for image in small)), "white")
        for i, image in enumerate(small):
            row.paste(image, (sum(other.width for other in small[:i]), 0))
    row.save(stream, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def image_sizes(images: Sequence[bytes]) -> ImageSizes:
    """Describe images by their headers."""
    found = []
    for data in images:
        with _pil().open(io.BytesIO(data), formats=_FORMATS) as image:
            found.append((image.width * image.height, (image.width, image.height), str(image.format)))
    found.sort()
    return ImageSizes(
        formats=dict(sorted(Counter(f for _, _, f in found).items())),
        smallest=found[0][1],
        median=found[len(found) // 2][1],
        largest=found[-1][1],
        bytes=sum(map(len, images)),
    )


def _problem(data: bytes) -> str:
    """Return in words why an image cannot be decoded; empty where it can."""
    pil = _pil()
    try:
        with warnings.catch_warnings(action="ignore"), pil.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                size = f"{image.width} × {image.height}"
                return f"it has {size} pixels; at most {_MOST_PIXELS:,} are decoded."
            image.load()
    except pil.UnidentifiedImageError:
        return f"it is none of {', '.join(_FORMATS)}."
    except pil.DecompressionBombError as error:
        return f"{error}"
    except Exception as error:  # PIL's decoders raise many classes
        return f"it is damaged: {' '.join(str(error).split()) or type(error).__name__}."
    return ""


def _pil() -> Any:
    return optional("PIL.Image", "vision", "an image")
