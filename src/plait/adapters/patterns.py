r"""Module patterns of an adapter's configuration, matched as PEFT matches them, in bounded time.

PEFT asks `re.match(rf"(.*\.)?({pattern})$", module)`. A stranger's pattern (`(a+)+b`) may take Python's matcher for
ever, so it is not used: a pattern is parsed by Python's own parser, and the set of all places at which each part
can end is carried along. That is exact for all that needs no memory of what was matched before; the rest is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeAlias

from plait.parsing import shown

Ends: TypeAlias = frozenset[int]
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")
_LONGEST = 2000  # characters of a pattern
_MOST_STEPS = 200_000  # parts looked at in one question
_ADVICE = "plait takes module names and plain regular expressions, without references to groups"


class PatternError(ValueError):
    """A pattern that cannot be matched; the text says why."""


@lru_cache(maxsize=4096)
def module_pattern(pattern: str) -> Callable[[str], bool]:
    """Return a function that says whether a pattern names a module: its complete path, or a tail that begins after a dot.

    Raises:
        PatternError: it is not a regular expression, or one that cannot be matched in bounded time.
    """
    if _PLAIN.fullmatch(pattern):
        return lambda module: _is_tail(pattern, module)
    parsed = _parsed(pattern)

    def matches(module: str) -> bool:
        starts = frozenset({0, *(i + 1 for i, c in enumerate(module) if c == ".")})
        return len(module) in _Matcher(module).run(parsed, starts)

    return matches


class PatternTable:
    """Many patterns, asked which of them name a module; the time is that of those few whose end fits, not of all.

    Args:
        patterns: in the order in which they count.

    Raises:
        PatternError: as `module_pattern`.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = list(patterns)
        # plain ones by where their dots are, which match any character, and by the letters between; others by how they end
        self._plain: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._ending: dict[int, dict[str, list[int]]] = {}
        for number, pattern in enumerate(self._patterns):
            if _PLAIN.fullmatch(pattern):
                dots = tuple(i for i, c in enumerate(pattern) if c == ".")
                self._plain.setdefault(len(pattern), {}).setdefault(dots, {}).setdefault(pattern, []).append(number)
            else:
                end = _literal_end(_parsed(pattern))
                self._ending.setdefault(len(end), {}).setdefault(end, []).append(number)

    def matching(self, module: str) -> Iterator[int]:
        """Yield the numbers of the patterns that name a module, ascending.

        Raises:
            PatternError: one of them cannot be matched in bounded time.
        """
        likely: list[tuple[int, bool]] = []  # with whether it is known to fit
        for start in (0, *(i + 1 for i, c in enumerate(module) if c == ".")):
            tail = module[start:]
            for dots, patterns in self._plain.get(len(tail), {}).items():
                letters = list(tail)
                for i in dots:
                    letters[i] = "."
                likely += [(number, True) for number in patterns.get("".join(letters), ())]
        for length, endings in self._ending.items():
            if length <= len(module):
                likely += [(number, False) for number in endings.get(module[len(module) - length :], ())]
        for number, fits in sorted(likely):
            try:
                if fits or module_pattern(self._patterns[number])(module):
                    yield number
            except PatternError as error:
                raise PatternError(f"{shown(self._patterns[number])}: {error}") from None


def _literal_end(parsed: Any) -> str:
    """Return the letters with which everything ends that a pattern matches."""
    letters: list[str] = []
    for kind, value in reversed(list(parsed)):
        if kind is not op.LITERAL:
            break
        letters.append(chr(value))
    return "".join(reversed(letters))


@lru_cache(maxsize=4096)
def full_path_pattern(pattern: str) -> Callable[[str], bool]:
    """Return a function that says whether a pattern matches a complete path, as a text of `target_modules` has to.

    Raises:
        PatternError: as `module_pattern`.
    """
    parsed = _parsed(pattern)
    return lambda module: len(module) in _Matcher(module).run(parsed, frozenset({0}))


