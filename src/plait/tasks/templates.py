"""Jinja2 templates over the columns of a row, in a sandbox: a task file from elsewhere may not run anything here.

A column that is not there is an error, never an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

from plait.errors import TaskError
from plait.tasks.optional import optional

Render: TypeAlias = Callable[[Mapping[str, Any]], str]


def template(source: str, where: str) -> Render:
    """Compile a template; the result turns columns into text.

    Args:
        source: Jinja2; a newline at the end is kept.
        where: what messages call it, such as `task 'x': prompt`.

    Raises:
        TaskError: it is no template; rendering raises it for what a row lacks.
    """
    jinja2 = optional("jinja2", "eval", where)
    try:
        compiled = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TaskError(f"{where}: line {error.lineno} is not Jinja2: {error.message}.") from None

    def render(columns: Mapping[str, Any]) -> str:
        try:
            return str(compiled.render(columns))
        except jinja2.UndefinedError as error:
            raise TaskError(f"{where}: {error.message}; there are {', '.join(columns)}.") from None
        except jinja2.TemplateError as error:  # what the sandbox refuses
            raise TaskError(f"{where}: {error.message}.") from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TaskError(f"{where}: {type(error).__name__}: {error}.") from None

    return render


@cache
def _environment() -> Any:
    sandbox = optional("jinja2.sandbox", "eval", "a task's template")
    undefined = optional("jinja2", "eval", "a task's template").StrictUndefined
    return sandbox.ImmutableSandboxedEnvironment(undefined=undefined, keep_trailing_newline=True)
