"""One class per format of adapter files: which places are of it, how they are read, how they are written.

A new one is a file here and an import below, in the order in which formats are asked; a package of its own publishes it by an
entry point in the group `plait.adapter_formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from plait.adapters.formats import diffusers, gguf, kohya, mlx, peft
from plait.adapters.formats.base import (
    FORMATS,
    AdapterFormat,
    Factors,
    ModuleFactors,
    Origin,
    OutgoingAdapter,
    OutgoingTarget,
    StoredAdapter,
)

__all__ = [
    "FORMATS", "AdapterFormat", "Factors", "ModuleFactors", "Origin", "OutgoingAdapter", "OutgoingTarget", "StoredAdapter",
    "read_adapter",
]  # fmt: skip

for _format in (peft.PEFT, mlx.MLX, kohya.KOHYA, diffusers.DIFFUSERS, gguf.GGUF):
    FORMATS.add(_format.name, _format)


def read_adapter(place: Path, modules: Callable[[], Collection[str]] | None = None) -> StoredAdapter:
    """Open an adapter by its headers, in the first format that it is of; what is of none is read as PEFT's.

    Args:
        place: a folder, or a single file.
        modules: gives the paths of the base model's modules, where it is at hand.

    Raises:
        AdapterError: with everything that is wrong with it.
    """
    FORMATS.load_plugins()
    format = next((f for f in FORMATS.values() if f.matches(place)), peft.PEFT)
    stored = format.read(place) if modules is None else format.read_for(place, modules)
    others = [f for f in FORMATS.values() if f is not format and place.is_dir() and (place / f.file_name).is_file()]
    notes = tuple(f"{place / f.file_name} is of another format, {f.name}, and was not read." for f in others)
    return replace(stored, origin=stored.origin.model_copy(update={"notes": (*stored.origin.notes, *notes)}))
