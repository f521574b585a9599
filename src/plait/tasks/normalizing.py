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
from plait.parsing import kind_of, parse_json, read_text

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
    if "whisper_english" in steps and spellings is None:
        announce(
            "normalize: whisper_english leaves British and American spellings different without 'spellings', the file "
            "normalizer.json of a Whisper model.",
            once="no spellings",
        )
    return _normalizer(tuple(steps), spellings, None if spellings is None else read_text(Path(spellings), TaskError))


@cache
def _normalizer(steps: tuple[SpeechNormalization, ...], spellings: str | None, text: str | None) -> Normalizer:
    """Return it by what the file holds, which may be another one at the next call."""
    whisper = _whisper(steps, {} if spellings is None or text is None else _spellings(spellings, text))

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


def _whisper(steps: tuple[SpeechNormalization, ...], spellings: dict[str, str]) -> Normalizer | None:
    if not {"whisper_basic", "whisper_english"}.intersection(steps):
        return None
    library: Any = optional("transformers.models.whisper.english_normalizer", "eval", "Whisper's normalizers")
    if "whisper_basic" in steps:
        found: Normalizer = library.BasicTextNormalizer()
    else:
        found = library.EnglishTextNormalizer(spellings)
    return found


def read_spellings(file: Path) -> dict[str, str]:
    """Return spelling → the one that takes its place.

    Raises:
        TaskError: the file cannot be read, or is something else.
    """
    return _spellings(str(file), read_text(file, TaskError))


def _spellings(file: str, text: str) -> dict[str, str]:
    data = parse_json(text, file, TaskError)
    if not isinstance(data, dict):
        got = kind_of(data)
    elif wrong := [value for value in data.values() if not isinstance(value, str)]:
        got = f"{kind_of(wrong[0])} for a word"
    else:
        return data
    raise TaskError(
        f"spellings: {file}: must be a mapping of words to words, as normalizer.json of a Whisper model, got {got}."
    )


def check_reference(target: str, clean: Normalizer, metric: str, where: str) -> None:
    """Make sure that a target has words to count errors by.

    Raises:
        TaskError: it is empty, as it is or once it is normalized.
    """
    if not clean(target):
        after = " after 'normalize'" if target.strip() else ""
        raise TaskError(f"{where}: target {target!r} is empty{after}; {metric} needs one. Leave the row out.")
