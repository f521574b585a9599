"""What a job is trained on: files, folders, Hub data sets and tasks → canonical examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from plait.errors import TaskError, did_you_mean
from plait.extras import optional
from plait.folders import expanded
from plait.recipes.evaluation import SplitName
from plait.records import Record
from plait.tasks.asking import ClassPrompts, LabelHead, Reading
from plait.tasks.examples import read_examples
from plait.tasks.inputs import Row
from plait.tasks.loading import load_tasks
from plait.tasks.rows import read_file, read_hub
from plait.tasks.schema import Task
from plait.training.formats import Completion, Conversation, FormatName, Perceived, TrainingExample, convert_rows, digest_form

_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
#: Where rows to measure the loss on are looked for where none are named: TRL's own choice first, training rows last.
EVAL_SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "train")


class TrainingData(Record):
    """Where the rows are, and how they are read.

    Attributes:
        place: a file (.json, .jsonl, .csv, .parquet), a folder of such files named after splits, or a data set on the Hub;
            None with `task`.
        task: a task file whose prompts and targets are trained on, as its evaluation asks them.
        config: of a Hub data set.
        revision: of a Hub data set.
        split: of a task, a folder or a Hub data set; of several names, the first that is there.
        limit: the first so many rows; all when None.
        format: of the rows; found by their columns when `auto`.
        text_field: column of plain text.
        system_prompt: put before every conversation that has none.
    """

    place: str | None = None
    task: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str | tuple[str, ...] = "train"
    limit: int | None = Field(default=None, gt=0)
    format: FormatName = "auto"
    text_field: str = "text"
    system_prompt: str | None = None


@dataclass(frozen=True)
class LoadedData:
    """Examples, and notes on them.

    Attributes:
        summary: place and format, for people.
        examples: in the rows' order.
        notes: rows left out.
    """

    summary: str
    examples: tuple[TrainingExample, ...]
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return a hash of the content, whatever file it came from."""
        hashed = hashlib.sha256()
        for example in self.examples:
            hashed.update(_line(example))
        return hashed.hexdigest()


def load_data(data: TrainingData) -> LoadedData:
    """Read and convert.

    Raises:
        TaskError: it cannot be read, holds nothing, or is in no known format.
    """
    if (data.place is None) == (data.task is None):
        raise TaskError("training data is either a place (file, folder, Hub data set) or a task file; give one of them.")
    if data.task is not None:
        return _from_task(data, data.task)
    place = str(data.place)
    rows, where = _rows(data, place)
    found = convert_rows(
        rows[: data.limit], where=where, format=data.format, text_field=data.text_field, system_prompt=data.system_prompt
    )
    left = found.unanswered
    notes = (f"{where}: {left} of {left + len(found.examples)} rows have no answer and are left out",) if left else ()
    return LoadedData(f"{where}, {found.columns}", found.examples, notes)


def is_local(place: str) -> bool:
    """Return whether a place can be nothing on the Hub: it begins like a path, goes too deep, or ends like a file of rows."""
    return place.startswith((".", "/", "~")) or place.count("/") > 1 or place.lower().endswith(_ENDINGS)


def hold_out(data: LoadedData, share: float, seed: int) -> tuple[LoadedData, LoadedData]:
    """Split examples into those trained on and those held out, by the hash of seed and content.

    Args:
        data: all of them; equal examples fall on the same side.
        share: held out, in (0, 1).
        seed: of the choice.

    Raises:
        TaskError: one of the sides would be empty.
    """
    lines = [_line(example) for example in data.examples]
    ranks = [hashlib.sha256(str(seed).encode() + line).digest() for line in lines]
    wanted = max(1, round(share * len(ranks)))
    edge = sorted(ranks)[wanted - 1]
    sides = [tuple(e for e, rank in zip(data.examples, ranks, strict=True) if (rank <= edge) == out) for out in (False, True)]
    if not sides[0]:
        raise TaskError(f"{data.summary}: holding out {share:g} of {len(ranks)} examples leaves none to train on.")
    held = LoadedData(f"{data.summary}, held out", sides[1])
    return LoadedData(data.summary, sides[0], data.notes), held


