"""Command lines as users of other tools write them: read where the meaning is certain, else answered with plait's words."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from plait.errors import RecipeError, collect
from plait.recipes.importers.other_tools import command_hint, flag_row

_ADAPTER = re.compile(r"--a(\d+)-(repo|sub|name)")


def translate_flags(arguments: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return a command line with other tools' words in plait's, and a note on each that was read.

    Args:
        arguments: the command, and what follows it.
        known: the options of that command.

    Raises:
        RecipeError: there are words of other tools that mean something else to plait, or nothing; all at once.
    """
    command, given = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    unknown = [word for word in given if word.startswith("--") and word.partition("=")[0] not in known]
    foreign = {word: row for word in unknown if (row := flag_row(word, command))}
    hints = [row.hint for row in foreign.values() if not row.read]
    collect(RecipeError, list(dict.fromkeys(hints)), "these flags are those of other tools")
    if not foreign:
        return list(arguments), []
    reader = _ForeignFlags(foreign)
    rest = reader.read(given)
    return [command, *reader.recipe, *rest, *reader.adapters()], reader.notes


def complete_switches(given: Sequence[str], switches: Collection[str]) -> list[str]:
    """Return words with `true` after every flag of a key that is true or false and is given without a value."""
    done: list[str] = []
    for word, after in zip(given, [*given[1:], "-"], strict=True):
        done += [word, "true"] if word in switches and after.startswith("-") else [word]
    return done


def refuse_foreign_command(word: str) -> None:
    """Report what a command of another tool is here.

    Raises:
        RecipeError: it is one.
    """
    if (hint := command_hint(word)) is not None:
        raise RecipeError(f"there is no command {word!r}: {hint}")


class _ForeignFlags:
    """Takes other tools' flags with their values out of a command line."""

    def __init__(self, foreign: Collection[str]) -> None:
        self._foreign = foreign
        self.recipe: list[str] = []
        self._adapters: list[str] = []
        self._parts: dict[int, dict[str, str]] = {}
        self.notes: list[str] = []

    def read(self, given: list[str]) -> list[str]:
        """Return the other words, and what replaces those that were taken."""
        rest: list[str] = []
        queue = list(given)
        while queue:
            word = queue.pop(0)
            if word not in self._foreign:
                rest.append(word)
                continue
            flag, sign, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag == "--adapters":
                self._adapters += [value] if sign else _values(queue)
            else:
                rest += self._one(flag, value if sign else _value(flag, queue))
        return rest

    def _one(self, flag: str, value: str) -> list[str]:
        if (found := _ADAPTER.fullmatch(flag)) is not None:
            self._parts.setdefault(int(found[1]), {})[found[2]] = value
            return []
        if flag == "--config":
            self.recipe.append(value)
            return []
        return ["--out", value]

    def adapters(self) -> list[str]:
        """Return the adapters, as arguments.

        Raises:
            RecipeError: an adapter has a name or a subfolder, and no place.
        """
        adapters = []
        for number, parts in sorted(self._parts.items()):
            if "repo" not in parts:
                raise RecipeError(
                    f"--a{number}-{next(iter(parts))} is given without --a{number}-repo, which names its repository."
                )
            name = f"{parts['name']}=" if "name" in parts else ""
            place = parts["repo"] + (f"/{parts['sub'].strip('/')}" if parts.get("sub") else "")
            adapters.append(name + place)
            flags = ", ".join(f"--a{number}-{part}" for part in parts)
            self.notes.append(f"{flags}: read as {name}{place}")
        return [*adapters, *self._adapters]


def _value(flag: str, queue: list[str]) -> str:
    if not queue:
        raise RecipeError(f"{flag} needs a value.")
    return queue.pop(0)


def _values(queue: list[str]) -> list[str]:
    values = []
    while queue and not queue[0].startswith("-"):
        values.append(queue.pop(0))
    return values
