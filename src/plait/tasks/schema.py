"""What all kinds of tasks share: where the rows are, which belong to a split, and the bases that kinds are made from.

Independent of how data is read or how a model is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, Field, model_validator

from plait.errors import TaskError
from plait.plugins import Registry
from plait.recipes.evaluation import SplitName
from plait.records import Record
from plait.tasks.answers import Metric
from plait.tasks.asking import Ask, Choices, Length, TargetLikelihood
from plait.tasks.attached import column_of, decoders, files_of, marked, placed
from plait.tasks.inputs import Example, FileColumn, Inputs, Row, TextPair, inputs_of
from plait.tasks.templates import Template as Compiled

SPLITS: tuple[SplitName, ...] = ("train", "calibration", "validation", "test")
TemplateText = Annotated[str, Field(min_length=1)]
InputMaker: TypeAlias = Callable[[Sequence[Row]], Sequence[Inputs | TaskError]]
TargetMaker: TypeAlias = Callable[[Sequence[Row]], Sequence[str | TaskError]]
ChoiceMaker: TypeAlias = Callable[[Sequence[Row]], Sequence[tuple[str, ...] | TaskError]]
_T = TypeVar("_T")


class Data(Record):
    """Where the rows are: files on this machine, or a data set on the Hub."""

    path: Annotated[str | None, Field(min_length=1, description="A folder or a file, from the task file's folder.")] = None
    hub: Annotated[str | None, Field(min_length=1, description="A data set on the Hub, `org/name`.")] = None
    config: Annotated[str | None, Field(description="Which configuration of the Hub's data set.")] = None
    revision: Annotated[str | None, Field(description="Which commit, tag or branch of it.")] = None

    @model_validator(mode="after")
    def _one_place(self) -> Data:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either 'path' (files) or 'hub' (a data set on the Hub)")
        if self.path is not None and (self.config or self.revision):
            raise ValueError("'config' and 'revision' belong to 'hub'; files have neither")
        return self


class Split(Record):
    """The rows of one split."""

    source: Annotated[
        str | None, Field(min_length=1, description="A file of the folder (json, jsonl, csv, parquet), or the Hub's split.")
    ] = None
    rows: Annotated[
        tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None,
        Field(description="Only these: first, and one after the last, counted from 0."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"source": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _some_rows(self) -> Split:
        if self.rows is not None and self.rows[0] >= self.rows[1]:
            raise ValueError(f"'rows' {list(self.rows)} holds none; the second number is one after the last row")
        return self


class Message(Record):
    """One turn of a chat; `content` is a template."""

    role: Literal["system", "user", "assistant"]
    content: str


class Task(Record):
    """What is asked, on which data, and how answers are judged; the base of every kind."""

    metrics: ClassVar[tuple[str, ...]] = ()  # names of metrics that suit the kind, besides those that name it
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Unique; used in files and results.")]
    kind: str
    description: str = ""
    adapter: Annotated[str | None, Field(description="Whose task this is; the adapter of the task's own name otherwise.")] = (
        None
    )
    metric: str | None = None

    @property
    def own_adapter(self) -> str:
        """Name of the adapter that was trained for this task."""
        return self.adapter or self.name

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"task {self.name!r}"

    @property
    def ask(self) -> Ask:
        """How answers are asked of a model."""
        raise NotImplementedError

    @property
    def closed_labels(self) -> tuple[str, ...] | None:
        """All possible answers, where every example has the same; else None."""
        return None

    @property
    def split_names(self) -> tuple[SplitName, ...]:
        """The splits that it has."""
        raise NotImplementedError

    def read(self, split: SplitName) -> list[Example]:
        """Return the examples of a split, for tasks that are not made of rows.

        Raises:
            TaskError: they cannot be read.
        """
        raise NotImplementedError

    def own_metric(self) -> Metric | None:
        """Return a metric that belongs to this task alone; None: it is registered under `metric`."""
        return None

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the fields and the examples."""
        return {}


