"""JSON files that are whole or not there."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from plait.errors import OutputError


def write_atomically(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON beside its place and rename it there.

    Raises:
        OutputError: it cannot be written.
    """
    beside = file.with_name(f".{file.name}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
