"""Refusals of a command line: options given twice, values that come from variables, files whose names begin with `-`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import typer

from plait.errors import PlaitError, RecipeError, collect

_FROM_A_VARIABLE = "ENVIRONMENT"  # name of typer's source of a value; the class is in another module in older releases


def explain_usage(command: Any) -> None:
    """Have a command refuse options that are given twice, and name what it refuses as its user gave it.

    A value from a variable is not one of a flag; a name that begins with `-` may be that of a file.

    Args:
        command: of typer, with its options complete; changed in place.
    """
    make_parser, parse_args, invoke = command.make_parser, command.parse_args, command.invoke

    def making(context: Any) -> Any:
        parser = make_parser(context)
        parse = parser.parse_args

        def parsing(args: list[str]) -> Any:
            found = parse(args=args)
            if not context.resilient_parsing:  # of a completion
                _refuse_repeated(found[2])
            return found

        parser.parse_args = parsing
        return parser

    def reading(context: Any, args: list[str]) -> Any:
        given = [*args]
        try:
            return parse_args(context, args)
        except typer.BadParameter as error:
            if error.param is not None and _variable(context, error.param):
                error.param_hint = f"the variable {error.param.envvar}"
            raise
        except Exception as error:
            if hasattr(error, "possibilities") and (hint := _file_hint(str(getattr(error, "option_name", "")), given)):
                error.message += hint  # type: ignore[attr-defined]
            raise

    def invoking(context: Any) -> Any:
        try:
            return invoke(context)
        except PlaitError as error:
            for note in _variables_in(context, str(error)):
                error.add_note(note)
            raise

    command.make_parser, command.parse_args, command.invoke = making, reading, invoking


def _refuse_repeated(order: Sequence[Any]) -> None:
    """Refuse options with one value that are given more than once.

    Args:
        order: the parameters as they were given.

    Raises:
        RecipeError: there are some.
    """
    single = [p for p in order if not (p.multiple or getattr(p, "is_flag", False) or p.nargs != 1)]
    twice = [p for p in dict.fromkeys(single) if single.count(p) > 1 and p.param_type_name == "option"]
    problems = [f"{max(p.opts, key=len)} is given more than once; it takes one value." for p in twice]
    collect(RecipeError, problems, "the command")


def _file_hint(option: str, given: Sequence[str]) -> str:
    """Return that a word which was taken for an option is the name of a file; an empty text where it is not."""
    named = next((word for word in given if option and word.startswith(option) and os.path.lexists(word)), None)
    return f". The file or folder of that name is written ./{named}" if named else ""


def _variable(context: Any, parameter: Any) -> bool:
    """Return whether the value of a parameter is that of its variable."""
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name == _FROM_A_VARIABLE


def _variables_in(context: Any, message: str) -> list[str]:
    """Return a note on every variable whose option, or value, a message is about."""
    found = []
    for parameter in context.command.params:
        if not _variable(context, parameter):
            continue
        value = os.environ.get(str(parameter.envvar), "")
        words = [word for word in (*parameter.opts, value, f"{parameter.name.replace('__', '.')}:") if word]
        if any(re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", message) for word in words):
            found.append(f"{max(parameter.opts, key=len)} is given by the variable {parameter.envvar}={value}.")
    return found
