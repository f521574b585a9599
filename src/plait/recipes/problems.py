"""What is wrong with a recipe, and where it was written.

Independent of what a recipe may hold: others find the problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from plait.errors import PlaitError, PlanError, RecipeError, collect
from plait.recipes.paths import KeyPath, show_path

Moves: TypeAlias = Mapping[KeyPath, KeyPath]
_LONGEST = 80


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: where in the recipe; empty for the recipe as a whole.
        text: what was found and what is allowed, as sentences.
    """

    path: KeyPath
    text: str


@dataclass(frozen=True)
class ConvertedRecipe:
    """A recipe that was written in another form.

    Attributes:
        data: the same in the present form.
        notes: what was found, what it has become, and where numbers will differ; one sentence or more each.
        moved: path in `data` → the path where its user wrote it.
        problems: what cannot be carried over, by the user's paths.
        missing: files that `data` names and that are not there yet; only an evaluation needs them.
    """

    data: dict[str, Any]
    notes: tuple[str, ...] = ()
    moved: Moves = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    missing: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Origins:
    """Where each part of a recipe came from. Any two are equal: recipes are compared by what they ask for.

    Attributes:
        source: the file's name, or what else to call the recipe; empty where nothing is to be named.
        lines: path → line in the file, counted from 1.
        moved: path now → path in the file.
        overridden: paths whose values did not come from the file.
        error: what a refusal raises.
    """

    source: str = field(compare=False)
    lines: Mapping[KeyPath, int] = field(default_factory=dict, compare=False)
    moved: Moves = field(default_factory=dict, compare=False)
    overridden: tuple[KeyPath, ...] = field(default=(), compare=False)
    error: type[PlaitError] = field(default=RecipeError, compare=False)

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Name file, line and key in a refusal of what the value at a path leads to, where the value is the file's."""
        try:
            yield
        except PlaitError as error:
            if self.source and self.source not in str(error) and not self._is_overridden(path):
                error.args = (self.describe(Problem(path, str(error))),)
            raise

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the file in a refusal of the recipe, or of what it plans, that does not."""
        try:
            yield
        except (PlanError, RecipeError) as error:
            if self.source and self.source not in str(error):
                error.args = (f"{self.source}: {error}",)
            raise

    def describe(self, problem: Problem) -> str:
        """Return a problem with its place: `recipe.yaml:4: method.density: …`."""
        path = self._as_written(problem.path)
        return ": ".join(part for part in (self._place(problem.path), show_path(path), problem.text) if part)

    def refuse(self, problems: Iterable[Problem]) -> None:
        """Raise one error that lists all problems in the order of the file; do nothing when there are none.

        Raises:
            RecipeError: there is a problem (or `error`, when it is another).
        """
        ordered = sorted(dict.fromkeys(problems), key=lambda p: self._line(p.path) or 0)
        collect(self.error, [self.describe(p) for p in ordered], self.source)

    def _as_written(self, path: KeyPath) -> KeyPath:
        for length in range(len(path), 0, -1):
            if path[:length] in self.moved:
                return self.moved[path[:length]] + path[length:]
        return path

    def _is_overridden(self, path: KeyPath) -> bool:
        """Return whether a path was set, or made on the way to one that was set."""
        made = self.lines.keys().isdisjoint({path, self._as_written(path)})
        return any(path[: len(o)] == o or (made and path and o[: len(path)] == path) for o in self.overridden)

    def _line(self, path: KeyPath) -> int | None:
        """Return the line of a path, or of the nearest thing around it."""
        if self._is_overridden(path):
            return None
        written = self._as_written(path)
        known = (self.lines.get(written[:length]) for length in range(len(written), -1, -1))
        return next((line for line in known if line is not None), None)

    def _place(self, path: KeyPath) -> str:
        if self._is_overridden(path):
            return "override"
        line = self._line(path)
        return self.source if line is None else f"{self.source}:{line}"


def show_value(value: object) -> str:
    """Write a value as a recipe would spell it, cut when it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def spell_value(value: object) -> str:
    """Write a value as YAML on one line, cut when it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 2 * _LONGEST else f"{text[: 2 * _LONGEST - 1]}…"
