"""sha256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from plait.parsing import open_bytes


def sha256(path: Path) -> str:
    """Return the hex digest of a file.

    Raises:
        OSError: it cannot be read; the error names it.
    """
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
