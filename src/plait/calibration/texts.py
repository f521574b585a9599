"""Unlabeled texts, put into a task's prompt: what an adapter is shown to see what it does.

They come from one of the task's splits, from a file, or from nothing of the user's: generic lines that plait ships, or the bare
prompt with every field `N/A`. No label is read in any of these.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from plait.errors import TaskError
from plait.notices import announce
from plait.parsing import read_text
from plait.recipes.evaluation import SplitName
from plait.tasks.asking import NumberHead, Similarity, TargetLikelihood
from plait.tasks.examples import fields_of, prompts_of
from plait.tasks.inputs import Example, Prompt, Row, prompt_text
from plait.tasks.loading import absolute_reference
from plait.tasks.rows import read_file, read_rows
from plait.tasks.schema import RowTask, Task

TextKind = Literal["split", "file", "lines", "template"]
_NOTHING = "N/A"
MOST_TEXTS = 128  # of a split or a file, where no number is given


@dataclass(frozen=True)
class Texts:
    """The texts of one task.

    Attributes:
        task: whose prompt they are in.
        kind: where they come from.
        source: the same in words; content is known by `digest` alone.
        prompts: as the model reads them, before its chat template.
        choices: per prompt, the answers that the task offers; empty where the answer is free.
    """

    task: RowTask
    kind: TextKind
    source: str
    prompts: tuple[Prompt, ...]
    choices: tuple[tuple[str, ...], ...]

    @property
    def digest(self) -> str:
        """Hash of everything that is read, 16 hex digits."""
        return hashlib.sha256(repr((self.prompts, self.choices)).encode()).hexdigest()[:16]


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
            has it, else lines.
        count: how many, at most; None: `MOST_TEXTS` of a split or a file, all lines.
        seed: which of them, and in which order.
        split: of the task; `calibration` where it has one, else `train`, when None.
        file: rows whose columns are the prompt's fields; or a text file, whose lines each fill the one field of the prompt.
        added: generic lines that follow those of a split or a file.

    Raises:
        TaskError: the task asks nothing by a prompt of its own, or the texts do not fit it.
    """
    if not isinstance(task, RowTask):
        raise TaskError(f"task {task.name!r} ({task.kind}) has no prompt of its own to put texts into; use a task file.")
    if task.file_column is not None:
        raise TaskError(seen_problem(task))
    if kind is None:
        own = split is not None or not {"calibration", "train"}.isdisjoint(task.splits)
        kind = "file" if file is not None else "split" if own else "lines"
        if kind == "lines":
            announce(
                f"task {task.name!r} has no texts of its own (no split 'calibration' or 'train'): generic lines that plait "
                "ships are put into its prompt, as --texts lines does. --texts template takes the bare prompt."
            )
    rows, source = _rows(task, kind, split, file)
    if kind != "template":
        rows = _chosen(task, rows, MOST_TEXTS if count is None and kind != "lines" else count, seed)
    found = prompts_of(task, rows)
    if kind in ("split", "file") and added:
        try:
            lines = prompts_of(task, _chosen(task, _filled(task, generic_lines()), added, seed))
        except TaskError as error:
            announce(f"task {task.name!r}: generic lines do not fit its prompt, so that its own texts alone are read: {error}")
        else:
            source += f" ({len(found)}) and {len(lines)} generic lines"
            found += lines
    return Texts(task, kind, source, tuple(prompt for prompt, _ in found), tuple(choices for _, choices in found))


def seen_problem(task: Task) -> str:
    """Return, in words, why a task of images or sounds gives no texts."""
    return (
        f"task {task.name!r} ({task.kind}) has images or sounds, and only texts are read to calibrate and tune. plait eval and "
        "plait sweep have such tasks; methods without moments merge their adapters."
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


def _chosen(task: RowTask, rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    order = list(range(len(rows)))
    random.Random(f"texts {seed} {task.name}").shuffle(order)
    return [rows[i] for i in sorted(order[:count])]


def overlap_with_evaluation(texts: Texts) -> list[str]:
    """Return, in words, which texts are questions that the task's validation or test split asks: those must be disjoint."""
    problems = []
    for split in ("validation", "test"):
        if shared := texts_in_split(texts, split):
            problems.append(
                f"task {texts.task.name!r}: {len(shared)} of {len(texts.prompts)} texts ({texts.source}) are in split "
                f"{split!r} too, such as {prompt_text(texts.prompts[shared[0]])[-80:]!r}. Give other texts, or take them out "
                "of one of the two."
            )
    return problems


def texts_in_split(texts: Texts, split: SplitName) -> list[int]:
    """Return which texts are questions that a split of their task asks; none where there is no such split."""
    task = texts.task
    if split not in task.splits:
        return []
    questions_of_split = set(_questions(task, prompts_of(task, read_rows(task, split))))
    own = _questions(task, zip(texts.prompts, texts.choices, strict=True))
    return [i for i, question in enumerate(own) if question in questions_of_split]


def _questions(task: RowTask, pairs: Iterable[tuple[Prompt, tuple[str, ...]]]) -> list[str]:
    """Return the hash of (prompt, choices), as `Example.question` has it."""
    if isinstance(task.ask, TargetLikelihood):  # whose text is the target
        return [Example.of(prompt, text).question for prompt, (text,) in pairs]
    return [Example.of(prompt, "", choices).question for prompt, choices in pairs]


def _rows(task: RowTask, kind: TextKind, split: SplitName | None, file: str | Path | None) -> tuple[Sequence[Row], str]:
    match kind:
        case "split":
            name = split or ("calibration" if "calibration" in task.splits else "train")
            return read_rows(task, name), f"split {name!r}"
        case "file":
            return _file_rows(task, Path(absolute_reference(str(file)))), Path(str(file)).name
        case "lines":
            return _filled(task, generic_lines()), "generic lines"
        case "template":
            return [_row(task, [_NOTHING])], "the bare prompt"


def _file_rows(task: RowTask, path: Path) -> Sequence[Row]:
    if path.suffix.lower() != ".txt":
        return read_file(path, besides=[".txt"])
    fields = fields_of(task)
    if len(fields) != 1:
        raise TaskError(
            f"{path}: lines of a text file fill the one field of a prompt, and that of task {task.name!r} has "
            f"{', '.join(fields) or 'none'}. Give rows with these columns (.jsonl, .csv, .parquet)."
        )
    lines = [line.strip() for line in read_text(path, TaskError).splitlines()]
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
