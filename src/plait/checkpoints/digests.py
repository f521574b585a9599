"""The files of a model's weights, and their hashes."""

from __future__ import annotations

from pathlib import Path

from plait.errors import AdapterError, collect
from plait.results.digests import sha256


def weight_digests(folder: Path) -> dict[str, str]:
    """Return sha256 of a model's files of weights."""
    return {p.name: sha256(p) for p in weight_files(folder)}


def weight_files(folder: Path) -> list[Path]:
    """Return a model's files of weights, sorted: those of safetensors, or where there is none, `pytorch_model*.bin`.

    Raises:
        AdapterError: one of them is a link that leads nowhere, a folder, a pipe or a device.
    """
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    odd = [f"{path}: this is not a file that can be read. Fetch the model again." for path in found if not path.is_file()]
    collect(AdapterError, odd, f"{folder}: the model is not complete")
    return found
