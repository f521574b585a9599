"""Rows → examples: prompts and answers as texts. Knows nothing of tokens or models."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

from plait.errors import TaskError, collect
from plait.recipes.evaluation import SplitName
from plait.tasks import harness
from plait.tasks.rows import Row, read_rows
from plait.tasks.schema import (
    Classification,
    Generation,
    LmEval,
    MultipleChoice,
    Perplexity,
    RowTask,
    SequenceClassification,
    Task,
)
from plait.tasks.templates import Template

Prompt: TypeAlias = str | tuple[tuple[str, str], ...]  # text, or chat turns (role, content)
_SHOWN = 5
_PORTION = 4096  # rows between two looks at what was wrong
_T = TypeVar("_T")
_NOTHING = "N/A"
_ROUGE_SEES = re.compile("[a-z0-9]", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: what the model reads.
        target: the right answer.
        choices: all possible answers; empty where the answer is free.
    """

    prompt: Prompt
    target: str
    choices: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        """Hash of the whole content, 16 hex digits: equal for equal examples, whatever row they stand in."""
        return _digest(self.prompt, self.choices, self.target)

    @cached_property
    def question(self) -> str:
        """Hash of what is asked, without the answer; of the target itself where nothing is asked."""
        return _digest(self.prompt, self.choices) if self.prompt else _digest(self.target)


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Attributes:
        task: what is asked.
        split: which rows.
        items: in the rows' order.
        blank: the prompt with every column `N/A` (content-free input), for tasks with `calibrated`.
        rows: where in the split the items stand; None for all of it, in order.
    """

    task: Task
    split: SplitName
    items: tuple[Example, ...]
    blank: Prompt | None = None
    rows: tuple[int, ...] | None = None

    def take(self, indices: Sequence[int]) -> Examples:
        """Return some of the examples."""
        rows = tuple(indices) if self.rows is None else tuple(self.rows[i] for i in indices)
        return Examples(self.task, self.split, tuple(self.items[i] for i in indices), self.blank, rows)

    @cached_property
    def digest(self) -> str:
        """Hash of everything about task and data that a score depends on."""
        about = self.task.model_dump(mode="json", exclude={"name", "description", "data", "splits", "adapter", "include"})
        if isinstance(self.task, LmEval):
            about["harness"] = harness.about(self.task)
        return _digest(about, [e.id for e in self.items], self.blank)


def read_examples(task: Task, split: SplitName) -> Examples:
    """Read one split of a task.

    Raises:
        TaskError: the data cannot be read, or rows do not fit the templates; the first few are listed.
    """
    if isinstance(task, LmEval):
        return Examples(task, split, tuple(Example(d.prompt, d.target, d.choices) for d in harness.documents(task, split)))
    rows = read_rows(task, split)
    make = _Maker(task)
    items: list[Example] = []
    problems: list[str] = []
    for start in range(0, len(rows), _PORTION):
        for number, made in enumerate(make(rows[start : start + _PORTION]), start):
            if isinstance(made, Example):
                items.append(made)
            else:
                problems.append(f"{made} (row {number} of split {split!r})")
        if len(problems) >= _SHOWN:
            break
    collect(TaskError, problems[:_SHOWN], f"task {task.name!r}: rows that do not fit, the first of them")
    blank = make.blank(rows[0]) if getattr(task, "calibrated", False) else None
    return Examples(task, split, tuple(items), blank)


def fields_of(task: RowTask) -> tuple[str, ...]:
    """Return the columns that a task's prompt and choices read, sorted."""
    sources = [task.prompt] if task.prompt is not None else []
    if not isinstance(task, SequenceClassification) and task.messages is not None:
        sources = [m.content for m in task.messages]
    if isinstance(task, Perplexity):
        sources.append(task.target)
    if isinstance(task, MultipleChoice) and not isinstance(task.choices, str):
        sources += task.choices
    return tuple(sorted({name for source in sources for name in Template(source, f"task {task.name!r}").columns}))


def prompts_of(task: RowTask, rows: Sequence[Row]) -> list[tuple[Prompt, tuple[str, ...]]]:
    """Return prompt and choices of every row, without a target; the text itself is the only choice of a perplexity task.

    Raises:
        TaskError: rows do not fit the templates; the first few are listed.
    """
    where = f"task {task.name!r}"
    texts = Template(task.target, f"{where}: target").each(rows) if isinstance(task, Perplexity) else None
    choices = _choices(task, where)(rows) if texts is None else [(t,) if isinstance(t, str) else t for t in texts]
    found: list[tuple[Prompt, tuple[str, ...]]] = []
    problems: list[str] = []
    for number, (prompt, chosen) in enumerate(zip(_prompts(task, where)(rows), choices, strict=True)):
        if isinstance(prompt, TaskError) or isinstance(chosen, TaskError):
            problems.append(f"{prompt if isinstance(prompt, TaskError) else chosen} (text {number})")
        else:
            found.append((prompt, chosen))
    collect(TaskError, problems[:_SHOWN], f"{where}: texts that do not fit, the first of them")
    return found


