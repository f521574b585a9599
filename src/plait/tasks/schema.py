"""The task: what is asked, on which data, and how answers are judged. One record per kind, frozen.

Knows nothing of how data is read or how a model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from plait.recipes.evaluation import SplitName
from plait.records import Record

LM_EVAL = "lm_eval:"  # before the name of one of the harness's tasks, as a kind and as a reference
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "validation", "test")
Length = Literal["sum", "tokens", "bytes"]
Normalization = Literal["lower", "punctuation", "whitespace"]
Template = Annotated[str, Field(min_length=1)]


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
        Field(description="Only these: first, and one behind the last, counted from 0."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"source": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _some_rows(self) -> Split:
        if self.rows is not None and self.rows[0] >= self.rows[1]:
            raise ValueError(f"'rows' {list(self.rows)} holds none; the second number is one behind the last row")
        return self


class Message(Record):
    """One turn of a chat; `content` is a template."""

    role: Literal["system", "user", "assistant"]
    content: str


class _Named(Record):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Unique; used in files and results.")]
    description: str = ""
    adapter: Annotated[str | None, Field(description="Whose task this is; the adapter of the task's own name otherwise.")] = (
        None
    )

    @property
    def own_adapter(self) -> str:
        """Name of the adapter that was trained for this task."""
        return self.adapter or self.name


class _Common(_Named):
    data: Annotated[Data, Field(description="Where the rows are.")]
    splits: Annotated[dict[SplitName, Split], Field(min_length=1, description="train, calibration, validation, test.")]


class _Prompted(_Common):
    prompt: Annotated[Template | None, Field(description="Jinja2 template of the text before the answer.")] = None
    messages: Annotated[
        tuple[Message, ...] | None,
        Field(min_length=1, description="Chat turns before the answer, put through the model's chat template."),
    ] = None
    target: Annotated[Template, Field(description="Jinja2 template of the right answer.")]
    delimiter: Annotated[str, Field(description="What stands between prompt and answer, such as a blank.")] = ""
    max_tokens: Annotated[
        int | None, Field(ge=1, description="Longer prompts lose their beginning; otherwise they are an error.")
    ] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> _Prompted:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("give 'prompt' or 'messages', not both")
        if self.prompt is None and self.messages is None and self._needs_prompt():
            raise ValueError("give 'prompt' or 'messages'")
        return self

    @classmethod
    def _needs_prompt(cls) -> bool:
        return True


class _Ranked(_Prompted):
    """A task whose answers are a few texts, of which the likeliest is taken."""

    length: Annotated[
        Length, Field(description="Log-likelihood as it is, or divided by the answer's tokens or UTF-8 bytes.")
    ] = "sum"
    calibrated: Annotated[
        bool, Field(description="Take off each answer's log-likelihood after the prompt with every field N/A.")
    ] = False


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"labels: {', '.join(map(repr, twice))} stands there more than once")
    return labels


Labels = Annotated[tuple[Template, ...], Field(min_length=2, description="All possible answers.")]


class Classification(_Ranked):
    """One of a fixed set of labels; the likeliest continuation of the prompt is the prediction."""

    kind: Literal["classification"]
    labels: Labels
    metric: Literal["accuracy", "macro_f1"] = "accuracy"

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value)


class MultipleChoice(_Ranked):
    """One of each row's own choices; the likeliest continuation of the prompt is the prediction."""

    kind: Literal["multiple_choice"]
    choices: Annotated[str | tuple[Template, ...], Field(description="The column that lists them, or one template per choice.")]
    metric: Literal["accuracy"] = "accuracy"


class Generation(_Prompted):
    """What the model says, greedily, compared with the target."""

    kind: Literal["generation"]
    metric: Literal["exact_match", "wer", "cer", "rouge1", "rouge2", "rougeL"] = "exact_match"
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    stop: Annotated[tuple[Template, ...], Field(description="Texts at which an answer ends; they are cut off.")] = ()
    normalize: Annotated[
        tuple[Normalization, ...],
        Field(description="Done to answer and target before they are compared; blanks at the ends go."),
    ] = ()


class Perplexity(_Prompted):
    """How surprised the model is by the target, per token, after the prompt (which may be empty)."""

    kind: Literal["perplexity"]
    metric: Literal["perplexity"] = "perplexity"

    @classmethod
    def _needs_prompt(cls) -> bool:
        return False


class SequenceClassification(_Common):
    """One of a fixed set of labels, by a classification head on the model; heads belong to the task's own adapter."""

    kind: Literal["sequence_classification"]
    prompt: Annotated[Template, Field(description="Jinja2 template of the text that is classified.")]
    target: Annotated[Template, Field(description="Jinja2 template of the right label.")]
    labels: Annotated[Labels, Field(description="In the order of the head's outputs.")]
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    max_tokens: Annotated[int | None, Field(ge=1, description="Longer texts lose their end; otherwise they are an error.")] = (
        None
    )

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value)


class LmEval(_Named):
    """A task of EleutherAI's lm-evaluation-harness: its data, prompts and metric, asked by its own evaluator."""

    kind: Annotated[str, Field(pattern=rf"^{LM_EVAL}.+$", description="`lm_eval:` and the harness's name of the task.")]
    metric: Annotated[
        str | None, Field(min_length=1, description="As the harness names it, with `,filter` where it has several; its first.")
    ] = None
    num_fewshot: Annotated[int | None, Field(ge=0, description="Examples in the prompt; as the harness has it.")] = None
    chat: Annotated[bool, Field(description="Put prompts through the model's chat template.")] = False
    include: Annotated[
        str | None, Field(min_length=1, description="A folder with tasks of your own, in the harness's YAML; in place of its.")
    ] = None

    @property
    def harness_name(self) -> str:
        """What the harness calls it."""
        return self.kind.removeprefix(LM_EVAL)

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """`test`: the documents that the harness evaluates on, its own test split or, where there is none, its validation."""
        return ("test",)


RowTask: TypeAlias = Classification | MultipleChoice | Generation | Perplexity | SequenceClassification
Task: TypeAlias = RowTask | LmEval
KINDS: Mapping[str, type[Task]] = {
    "classification": Classification,
    "multiple_choice": MultipleChoice,
    "generation": Generation,
    "perplexity": Perplexity,
    "sequence_classification": SequenceClassification,
    LM_EVAL.rstrip(":"): LmEval,
}
