"""Jinja2 templates over the columns of a row, in a sandbox and under limits: a task file from elsewhere may not run anything
here, nor take all time or memory.

A column that is not there is an error, never an empty text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.errors import TaskError
from plait.extras import optional
from plait.tasks.rendering import LimitedTemplate, MissingColumnError


class Template:
    """Turns columns into text.

    Args:
        source: Jinja2; a newline at the end is kept.
        where: what messages call it, such as `task 'x': prompt`.

    Raises:
        TaskError: it is not a template.
    """

    def __init__(self, source: str, where: str) -> None:
        optional("jinja2", "eval", where)
        self._limited = LimitedTemplate(source, where, "task")

    def __call__(self, columns: Mapping[str, Any]) -> str:
        """Return the text of one row.

        Raises:
            TaskError: the row lacks a column, or the template fails, or takes too much.
        """
        (found,) = self.each([columns])
        if isinstance(found, TaskError):
            raise found
        return found

    def each(self, rows: Sequence[Mapping[str, Any]]) -> list[str | TaskError]:
        """Return the text of every row, or why there is none.

        Raises:
            TaskError: the template takes too much time.
        """
        return [
            TaskError(f"{found}; there are {', '.join(row)}.") if isinstance(found, MissingColumnError) else found
            for found, row in zip(self._limited.render(rows), rows, strict=True)
        ]

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it may read."""
        return self._limited.columns
