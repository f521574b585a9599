"""What a node sees and has installed. It is sent as code to nodes that may lack plait, and imports nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def look(files: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """Return what a node has.

    Args:
        files: files and folders that it must see.
        packages: whose versions are compared; `plait` as it is imported, others as they are installed.

    Returns:
        `unseen`: those of `files` that are not there; `versions`: package → version, None where there is none.
    """
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    try:
        from plait.version import __version__

        versions["plait"] = __version__
    except ImportError:
        versions["plait"] = None
    return {"unseen": [file for file in files if not Path(file).exists()], "versions": versions}
