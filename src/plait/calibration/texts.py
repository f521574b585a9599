"""Unlabeled texts, put into a task's prompt, or images or sounds: what an adapter is shown to see what it does.

They come from one of the task's splits, from a file, or from nothing of the user's: generic lines that plait ships, or the bare
prompt with every field `N/A`. No label is read in any of these. Images and sounds come from a split or a file.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from plait.errors import TaskError
from plait.notices import announce
from plait.parsing import lines_of, read_text
from plait.recipes.evaluation import SplitName
from plait.tasks.asking import NumberHead, Similarity, TargetLikelihood
from plait.tasks.examples import Examples, fields_of, questions_of
from plait.tasks.inputs import FileColumn, Prompt, Row
from plait.tasks.loading import absolute_reference
from plait.tasks.row_files import folder_files
from plait.tasks.rows import read_rows, rows_of_file
from plait.tasks.schema import RowTask, Task

TextKind = Literal["split", "file", "lines", "template"]
_NOTHING = "N/A"
MOST_TEXTS = 128  # of a split or a file, where no number is given
_SHOWN = 3


@dataclass(frozen=True)
class Texts:
    """The texts of one task; its images or sounds, or chats with such.

    Attributes:
        task: whose prompt they are in.
        kind: where they come from.
        source: the same in words; content is known by `digest` alone.
        examples: without right answers; of a perplexity task the text is the target.
    """

    task: RowTask
    kind: TextKind
    source: str
    examples: Examples

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What is read as text, before the model's chat template; empty texts next to images and sounds."""
        return tuple(e.prompt for e in self.examples.items)

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """Per prompt, the answers that the task offers; empty where the answer is free."""
        likelihood = isinstance(self.task.ask, TargetLikelihood)
        return tuple((e.target,) if likelihood else e.choices for e in self.examples.items)

    @property
    def shown(self) -> tuple[str, ...]:
        """The first three, for people."""
        return tuple(e.prompt_text for e in self.examples.items[:_SHOWN])

    @property
    def digest(self) -> str:
        """Hash of everything that is read, 16 hex digits."""
        read: object = (self.prompts, self.choices)
        if self.task.file_column is not None:
            read = [e.id if e.target else e.question for e in self.examples.items]
        return hashlib.sha256(repr(read).encode()).hexdigest()[:16]

    def take(self, indices: Sequence[int]) -> Texts:
        """Return some of the texts."""
        return replace(self, examples=self.examples.take(indices))


def read_texts(
    task: Task,
    *,
    kind: TextKind | None,
    count: int | None,
    seed: int,
    split: SplitName | None = None,
    file: str | Path | None = None,
    added: int = 0,
) -> Texts:
    """Return texts for a task, chosen by the seed.

    Args:
        task: whose prompt they are put into.
        kind: where they come from; None: a file where one is given, else `split` (or `calibration`, or `train`) where the task
            has it, else lines, which images and sounds have not.
        count: how many, at most; None: `MOST_TEXTS` of a split or a file, all lines.
        seed: which of them, and in which order.
        split: of the task; `calibration` where it has one, else `train`, when None.
        file: rows whose columns are the prompt's fields, or name images or sounds; a text file, whose lines each fill the one
            field of the prompt; or a folder of images or sounds.
        added: generic lines that follow those of a split or a file of texts.

    Raises:
        TaskError: the task asks nothing by a prompt of its own, or the texts do not fit it; images or sounds are neither in a
            split nor in a file.
    """
    if not isinstance(task, RowTask):
        raise TaskError(f"task {task.name!r} ({task.kind}) has no prompt of its own to put texts into; use a task file.")
    chosen = kind
    if kind is None:
        own = split is not None or not {"calibration", "train"}.isdisjoint(task.splits)
        kind = "file" if file is not None else "split" if own else "lines"
    if task.file_column is not None:
        _check_files(task, task.file_column, kind)
    elif chosen is None and kind == "lines":
        announce(
            f"task {task.name!r} has no texts of its own (no split 'calibration' or 'train'): generic lines that plait "
            "ships are put into its prompt, as --texts lines does. --texts template takes the bare prompt."
        )
    rows, source, where = _rows(task, kind, split, file)
    if not rows:
        raise TaskError(
            f"task {task.name!r}: {file} has no texts, neither lines nor rows. Give another file, a split (--split NAME), or "
            "--texts lines."
        )
    numbers: Sequence[int] = range(len(rows))
    if kind != "template":
        numbers = chosen_rows(task, len(rows), MOST_TEXTS if count is None and kind != "lines" else count, seed)
    found = questions_of(task, [rows[i] for i in numbers], numbers)
    if kind in ("split", "file") and added and task.file_column is None:
        lines = _filled(task, generic_lines())
        try:
            more = questions_of(task, [lines[i] for i in chosen_rows(task, len(lines), added, seed)])
        except TaskError as error:
            announce(f"task {task.name!r}: generic lines do not fit its prompt, so that its own texts alone are read: {error}")
        else:
            source += f" ({len(found)}) and {len(more)} generic lines"
            found, numbers = [*found, *more], range(len(found) + len(more))
    return Texts(task, kind, source, Examples(task, where, tuple(found), rows=tuple(numbers)))