class _Maker:
    """Makes the examples of one task."""

    def __init__(self, task: RowTask) -> None:
        self._task = task
        where = f"task {task.name!r}"
        self._prompts = _prompts(task, where)
        self._target = Template(task.target, f"{where}: target")
        self._choices = _choices(task, where)

    def __call__(self, rows: Sequence[Row]) -> list[Example | TaskError]:
        """Return the example of every row, or why there is none."""
        choices = self._choices(rows)
        columns = [{**row, **self._more(chosen)} for row, chosen in zip(rows, choices, strict=True)]
        parts = zip(self._prompts(rows), choices, self._target.each(columns), strict=True)
        return [self._example(*part) for part in parts]

    def blank(self, row: Row) -> Prompt:
        """Return the prompt that asks nothing.

        Raises:
            TaskError: the template does not take it.
        """
        (found,) = self._prompts([dict.fromkeys(row, _NOTHING)])
        if isinstance(found, TaskError):
            raise found
        return found

    def _example(
        self, prompt: Prompt | TaskError, choices: tuple[str, ...] | TaskError, target: str | TaskError
    ) -> Example | TaskError:
        if isinstance(choices, TaskError):
            return choices
        if isinstance(prompt, TaskError):
            return prompt
        if isinstance(target, TaskError):
            return target
        try:
            self._check(target, choices)
        except TaskError as error:
            return error
        return Example(prompt, target, choices)

    def _more(self, choices: tuple[str, ...] | TaskError) -> dict[str, Any]:
        """Return what a target may read beside the row's columns."""
        return {**({"choices": choices} if choices and isinstance(choices, tuple) else {}), **self._labels()}

    def _labels(self) -> dict[str, Any]:
        labelled = isinstance(self._task, (Classification, SequenceClassification))
        return {"labels": self._task.labels} if labelled else {}  # type: ignore[union-attr]

    def _check(self, target: str, choices: tuple[str, ...]) -> None:
        where = f"task {self._task.name!r}: target {target!r}"
        if choices and target not in choices:
            known = ", ".join(map(repr, choices))
            raise TaskError(f"{where} is none of {known}. The template has labels[...] or choices[...] for numbers.")
        spoken = isinstance(self._task, Generation) and self._task.metric in ("wer", "cer")
        if (spoken or isinstance(self._task, Perplexity)) and not target.strip():
            raise TaskError(f"{where} is empty; {self._task.metric} needs one.")
        if isinstance(self._task, Generation) and self._task.metric.startswith("rouge") and not _ROUGE_SEES.search(target):
            raise TaskError(f"{where} has none of a–z and 0–9, all that rouge-score sees; use 'wer' or 'cer'.")


def _prompts(task: RowTask, where: str) -> Callable[[Sequence[Row]], Sequence[Prompt | TaskError]]:
    messages = None if isinstance(task, SequenceClassification) else task.messages
    if messages is not None:
        roles = [m.role for m in messages]
        turns = [Template(m.content, f"{where}: messages") for m in messages]
        return lambda rows: _joined(turns, rows, lambda texts: tuple(zip(roles, texts, strict=True)))
    return Template(task.prompt, f"{where}: prompt").each if task.prompt is not None else lambda rows: [""] * len(rows)


def _choices(task: RowTask, where: str) -> Callable[[Sequence[Row]], Sequence[tuple[str, ...] | TaskError]]:
    if isinstance(task, (Classification, SequenceClassification)):
        labels = task.labels
        return lambda rows: [labels] * len(rows)
    if not isinstance(task, MultipleChoice):
        return lambda rows: [()] * len(rows)
    if isinstance(task.choices, str):
        column = task.choices
        return lambda rows: [_listed(row, column, where) for row in rows]
    templates = [Template(t, f"{where}: choices") for t in task.choices]
    return lambda rows: _joined(templates, rows, lambda texts: _distinct(texts, where))


def _joined(
    templates: Sequence[Template], rows: Sequence[Row], make: Callable[[tuple[str, ...]], _T | TaskError]
) -> list[_T | TaskError]:
    """Return what is made of all templates' texts of every row, or the first error among them."""
    found: list[_T | TaskError] = []
    for texts in zip(*(t.each(rows) for t in templates), strict=True):
        errors = [text for text in texts if isinstance(text, TaskError)]
        found.append(errors[0] if errors else make(tuple(text for text in texts if isinstance(text, str))))
    return found


def _listed(row: Row, column: str, where: str) -> tuple[str, ...] | TaskError:
    value = row.get(column)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        return TaskError(f"{where}: choices: column {column!r} is no list of texts; the row has {', '.join(row)}.")
    return _distinct(tuple(value), where)


def _distinct(choices: tuple[str, ...], where: str) -> tuple[str, ...] | TaskError:
    if len(set(choices)) < max(2, len(choices)):
        return TaskError(f"{where}: choices: {list(choices)} are not two or more different texts.")
    return choices


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
