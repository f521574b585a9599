"""The files of a model's weights, and their hashes."""

from __future__ import annotations

from pathlib import Path

from plait.errors import AdapterError, collect
from plait.results.digests import sha256
from plait.tensorfiles.formats import TENSOR_FORMATS


def weight_digests(folder: Path) -> dict[str, str]:
    """Return sha256 of a model's files of weights."""
    return {p.name: sha256(p) for p in weight_files(folder)}


def weight_files(folder: Path) -> list[Path]:
    """Return a model's files of weights, sorted: those of the first format that is there.

    Raises:
        AdapterError: one of them is a link that leads nowhere, a folder, a pipe or a device.
    """
    found = next(filter(None, (sorted(folder.glob(kind.model_files)) for kind in TENSOR_FORMATS)), [])
    odd = [f"{path}: this is not a file that can be read. Fetch the model again." for path in found if not path.is_file()]
    collect(AdapterError, odd, f"{folder}: the model is not complete")
    return found
