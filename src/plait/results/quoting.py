"""Text from elsewhere in a card: quoted for the place where it is, so that it is shown as it is and does nothing."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from typing import Any

import yaml

UNKNOWN_BASE = "BASE_MODEL"
_LONGEST = 200  # characters of a name
_SPECIAL = re.compile(r"([\\`*\[\]<>|])")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control characters, changes of direction, halves of characters


def is_plain_name(text: str) -> bool:
    """Return whether a text can be a name: one line, not long, every character of it visible."""
    return 0 < len(text) <= _LONGEST and text.strip() == text and not any(unicodedata.category(c) in _HIDDEN for c in text)


def one_line(text: str) -> str:
    """Return a text on one line, without invisible characters."""
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in _HIDDEN)


def prose(text: str) -> str:
    """Return a text that Markdown shows as it is, between words and in the cell of a table."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Return a text as code within a line."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    inner = f" {text} " if text.startswith("`") or text.endswith("`") else text
    return f"{fence}{inner}{fence}".replace("|", r"\|")


def block(text: str, language: str) -> str:
    """Return a text as a block of code that nothing in it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def python(text: str) -> str:
    """Return a text as a literal of Python."""
    return json.dumps(text, ensure_ascii=not is_plain_name(text))


def shell(text: str) -> str:
    """Return a text as one word of a shell."""
    return shlex.quote(one_line(text))


def as_yaml(value: Any) -> str:
    """Return plain data as YAML, in which invisible characters are escaped."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    hidden = any(unicodedata.category(c) in _HIDDEN for c in text if c != "\n")
    return yaml.safe_dump(value, sort_keys=False) if hidden else text
