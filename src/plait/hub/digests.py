"""The sha256 of a fetched file, as the Hub's own tools have written it down: nothing is read to know it."""

from __future__ import annotations

import re
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOLERANCE = 1.0  # seconds between the last write and the note of it, as huggingface_hub allows


def fetched_sha256(path: Path) -> str | None:
    """Return the sha256 that a large file was fetched under; None where nobody noted it, or the file changed since.

    The cache names its files by their hash. `hf download --local-dir` notes hash and time in `.cache/huggingface/download/`
    beside the file, and the note counts while the file is not younger than it.

    Args:
        path: of the file; links are followed.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        _, etag, stamp = note.read_text(encoding="utf-8").splitlines()
        fresh = path.stat().st_mtime <= float(stamp) + _TOLERANCE
    except (OSError, ValueError):
        return None
    return etag if fresh and _SHA256.fullmatch(etag) else None
