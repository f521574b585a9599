"""Every failure that plait reports to its user, and nothing else.

    PlaitError
    ├── RecipeError      the recipe asks for something that cannot be done   (also ValueError)
    ├── AddressError     an adapter or repository reference leads nowhere     (also ValueError)
    ├── AdapterError     a file is not an adapter that can be merged          (also ValueError)
    ├── PlanError        the adapters do not fit together, or the method      (also ValueError)
    ├── TaskError        a task, its data or its scoring cannot be used       (also ValueError)
    ├── ReportError      a file is not the result of a run                    (also ValueError)
    ├── MissingPackageError  a package of an extra is not installed           (also ImportError)
    └── OutputError      the result cannot be written, or must not be         (also OSError)

A message says where, what was found, what is allowed and what to do. Stages collect all their problems before they
raise (`collect`), so that one run shows everything that is wrong. All of these are the user's to mend: the command line
prints message and notes without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: Numbers of an `OSError`: the disk is full; the disk fails, whichever way bytes are copied.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FAULTS = (*DISK_FULL, errno.EIO)

_LONGEST_WORD = 1000  # letters of one in a list


class PlaitError(Exception):
    """Base of all errors that plait raises on purpose."""


class RecipeError(PlaitError, ValueError):
    """A recipe, a parameter or a flag is not valid."""


class AddressError(PlaitError, ValueError):
    """A reference (`[name=]PATH` or `[name=]org/repo[@revision][/subfolder]`) cannot be resolved."""


class AdapterError(PlaitError, ValueError):
    """A file is missing, broken, or holds something that has no exact low-rank form."""


class PlanError(PlaitError, ValueError):
    """The adapters, the method and the wanted output do not fit together."""


class TaskError(PlaitError, ValueError):
    """A task's file or data is not valid, or does not suit the model that it is to score."""


class ReportError(PlaitError, ValueError):
    """A file or folder does not hold the result of a run that can be reported."""


class MissingPackageError(PlaitError, ImportError):
    """A package that only a part of plait needs is not installed; the message names the extra that brings it."""


class OutputError(PlaitError, OSError):
    """The result cannot be written, or would overwrite something."""


def collect(error: type[PlaitError], problems: Sequence[str], heading: str) -> None:
    """Raise one `error` that lists all `problems`; do nothing when there are none.

    Args:
        error: the leaf of the tree to raise.
        problems: one message each, already complete.
        heading: the first line when there is more than one problem, without the count.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise error(problems[0])
    raise error(f"{heading}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems))


def take_all(error: type[PlaitError], steps: Iterable[Callable[[], Any]], heading: str) -> list[Any]:
    """Take every step, and only then raise what was wrong: a single error as it is, several as one; see `collect`.

    Args:
        error: the class of several that are not all of one class.
        steps: taken one after another, in order.
        heading: as of `collect`.
    """
    results: list[Any] = []
    errors: list[PlaitError] = []
    for step in steps:
        try:
            results.append(step())
        except PlaitError as found:
            errors.append(found)
    if len(errors) == 1:
        raise errors[0]
    kinds = {type(found) for found in errors}
    collect(kinds.pop() if len(kinds) == 1 else error, [str(found) for found in errors], heading)
    return results


def listed(words: Iterable[str], most: int = 4, separator: str = ", ") -> str:
    """Return the first words, long ones shortened, and how many more there are: `a, b, c, d and 3 more`."""
    words = list(words)
    return separator.join(_shortened(word) for word in words[:most]) + (
        f" and {len(words) - most} more" if len(words) > most else ""
    )


def _shortened(word: str) -> str:
    """Return a word as it is, or its two ends: a name from a file may have a million letters."""
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD // 2]}…{word[-_LONGEST_WORD // 4 :]}"


def join_words(words: Sequence[str], last: str = "and") -> str:
    """Write `a`, `a and b`, `a, b and c`."""
    return " ".join(part for part in (", ".join(words[:-1]), last if len(words) > 1 else "", *words[-1:]) if part)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest allowed word, or an empty string."""
    words = list(allowed)
    alike = [w for w in words if w.casefold() == word.casefold()]  # letters of another case count as other letters below
    near = alike or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
