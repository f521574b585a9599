"""Uses of huggingface_hub beyond its documented API: its notes of hashes, its failures, its progress bars.

It is imported inside functions, because it costs more than the rest of plait's Hub code together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_NOTE = 4096  # bytes
_TOLERANCE = 1.0  # seconds between the last write and the note of it, as huggingface_hub allows


def fetched_sha256(path: Path) -> str | None:
    """Return the sha256 that a large file was fetched under; None where it was not noted, or the file changed since.

    The cache names its files by their hash. `hf download --local-dir` notes hash and time in `.cache/huggingface/download/`
    next to the file, and the note counts while the file is not younger than it.

    Args:
        path: of the file; links are followed.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        if not note.is_file() or note.stat().st_size > _LONGEST_NOTE:  # it came with the folder
            return None
        _, etag, stamp = note.read_text(encoding="utf-8").splitlines()
        fresh = path.stat().st_mtime <= float(stamp) + _TOLERANCE
    except (OSError, ValueError):
        return None
    return etag if fresh and _SHA256.fullmatch(etag) else None


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep `huggingface_hub` from drawing progress bars inside the block."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def status_of(error: BaseException) -> int | None:
    """Return the status of the response that a failure came with; None where there was none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def cause_of(error: BaseException) -> BaseException:
    """Return why something could not be fetched: without a network the library first looks into its cache, and fails there."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def is_of_transport(error: BaseException) -> bool:
    """Whether a failure is one of the transport, whichever the library was built on (requests, httpx)."""
    from huggingface_hub.errors import HfHubHTTPError

    # the class after the library's own is the root of the transport's errors
    return isinstance(error, (OSError, HfHubHTTPError.__mro__[1]))


def words_of(error: BaseException) -> str | None:
    """Return the Hub's own words on a failure, where they came through."""
    message = getattr(error, "server_message", None)
    return str(message) if message else None
