"""Rows → examples: prompts and answers as texts. Independent of tokens or models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from plait.errors import TaskError, collect
from plait.recipes.evaluation import SplitName
from plait.tasks.asking import Choices, TargetLikelihood
from plait.tasks.inputs import Example, Inputs, Prompt, Row, content_digest
from plait.tasks.row_files import check_total
from plait.tasks.rows import read_rows
from plait.tasks.schema import RowTask, Task
from plait.tasks.templates import Template

_PORTION = 1024  # rows between two looks at what was wrong
_NOTHING = "N/A"
_NOT_HASHED = {"name", "description", "data", "splits", "adapter", "include", "spellings"}  # names and places
_LATER = ("image", "audio")  # keys of chats that older releases had not: without them a digest is theirs


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Attributes:
        task: what is asked.
        split: which rows, by the split's name; or the file that they are from.
        items: in the rows' order.
        blank: the prompt with every column `N/A` (content-free input), for tasks with `calibrated`.
        rows: indices of the items in the split; None for all of it, in order.
    """

    task: Task
    split: str
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
        about = self.task.model_dump(mode="json", exclude=_NOT_HASHED)
        about = {key: value for key, value in about.items() if key not in _LATER or value is not None}
        return content_digest({**about, **self.task.own_digest()}, [e.id for e in self.items], self.blank)


def read_examples(task: Task, split: SplitName) -> Examples:
    """Read one split of a task.

    Raises:
        TaskError: the data cannot be read, or rows do not fit the templates; the first few are listed.
    """
    if not isinstance(task, RowTask):
        return Examples(task, split, tuple(task.read(split)))
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
        if len(problems) >= task.problems_shown:
            break
    collect(TaskError, problems[: task.problems_shown], f"task {task.name!r}: rows that do not fit, the first of them")
    check_total([data for e in items for data in e.files], task.where)
    blank = make.blank(rows[0]) if isinstance(task.ask, Choices) and task.ask.calibrated else None
    return Examples(task, split, tuple(items), blank)


def fields_of(task: RowTask) -> tuple[str, ...]:
    """Return the columns that a task's prompt and choices read, sorted."""
    return tuple(sorted({name for source in task.sources() for name in Template(source, task.where).columns}))


def questions_of(task: RowTask, rows: Sequence[Row], numbers: Sequence[int] | None = None) -> list[Example]:
    """Return the example of every row without its right answer, which is not read; of a perplexity task the text is the target.

    Args:
        task: what is asked.
        rows: some of its data.
        numbers: of the rows, for messages.

    Raises:
        TaskError: rows do not fit the templates, or hold what cannot be decoded; the first few are listed.
    """
    texts = task.target_template.each(rows) if isinstance(task.ask, TargetLikelihood) else [""] * len(rows)
    found: list[Example] = []
    problems: list[str] = []
    for number, parts in enumerate(zip(task.inputs_of()(rows), texts, task.choices_of()(rows), strict=True)):
        inputs, text, choices = parts
        if isinstance(inputs, TaskError) or isinstance(text, TaskError) or isinstance(choices, TaskError):
            wrong = next(part for part in parts if isinstance(part, TaskError))
            problems.append(f"{wrong} (row {number if numbers is None else numbers[number]})")
        else:
            found.append(Example(inputs, text, choices))
    collect(TaskError, problems[: task.problems_shown], f"{task.where}: texts that do not fit, the first of them")
    check_total([data for e in found for data in e.files], task.where)
    return found


class _Maker:
    """Makes the examples of one task."""

    def __init__(self, task: RowTask) -> None:
        self._task = task
        self._inputs = task.inputs_of()
        self._targets = task.targets_of()
        self._choices = task.choices_of()

    def __call__(self, rows: Sequence[Row]) -> list[Example | TaskError]:
        """Return the example of every row, or why there is none."""
        labels = {} if self._task.closed_labels is None else {"labels": self._task.closed_labels}
        choices = self._choices(rows)
        columns = [
            {**row, **({"choices": chosen} if chosen and isinstance(chosen, tuple) else {}), **labels}
            for row, chosen in zip(rows, choices, strict=True)
        ]
        parts = zip(self._inputs(rows), choices, self._targets(columns), strict=True)
        return [self._example(*part) for part in parts]

    def blank(self, row: Row) -> Prompt:
        """Return the prompt that asks nothing.

        Raises:
            TaskError: the template does not take it.
        """
        (found,) = self._inputs([dict.fromkeys(row, _NOTHING)])
        if isinstance(found, TaskError):
            raise found
        return Example(found, "").prompt

    def _example(
        self, inputs: Inputs | TaskError, choices: tuple[str, ...] | TaskError, target: str | TaskError
    ) -> Example | TaskError:
        if isinstance(choices, TaskError):
            return choices
        if isinstance(inputs, TaskError):
            return inputs
        if isinstance(target, TaskError):
            return target
        if choices and target not in choices:
            known = ", ".join(map(repr, choices))
            where = f"{self._task.where}: target {target!r}"
            return TaskError(f"{where} is none of {known}. The template has labels[...] or choices[...] for numbers.")
        try:
            self._task.check_target(target)
        except TaskError as error:
            return error
        return Example(inputs, target, choices)
