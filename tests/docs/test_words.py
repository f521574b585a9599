"""Messages, docstrings, comments and documents are plain technical English, in American spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / "src" / "plait").rglob("*.py"),
    *(ROOT / "src" / "plait").rglob("*.j2"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
]
SCRIPTS = [
    file for folder in ("tests", "bench", "examples") for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)
]
#: Forms that have a plain replacement in every place, so that a hit is never a false alarm.
REFUSED = {
    "write 'is not a …'": r"(?<!there\s)\b(?:is|are|was|were)\s+no\s+(?!longer\b|more\b)",
    "write 'next to'": r"\bbeside\b",
    "write 'continues'": r"\b(?:goes|go|going|gone)\s+on\b",
    "name who: 'another process', 'no task'": r"(?<!~)\b(?:nobody|everybody|somebody)\b",
    "write 'reports', 'shows', 'names'": r"\b(?:told|said|listens)\b",
    "write 'is', 'means'": r"\b(?:stands|stood)\b",
    "name the folder, the package or the place": r"\b(?:house|rooms)\b",
    "American spelling": r"\b\w*(?:viour|colour|labelled|cancelled|isation)\w*\b|\b(?:grey|towards|whilst|learnt(?!\":))\b",
}
#: That neither tests nor scripts have.
NOWHERE = ("write 'reports', 'shows', 'names'", "write 'is', 'means'", "name the folder, the package or the place")


@pytest.mark.parametrize("advice", REFUSED)
def test_words(advice: str) -> None:
    pattern = re.compile(REFUSED[advice], re.IGNORECASE)
    found = []
    for file in sorted([*FILES, *(SCRIPTS if advice in NOWHERE else ())]):
        text = file.read_text(encoding="utf-8")
        found += [
            f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, hit.start()) + 1}: {hit[0]!r}" for hit in pattern.finditer(text)
        ]
    assert not found, f"{advice}:\n" + "\n".join(found)
