"""Single files that appear complete or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from plait.errors import OutputError


def write_text_atomic(file: Path, text: str) -> None:
    """Write a text file next to its place and rename it there.

    Raises:
        OutputError: it cannot be written.
    """
    draft = file.with_name(f".{file.name[:100]}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_json_atomic(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file likewise.

    Raises:
        OutputError: it cannot be written.
    """
    write_text_atomic(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
