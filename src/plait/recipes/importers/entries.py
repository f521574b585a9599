"""An adapter's entry in a recipe with its name and path written out, so that neither depends on the working directory.

Independent of what the path leads to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from plait.hub.references import parse_reference
from plait.recipes.paths import Plain


def named_entry(entry: str | Mapping[str, Plain], folder: Path | None) -> dict[str, Plain]:
    """Return an entry with `name` and `path`; a name that is not given comes from the path.

    Args:
        entry: a reference, or a mapping with one under `path`.
        folder: where relative paths start; the working directory when None.

    Raises:
        AddressError: the path is not a reference.
    """
    given = {"path": entry} if isinstance(entry, str) else dict(entry)
    reference = parse_reference(given["path"], base=folder)
    name = given.get("name") or reference.default_name(folder)
    return {"name": name, "path": reference.address} | {k: v for k, v in given.items() if k not in ("name", "path")}