def _parsed(pattern: str) -> Any:
    """Return a pattern's parts.

    Raises:
        PatternError: as `module_pattern`.
    """
    if len(pattern) > _LONGEST:
        raise PatternError(f"it has {len(pattern)} characters; up to {_LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, about sets within sets: the meaning is that of today
            parsed = parser.parse(pattern)
    except RecursionError:
        raise PatternError("it is nested too deeply") from None
    except (re.error, ValueError, OverflowError) as error:
        raise PatternError(f"not a regular expression ({str(error)[:80]})") from None
    if parsed.state.flags & ~re.UNICODE:
        raise PatternError("it has flags, which PEFT does not take either")
    _Matcher("").run(parsed, frozenset({0}))  # what is not known is found now
    return parsed


def _is_tail(pattern: str, module: str) -> bool:
    """Match a pattern of letters, and of dots, which match any character."""
    at = len(module) - len(pattern)
    if at < 0 or (at > 0 and module[at - 1] != "."):
        return False
    tail = module[at:]
    return tail == pattern or all(p in (".", c) for p, c in zip(pattern, tail, strict=True))


class _Matcher:
    """Matches parts of a pattern against one text.

    Args:
        text: to match.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._steps = 0

    def run(self, parts: Iterable[tuple[Any, Any]], starts: Ends) -> Ends:
        """Return where a sequence of parts can end that starts at any of some places."""
        for kind, value in parts:
            self._steps += 1 + len(starts)
            if self._steps > _MOST_STEPS:
                raise PatternError(f"it takes too long to match. {_ADVICE}")
            starts = self._part(kind, value, starts)
        return starts

    def _part(self, kind: Any, value: Any, starts: Ends) -> Ends:
        if kind in _ONE:
            return frozenset(i + 1 for i in starts if i < len(self._text) and _fits(kind, value, self._text[i]))
        if kind is op.BRANCH:
            return frozenset().union(*[self.run(branch, starts) for branch in value[1]])
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self.run(value[3], starts)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, inside = value
            return self._repeat(least, most, inside, starts)
        if kind is op.AT and value in _PLACES:
            return frozenset(i for i in starts if _PLACES[value](self._text, i))
        if kind in (op.ASSERT, op.ASSERT_NOT):
            return self._look(value, starts, wanted=kind is op.ASSERT)
        raise PatternError(f"it has {str(kind).lower()}. {_ADVICE}")

    def _repeat(self, least: int, most: int, parts: Any, starts: Ends) -> Ends:
        # of more repetitions than characters at least one is empty, and an empty one can be left out or done again
        bound = len(self._text) + 1
        found = starts
        for _ in range(min(least, bound)):
            found = self.run(parts, found)
        every = fresh = found
        for _ in range(min(most, bound) - min(least, bound)):
            fresh = self.run(parts, fresh) - every
            if not fresh:
                break
            every |= fresh
        return every

    def _look(self, value: tuple[int, Any], starts: Ends, *, wanted: bool) -> Ends:
        direction, parts = value
        if direction > 0:
            return frozenset(i for i in starts if bool(self.run(parts, frozenset({i}))) is wanted)
        width = int(parts.getwidth()[0])
        return frozenset(i for i in starts if (i >= width and i in self.run(parts, frozenset({i - width}))) is wanted)


def _fits(kind: Any, value: Any, character: str) -> bool:
    if kind is op.ANY:
        return character != "\n"
    if kind is op.IN:
        negated = bool(value) and value[0][0] is op.NEGATE
        return any(_fits(k, v, character) for k, v in value if k is not op.NEGATE) is not negated
    if kind is op.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if kind is op.CATEGORY:
        return _CATEGORIES[value](character)
    return (ord(character) == value) is (kind is op.LITERAL)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_edge(text: str, at: int) -> bool:
    before, behind = at > 0 and _is_word(text[at - 1]), at < len(text) and _is_word(text[at])
    return before is not behind


_ONE = frozenset({op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN})
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: _is_word,
    op.CATEGORY_NOT_WORD: lambda c: not _is_word(c),
}
_PLACES: dict[Any, Callable[[str, int], bool]] = {
    op.AT_BEGINNING: lambda _, at: at == 0,
    op.AT_BEGINNING_STRING: lambda _, at: at == 0,
    op.AT_BOUNDARY: _is_edge,
    op.AT_NON_BOUNDARY: lambda text, at: not _is_edge(text, at),
    op.AT_END: lambda text, at: at == len(text) or (at == len(text) - 1 and text[at] == "\n"),
    op.AT_END_STRING: lambda text, at: at == len(text),
}