class RowTask(Task):
    """A task whose examples are made of rows, by templates.

    Without rows (neither `data` nor `splits`) there are only its prompt and its answers: enough to calibrate, tune and merge
    with, not to evaluate.
    """

    data: Annotated[Data | None, Field(description="Where the rows are; none for a task that nothing is evaluated on.")] = None
    splits: Annotated[dict[SplitName, Split], Field(description="train, calibration, validation, test.")] = Field(
        default_factory=dict
    )
    prompt: Annotated[TemplateText | None, Field(description="Jinja2 template of the text before the answer.")] = None
    target: Annotated[TemplateText | None, Field(description="Jinja2 template of the right answer.")] = None

    @model_validator(mode="after")
    def _rows_or_none(self) -> RowTask:
        if (self.data is None) != (not self.splits):
            there, lacking = ("splits", "data") if self.data is None else ("data", "splits")
            such = "{path: FOLDER}" if self.data is None else "{test: test.jsonl}, or {test: {rows: [0, 100]}} of one file"
            without = "a task without rows (to calibrate, tune and merge with) has neither"
            raise ValueError(f"{there!r} needs {lacking!r}, such as {such}; {without}")
        if self.target is None and self.needs_target() and (self.data is not None or isinstance(self.ask, TargetLikelihood)):
            raise ValueError("'target' is missing, the template of the right answer")
        return self

    @property
    def split_names(self) -> tuple[SplitName, ...]:
        """The splits that it has."""
        return tuple(self.splits)

    @classmethod
    def needs_target(cls) -> bool:
        """Whether the right answer is a template's."""
        return True

    @property
    def target_template(self) -> Compiled:
        """The template of the right answer.

        Raises:
            TaskError: there is none.
        """
        if self.target is None:
            raise TaskError(f"{self.where} has no 'target', the template of the right answer.")
        return Compiled(self.target, f"{self.where}: target")

    @property
    def file_column(self) -> FileColumn | None:
        """The column with images or sounds; None where there are none."""
        return None

    @property
    def problems_shown(self) -> int:
        """How many rows that do not fit are listed in one message: more where each has a file of its own."""
        return 5 if self.file_column is None else 50

    def sources(self) -> list[str]:
        """Return the templates that are filled from a row before its target."""
        return [] if self.prompt is None else [self.prompt]

    def inputs_of(self) -> InputMaker:
        """Return what makes an example's inputs of every row; an error in place of those of a row that does not fit."""
        if self.prompt is None:
            return lambda rows: [inputs_of("")] * len(rows)
        template = Compiled(self.prompt, f"{self.where}: prompt")
        return lambda rows: [text if isinstance(text, TaskError) else inputs_of(text) for text in template.each(rows)]

    def targets_of(self) -> TargetMaker:
        """Return what makes an example's right answer of every row.

        Raises:
            TaskError: the task has no template of it.
        """
        return self.target_template.each

    def choices_of(self) -> ChoiceMaker:
        """Return what makes an example's possible answers of every row; empty where the answer is free."""
        return lambda rows: [self.closed_labels or ()] * len(rows)

    def check_target(self, target: str) -> None:
        """Make sure that an example can be judged by its target.

        Raises:
            TaskError: it cannot.
        """


class PromptedTask(RowTask):
    """A task that puts a text, or chat turns, before the answer."""

    messages: Annotated[
        tuple[Message, ...] | None,
        Field(min_length=1, description="Chat turns before the answer, put through the model's chat template."),
    ] = None
    delimiter: Annotated[str, Field(description="What is put between prompt and answer, such as a blank.")] = ""
    image: Annotated[
        str | None, Field(min_length=1, description="The column of images in `messages`: a path from the rows' file, or bytes.")
    ] = None
    audio: Annotated[str | None, Field(min_length=1, description="The column of sounds in `messages`, likewise.")] = None
    max_tokens: Annotated[
        int | None, Field(ge=1, description="Longer prompts lose their beginning; otherwise they are an error.")
    ] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> PromptedTask:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("give 'prompt' or 'messages', not both")
        if self.prompt is None and self.messages is None and self.needs_prompt():
            raise ValueError("give 'prompt' or 'messages'")
        return self

    @model_validator(mode="after")
    def _files_in_messages(self) -> PromptedTask:
        named = [key for key in ("image", "audio") if getattr(self, key) is not None]
        if len(named) > 1:
            raise ValueError("give 'image' or 'audio', not both")
        if named and "user" not in [m.role for m in self.messages or ()]:
            raise ValueError(f"{named[0]!r} needs 'messages' with a turn of the user: it reaches a model by its chat template")
        if named and self.max_tokens is not None:
            raise ValueError(f"'max_tokens' would cut the beginning off prompts with {named[0]!r}; leave it out")
        return self

    @classmethod
    def needs_prompt(cls) -> bool:
        """Whether there must be a prompt."""
        return True

    @property
    def file_column(self) -> FileColumn | None:
        """The column with images or sounds; None where there are none."""
        if self.image is not None:
            return column_of(self.image, "image")
        return None if self.audio is None else column_of(self.audio, "audio")

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the fields and the examples: what decodes images or sounds."""
        return {} if self.file_column is None else decoders(self.file_column.kind)

    def sources(self) -> list[str]:
        """Return the templates that are filled from a row before its target."""
        return super().sources() if self.messages is None else [m.content for m in self.messages]

    def inputs_of(self) -> InputMaker:
        """Return what makes an example's text or chat turns of every row, with its images or sounds."""
        return super().inputs_of() if self.messages is None else chat_inputs(self.messages, self.file_column, self.where)