def _check_files(task: RowTask, column: FileColumn, kind: TextKind) -> None:
    """Refuse what cannot be read of a task with images or sounds."""
    if kind in ("lines", "template"):
        columns = list(dict.fromkeys([column.name, *fields_of(task)]))
        rows = f"rows with the column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))}"
        raise TaskError(
            f"task {task.name!r} ({task.kind}): no text can replace an {column.kind} file, so that plait has none to read. "
            f"Give the task a split 'calibration' or 'train' (or --split NAME), or --texts {task.name}=FILE: {rows}"
            f"{', or a folder of such files' * (len(columns) == 1)}. No label is read."
        )


def answer_problem(task: Task) -> str | None:
    """Return, in words, why answers to a task cannot be compared as distributions; None where they can."""
    if not isinstance(task.ask, (NumberHead, Similarity)):
        return None
    return (
        f"task {task.name!r} ({task.kind}): its answers are numbers, not distributions, so what acts cannot be compared with "
        "its own adapter by divergence. Take moments with plait calibrate, give scale and parameters as numbers, or search "
        "them with plait sweep."
    )


def chosen_rows(task: RowTask, rows: int, count: int | None, seed: int) -> list[int]:
    """Return which of so many rows of a task are read, in their order: at most `count`, chosen by the seed."""
    order = list(range(rows))
    random.Random(f"texts {seed} {task.name}").shuffle(order)
    return sorted(order[:count])


def overlap_with_evaluation(texts: Texts) -> list[str]:
    """Return, in words, which texts are questions that the task's validation or test split asks: those must be disjoint."""
    problems = []
    for split in ("validation", "test"):
        if shared := texts_in_split(texts, split):
            problems.append(
                f"task {texts.task.name!r}: {len(shared)} of {len(texts.prompts)} texts ({texts.source}) are in split "
                f"{split!r} too, such as {texts.examples.items[shared[0]].prompt_text[-80:]!r}. Give other texts, or take them "
                "out of one of the two."
            )
    return problems


def texts_in_split(texts: Texts, split: SplitName) -> list[int]:
    """Return which texts are questions that a split of their task asks; none where there is no such split."""
    task = texts.task
    if split not in task.splits:
        return []
    asked = {e.question for e in questions_of(task, read_rows(task, split))}
    return [i for i, e in enumerate(texts.examples.items) if e.question in asked]


def _rows(task: RowTask, kind: TextKind, split: SplitName | None, file: str | Path | None) -> tuple[Sequence[Row], str, str]:
    """Return rows, where they are from in words, and the name of that."""
    match kind:
        case "split":
            name = split or ("calibration" if "calibration" in task.splits else "train")
            return read_rows(task, name), f"split {name!r}", name
        case "file":
            path = Path(absolute_reference(str(file)))
            return _file_rows(task, path), path.name, path.name
        case "lines":
            return _filled(task, generic_lines()), "generic lines", "lines"
        case "template":
            return [_row(task, [_NOTHING])], "the bare prompt", "template"


def _file_rows(task: RowTask, path: Path) -> Sequence[Row]:
    column = task.file_column
    if column is not None:
        return folder_files(path, column) if path.is_dir() else rows_of_file(task, path)
    if path.suffix.lower() != ".txt":
        return rows_of_file(task, path, besides=[".txt"])
    fields = fields_of(task)
    if len(fields) != 1:
        raise TaskError(
            f"{path}: lines of a text file fill the one field of a prompt, and that of task {task.name!r} has "
            f"{', '.join(fields) or 'none'}. Give rows with these columns (.jsonl, .csv, .parquet)."
        )
    lines = [line.strip() for line in lines_of(read_text(path, TaskError))]
    return _filled(task, [line for line in lines if line])


def _filled(task: RowTask, lines: Sequence[str]) -> list[Row]:
    """Return one row per line; a prompt of several fields gets the next lines in the others."""
    return [_row(task, [*lines[i:], *lines[:i]]) for i in range(len(lines))]


def _row(task: RowTask, lines: Sequence[str]) -> dict[str, Any]:
    fields = fields_of(task)
    row: dict[str, Any] = {name: lines[i % len(lines)] for i, name in enumerate(fields)}
    listed = getattr(task, "choices", None)
    if isinstance(listed, str):  # a column that lists the answers
        row[listed] = list(dict.fromkeys([*lines[1:4], "yes", "no"]))[:4]
    return row


@cache
def generic_lines() -> tuple[str, ...]:
    """Return the lines that plait ships: short texts of many kinds and languages, made up for this purpose."""
    text = files("plait.calibration").joinpath("lines.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def describe_counts(texts: Mapping[str, Texts]) -> str:
    """Return in words what was seen, by task: `32 texts of split 'train' (intent, langid)`."""
    tasks: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, t in texts.items():
        tasks[t.source, len(t.prompts)].append(name)
    return "; ".join(
        f"{n} text{'s' * (n != 1)} of {source} ({', '.join(names)})" for (source, n), names in sorted(tasks.items())
    )
