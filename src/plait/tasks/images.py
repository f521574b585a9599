"""Images of rows: read from files, bytes or data sets, decoded by PIL, and refused with the reason where they are broken."""

from __future__ import annotations

import base64
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import TaskError
from plait.extras import optional
from plait.parsing import open_bytes
from plait.records import Record
from plait.tasks.inputs import Row

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # those that PIL decodes itself
_MOST_BYTES = 64 << 20  # of one encoded image
_MOST_PIXELS = 64_000_000  # of one decoded image: 256 MB with four channels
_THUMBNAIL = (128, 128)  # pixels, at most
_MOST_IN_ALL = 4 << 30  # bytes of a split's images, which are kept in memory


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


def image_bytes(row: Row, column: str, where: str) -> bytes | TaskError:
    """Return the encoded image of a row, which can be decoded; or why there is none.

    Args:
        row: holds a path, bytes, or both as `datasets` keeps them.
        column: in which.
        where: what messages call the task.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    optional("PIL.Image", "vision", f"{where}: decoding images")
    value = row.get(column)
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        data = _read(Path(value))
        name = value
    elif isinstance(value, bytes):
        data, name = value, f"of {len(value)} bytes"
    else:
        return TaskError(f"{where}: image: column {column!r} is neither a path nor bytes; the row has {', '.join(row)}.")
    problem = data if isinstance(data, str) else _problem(data)
    return TaskError(f"{where}: image {name}: {problem}") if problem or isinstance(data, str) else data


def decoded(data: bytes) -> Any:
    """Return an image of PIL in RGB, turned as its camera was held; of an animation the first."""
    pil, operations = _pil(), optional("PIL.ImageOps", "vision", "an image")
    with warnings.catch_warnings(action="ignore"), pil.open(io.BytesIO(data), formats=_FORMATS) as image:
        return operations.exif_transpose(image).convert("RGB")


def thumbnail(data: bytes) -> str:
    """Return an image as a small JPEG in a `data:` address, for a page."""
    image, stream = decoded(data), io.BytesIO()
    image.thumbnail(_THUMBNAIL)
    image.save(stream, "JPEG")
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


def folder_rows(folder: Path, column: str) -> list[Row]:
    """Return a row per image of a folder that has a folder per class: its path, and the class as `label`.

    Raises:
        TaskError: there are none, or something else lies among them.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(c.name, p) for c in classes for p in sorted(c.iterdir()) if not p.name.startswith(".")]
    others = [str(p) for _, p in files if p.suffix.lower() not in ENDINGS]
    if others:
        raise TaskError(f"{others[0]}: this is not an image by its name; allowed: {', '.join(ENDINGS)}.")
    if not files:
        raise TaskError(f"{folder}: a folder of images has one folder per class with its images, and there are none.")
    return [{column: str(p), "label": name} for name, p in files]


def check_total(images: Sequence[bytes], where: str) -> None:
    """Make sure that a split's images may be kept in memory.

    Raises:
        TaskError: they are too large together.
    """
    total = sum(map(len, images))
    if total > _MOST_IN_ALL:
        raise TaskError(f"{where}: its images have {total / 1e9:.1f} GB; {_MOST_IN_ALL >> 30} GB are allowed. Take 'rows'.")


def _read(path: Path) -> bytes | str:
    """Return a file's bytes, or in words why not."""
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            return f"it has {size / 1e6:.0f} MB; at most {_MOST_BYTES >> 20} MB are read."
        with open_bytes(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return "there is no such file."
    except OSError as error:
        return f"{error.strerror or error}."


def _problem(data: bytes) -> str:
    """Return in words why an image cannot be decoded; empty where it can."""
    if len(data) > _MOST_BYTES:
        return f"it has {len(data) / 1e6:.0f} MB; at most {_MOST_BYTES >> 20} MB are read."
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