class RankedTask(PromptedTask):
    """A task whose answers are a few texts, of which the likeliest is taken."""

    length: Annotated[
        Length, Field(description="Log-likelihood as it is, or divided by the answer's tokens or UTF-8 bytes.")
    ] = "sum"
    calibrated: Annotated[
        bool, Field(description="Take off each answer's log-likelihood after the prompt with every field N/A.")
    ] = False

    @model_validator(mode="after")
    def _nothing_to_show(self) -> RankedTask:
        if self.calibrated and self.file_column is not None:
            raise ValueError(f"'calibrated' asks without content, and no {self.file_column.kind} file has none; leave it out")
        return self

    @property
    def ask(self) -> Choices:
        """How answers are asked of a model."""
        return Choices(self.length, self.calibrated)


class ReadTask(RowTask):
    """A task whose text, or pair of texts, is read as a whole by an encoder."""

    prompt: Annotated[TemplateText, Field(description="Jinja2 template of the text.")]
    second: Annotated[TemplateText | None, Field(description="Jinja2 template of a second text, where there are two.")] = None
    target: Annotated[TemplateText | None, Field(description="Jinja2 template of the right answer.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Longer texts lose their end; otherwise they are an error.")] = (
        None
    )

    def sources(self) -> list[str]:
        """Return the templates that are filled from a row before its target."""
        return super().sources() + ([] if self.second is None else [self.second])

    def inputs_of(self) -> InputMaker:
        """Return what makes an example's text, or pair of texts, of every row."""
        if self.second is None:
            return super().inputs_of()
        both = [Compiled(self.prompt, f"{self.where}: prompt"), Compiled(self.second, f"{self.where}: second")]
        return lambda rows: combine_texts(both, rows, lambda texts: inputs_of(TextPair(*texts)))


class NumberTask(ReadTask):
    """A task whose answers are numbers."""

    def check_target(self, target: str) -> None:
        """Make sure that a target is a number.

        Raises:
            TaskError: it is not.
        """
        try:
            number = float(target)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise TaskError(f"{self.where}: target {target!r} is not a number.")


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"labels: {', '.join(map(repr, twice))} is given more than once")
    return labels


Labels = Annotated[
    tuple[TemplateText, ...], Field(min_length=2, description="All possible answers."), AfterValidator(_distinct)
]


def combine_texts(
    templates: Sequence[Compiled], rows: Sequence[Row], make: Callable[[tuple[str, ...]], _T | TaskError]
) -> list[_T | TaskError]:
    """Return what is made of all templates' texts of every row, or the first error among them."""
    found: list[_T | TaskError] = []
    for texts in zip(*(t.each(rows) for t in templates), strict=True):
        errors = [text for text in texts if isinstance(text, TaskError)]
        found.append(errors[0] if errors else make(tuple(text for text in texts if isinstance(text, str))))
    return found


def chat_inputs(messages: Sequence[Message], column: FileColumn | None, where: str) -> InputMaker:
    """Return what makes chat turns of every row.

    Args:
        messages: the turns' templates.
        column: with images or sounds among them; None where there are none.
        where: what messages call the task.
    """
    roles = [m.role for m in messages]
    turns = [Compiled(m.content, f"{where}: messages") for m in messages]
    if column is None:
        return lambda rows: combine_texts(turns, rows, lambda texts: inputs_of(tuple(zip(roles, texts, strict=True))))

    def with_files(rows: Sequence[Row]) -> list[Inputs | TaskError]:
        files = [files_of(row, column, where) for row in rows]
        shown = [marked(row, column, found) for row, found in zip(rows, files, strict=True)]
        texts = combine_texts(turns, shown, lambda texts: texts)
        return [together(*pair) for pair in zip(texts, files, strict=True)]

    def together(texts: tuple[str, ...] | TaskError, files: tuple[bytes, ...] | TaskError) -> Inputs | TaskError:
        if isinstance(files, TaskError):
            return files
        if isinstance(texts, TaskError):
            return texts
        found = placed(roles, texts, column, files)
        return TaskError(f"{where}: messages: {found}") if isinstance(found, TaskError) else found

    return with_files


def files_of_chats(task: Task) -> FileColumn | None:
    """Return the column with the images or sounds of a task's chats; None where it has no chats with such."""
    return None if getattr(task, "messages", None) is None else getattr(task, "file_column", None)


def _check_kind(offered: object) -> None:
    if not (isinstance(offered, type) and issubclass(offered, Task)):
        raise TypeError(f"an entry point of plait.task_kinds must name a subclass of plait.tasks.schema.Task, got {offered!r}")


#: Kind → its task. Third parties add theirs by the entry-point group `plait.task_kinds`, under the kind's name.
KINDS: Registry[type[Task]] = Registry("plait.task_kinds", "kind of task", _check_kind)
_K = TypeVar("_K", bound=type[Task])


def kind(name: str) -> Callable[[_K], _K]:
    """Register the class below as a kind of task.

    Args:
        name: as a task's file has it.
    """

    def register(task: _K) -> _K:
        KINDS.add(name, task)
        return task

    return register
