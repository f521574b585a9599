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


def write_text_atomic(file: Path, text: str, *, replace: bool = True) -> None:
    """Write a text file next to its place and rename it there.

    Args:
        file: its name.
        text: what it holds.
        replace: a file of that name; else one that is there by now is left as it is.

    Raises:
        OutputError: it cannot be written, or is there and must not be replaced.
    """
    draft = file.with_name(f".{file.name[:100]}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        if replace:
            draft.replace(file)
        else:
            _name(draft, file)
    except FileExistsError:
        raise OutputError(f"{file} was written by another process in the meantime. Choose another file.") from None
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _name(draft: Path, file: Path) -> None:
    """Give a file a name that no file has.

    Raises:
        FileExistsError: one has.
    """
    try:
        os.link(draft, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without further names for a file
        file.open("x").close()
        draft.replace(file)


def write_json_atomic(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file likewise.

    Raises:
        OutputError: it cannot be written.
    """
    write_text_atomic(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