def _line(example: TrainingExample) -> bytes:
    return json.dumps(digest_form(example), ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n"


def _rows(data: TrainingData, place: str) -> tuple[Sequence[Row], str]:
    path = expanded(place)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _ENDINGS)
        split = _chosen(data.split, [p.stem for p in files])
        named = [p for p in files if p.stem == split] or (files if split == "train" and len(files) == 1 else [])
        if len(named) != 1:
            held = ", ".join(p.name for p in files) or f"no file ending in {', '.join(_ENDINGS)}"
            raise TaskError(f"{path}: no single file is the split {split!r}; there is {held}. Name one {split}.jsonl.")
        return read_file(named[0]), str(named[0])
    if path.is_file():
        if (split := _chosen(data.split, ["train"])) != "train":
            raise TaskError(f"{place} is one file and has no split {split!r}; a folder with {split}.jsonl has.")
        return read_file(path), place
    if is_local(place):
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TaskError(f"{place}: there is no such file or folder.{did_you_mean(path.name, near)}")
    found: list[str] = []
    if not isinstance(data.split, str):
        datasets = optional("datasets", "data", f"{place}: data from the Hub")
        try:
            found = datasets.get_dataset_split_names(place, data.config, revision=data.revision)
        except Exception as error:  # datasets and its transport raise many classes
            raise TaskError(f"the data set {place!r} cannot be read: {' '.join(str(error).split())}") from error
    split = _chosen(data.split, found)
    where = f"{place} ({split})"
    return read_hub(place, split, config=data.config, revision=data.revision, where=where), where


def _chosen(split: str | tuple[str, ...], there: Sequence[str]) -> str:
    """Return the split that is meant: of several names the first that is there, and where none is, the last."""
    return split if isinstance(split, str) else next((name for name in split if name in there), split[-1])


def training_problem(task: Task) -> str | None:
    """Return, in words, why adapters are not trained here for a task; None where they are."""
    second, seen = getattr(task, "second", None), getattr(task, "file_column", None)
    if seen is not None and getattr(task, "messages", None) is not None:
        return (
            f"task {task.name!r}: training on chats with {seen.kind} files is not covered. Train this adapter with PEFT or TRL "
            "and merge it; evaluation and search have the task."
        )
    if not isinstance(task.ask, Reading) or (type(task.ask) is LabelHead and second is None):
        return None
    what = "two texts with a label" if second is not None and type(task.ask) is LabelHead else f"kind {task.kind}"
    if isinstance(task.ask, ClassPrompts):
        what = "the texts of classes"
    return (
        f"task {task.name!r}: training on {what} is not covered, only on a text, an image or a sound with a label. Train this "
        f"adapter with PEFT and merge it; {'' if seen is not None else 'calibration, '}evaluation and search have the task."
    )


def _from_task(data: TrainingData, file: str) -> LoadedData:
    (task,) = load_tasks([file])
    if problem := training_problem(task):
        raise TaskError(problem)
    split = _chosen(data.split, list(getattr(task, "splits", get_args(SplitName))))
    if split not in get_args(SplitName):
        raise TaskError(f"{file}: a task has the splits {', '.join(get_args(SplitName))}, not {split!r}.")
    delimiter = getattr(task, "delimiter", "")
    examples: list[TrainingExample] = []
    for item in read_examples(task, split).items[: data.limit]:  # type: ignore[arg-type]
        if item.image is not None or item.audio is not None:
            kind: Literal["image", "audio"] = "audio" if item.image is None else "image"
            examples.append(Perceived(kind, item.image or item.audio or b"", item.target, item.text or ""))
        elif isinstance(item.prompt, str):
            examples.append(Completion(item.prompt, delimiter + item.target))
        else:
            prompt = [{"role": role, "content": content} for role, content in item.messages or ()]
            examples.append(Conversation((*prompt, {"role": "assistant", "content": item.target}), len(prompt)))
    return LoadedData(f"task {task.name!r} ({split})", tuple(examples))
