"""What is done to answers and targets before they are compared."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from plait.errors import TaskError
from plait.extras import optional
from plait.notices import announce
from plait.parsing import parse_json, read_text

Normalization = Literal["lower", "punctuation", "whitespace"]
SpeechNormalization = Literal["lower", "punctuation", "whitespace", "whisper_basic", "whisper_english"]
Normalizer: TypeAlias = Callable[[str], str]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalizer(steps: Sequence[SpeechNormalization], spellings: str | None = None) -> Normalizer:
    """Return what is done to a text; the order is fixed, and blanks at the ends go in any case.

    Whisper's normalizers are those of transformers (Radford et al. 2022, arXiv:2212.04356, appendix C).

    Args:
        steps: `lower`, `punctuation` (ASCII's goes), `whitespace` (runs become one blank), or one of Whisper's.
        spellings: for `whisper_english`, the file `normalizer.json` of a Whisper model: British to American spellings.

    Raises:
        MissingPackageError: transformers is not installed, which Whisper's are taken from.
        TaskError: the file cannot be read.
    """
    return _normalizer(tuple(steps), spellings)


@cache
def _normalizer(steps: tuple[SpeechNormalization, ...], spellings: str | None) -> Normalizer:
    whisper = _whisper(steps, spellings)

    def clean(text: str) -> str:
        if whisper is not None:
            text = whisper(text)
        if "lower" in steps:
            text = text.lower()
        if "punctuation" in steps:
            text = text.translate(_NO_PUNCTUATION)
        if "whitespace" in steps:
            text = " ".join(text.split())
        return text.strip()

    return clean


def _whisper(steps: tuple[SpeechNormalization, ...], spellings: str | None) -> Normalizer | None:
    if not {"whisper_basic", "whisper_english"}.intersection(steps):
        return None
    library: Any = optional("transformers.models.whisper.english_normalizer", "eval", "Whisper's normalizers")
    if "whisper_basic" in steps:
        found: Normalizer = library.BasicTextNormalizer()
    else:
        if spellings is None:
            announce(
                "normalize: whisper_english leaves British and American spellings different without 'spellings', the file "
                "normalizer.json of a Whisper model.",
                once="no spellings",
            )
        found = library.EnglishTextNormalizer({} if spellings is None else read_spellings(Path(spellings)))
    return found


def read_spellings(file: Path) -> dict[str, str]:
    """Return spelling → the one that takes its place.

    Raises:
        TaskError: the file cannot be read, or is something else.
    """
    data = parse_json(read_text(file, TaskError), str(file), TaskError)
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise TaskError(f"spellings: {file}: it must be a mapping of words to words, as normalizer.json of a Whisper model.")
    return data


def check_reference(target: str, clean: Normalizer, metric: str, where: str) -> None:
    """Make sure that a target has words to count errors by.

    Raises:
        TaskError: it is empty, as it is or once it is normalized.
    """
    if not clean(target):
        after = " after 'normalize'" if target.strip() else ""
        raise TaskError(f"{where}: target {target!r} is empty{after}; {metric} needs one. Leave the row out.")
