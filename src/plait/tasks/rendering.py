"""Templates are rendered by a process of their own, under limits of time, memory and length.

A task's file and a model's chat template may come from anybody. Jinja's sandbox keeps them from running code, but not from
taking all time and all memory: one multiplication of a text suffices. Only the system can stop that, so that it happens in
a process which the system may end. It is started once, and again after a template has ended it.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from plait.errors import TaskError
from plait.tasks.template_worker import MEMORY
from plait.tasks.workers import EndedError, Worker

TemplateKind: TypeAlias = Literal["task", "chat"]

#: Seconds of the processor that a template has in all, and what every text adds to them.
_SECONDS, _SECONDS_EACH = 3.0, 0.01
_ROWS, _BYTES = 512, 4 << 20  # of one request
_TOTAL = 2 << 30  # bytes of all texts that one call returns
_TOO_LONG = -getattr(signal, "SIGPROF", 0)  # exit code


class MissingColumnError(TaskError):
    """A template reads a column that is not there; the message does not list the columns."""


class LimitedTemplate:
    """A template that is rendered under limits.

    Args:
        source: Jinja2.
        where: what messages call it, such as `task 'x': prompt`.
        kind: `task`, where an absent column is an error, or `chat`, as transformers has it.

    Raises:
        TaskError: it is not a template.
    """

    def __init__(self, source: str, where: str, kind: TemplateKind) -> None:
        self._source, self._where, self._kind = source, where, kind
        self._used, self._rendered = 0.0, 0
        self.columns: frozenset[str] = frozenset()
        self.render(())

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[str | TaskError]:
        """Return the text of every row, or why there is none.

        Raises:
            TaskError: the template takes more time than it may, or is not a template.
        """
        found: list[str | TaskError] = []
        total = 0
        for batch in _batches(rows, self._packed):
            for answer in self._ask(batch):
                found.append(answer)
                total += len(answer) if isinstance(answer, str) else 0
            if total > _TOTAL:
                raise TaskError(f"{self._where}: the texts have more than {_TOTAL >> 20} Mi characters together.")
        return found

    def _ask(self, batch: list[bytes]) -> list[str | TaskError]:
        seconds = _SECONDS + _SECONDS_EACH * (self._rendered + len(batch)) - self._used
        answers: list[str | TaskError] = []
        with _shared.lock:
            try:
                for kind, body in _shared.worker().request((self._kind, self._source, max(seconds, 0.01), batch)):
                    if kind == b".":
                        self._used += float(body)
                    elif kind == b"c":
                        self.columns = frozenset(json.loads(body))
                    else:
                        answers.append(self._answer(kind, body))
            except EndedError as ended:
                raise TaskError(f"{self._where}{self._which(len(batch))}: {ended}.") from None
        self._rendered += len(batch)
        if len(answers) != len(batch) and isinstance(answers[0], TaskError):
            raise answers[0]
        return answers

    def _which(self, count: int) -> str:
        """Return which texts a request is about; nothing where there is one template for one text."""
        first = self._rendered + 1
        return f" (one of texts {first} to {self._rendered + count})" if count > 1 else ""

    def _answer(self, kind: bytes, body: bytes) -> str | TaskError:
        text = body.decode()
        if kind == b"t":
            return text
        return MissingColumnError(f"{self._where}: {text}") if kind == b"u" else TaskError(f"{self._where}: {text}.")

    def _packed(self, row: Mapping[str, Any]) -> bytes:
        wanted = row if self._kind == "chat" else {name: row[name] for name in self.columns if name in row}
        try:
            return pickle.dumps(wanted, protocol=5)
        except Exception as error:  # whatever a value's class raises
            kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in wanted.items())
            raise TaskError(f"{self._where}: it reads values that cannot be written as text: {kinds}: {error}") from None


def _batches(rows: Sequence[Mapping[str, Any]], packed: Callable[[Mapping[str, Any]], bytes]) -> Iterator[list[bytes]]:
    """Return rows in portions; a single empty one where there are none, which compiles the template."""
    batch: list[bytes] = []
    size = 0
    for row in rows:
        batch.append(packed(row))
        size += len(batch[-1])
        if len(batch) == _ROWS or size >= _BYTES:
            yield batch
            batch, size = [], 0
    if batch or not rows:
        yield batch


def _why(code: int) -> str | None:
    """Return why the process that renders ended, of its exit code."""
    if code == _TOO_LONG:
        return "it takes too long to render, and was stopped; a template may loop over what a row holds, not over more"
    if code < 0:
        return f"it is nested too deeply, or needs more than {MEMORY >> 20} MiB of memory (signal {-code})"
    return None


class _Shared:
    """The process that all templates of this process share; one request at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._worker: Worker | None = None
        self._inherited: list[Worker | None] = []

    def worker(self) -> Worker:
        """Return the process, started, or started again, where there is none."""
        if self._worker is None or not self._worker.is_open:
            self._worker = Worker("template_worker.py", "renders templates", _why)
        return self._worker

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()

    def forked(self) -> None:
        """Leave the parent's process to the parent: two processes must not read one pipe."""
        self._inherited.append(self._worker)
        self._worker, self.lock = None, threading.Lock()


_shared = _Shared()
atexit.register(_shared.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forked)
