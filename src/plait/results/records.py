"""Parts that the run records of several commands share, and how a record is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from plait.errors import OutputError
from plait.notices import announce
from plait.parsing import read_text
from plait.records import Record

R = TypeVar("R", bound=Record)
Result = Literal["exact", "truncated", "dense"]


class ModuleRecord(Record):
    """What happened to one target module.

    Attributes:
        target: its path.
        rank: written.
        result: `exact`, `truncated`, or `dense`.
        energy: ‖ΔW‖²_F of the merge before truncation; None when nothing was truncated.
        kept: share of it that was kept, in [0, 1].
    """

    target: str
    rank: int | None
    result: Result
    energy: float | None
    kept: float


def overall_kept(modules: tuple[ModuleRecord, ...]) -> float:
    """Return the share of energy kept over the modules that were truncated; 1 when none was."""
    total = sum(m.energy or 0.0 for m in modules)
    return sum((m.energy or 0.0) * m.kept for m in modules) / total if total else 1.0


def read_earlier(kind: type[R], path: Path) -> R | None:
    """Return the record that an earlier run wrote; None where none can be read: not there, not JSON, of another version."""
    if not os.path.lexists(path):
        return None
    try:
        return kind.model_validate_json(read_text(path, OutputError))
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, OutputError) else f"{path}: not a record of this version"
        announce(f"{reason.rstrip('.')}: what an earlier run wrote there does not count.")
        return None


def write_json(path: Path, value: Record | Mapping[str, Any]) -> None:
    """Write a record as indented JSON."""
    data = value.model_dump(mode="json") if isinstance(value, Record) else value
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
