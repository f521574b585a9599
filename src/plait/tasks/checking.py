"""What `plait tasks check` shows: rendered examples, token counts, label balance, overlap between splits."""

from __future__ import annotations

from collections import Counter
from typing import Any

from plait.recipes.evaluation import SplitName
from plait.records import Record
from plait.tasks.asking import NumberHead, Reading, Similarity, TagHead
from plait.tasks.encoding import PromptEncoder, Question, encode_readings
from plait.tasks.examples import Examples, read_examples
from plait.tasks.images import ImageSizes, image_sizes
from plait.tasks.inputs import Prompt, prompt_text
from plait.tasks.metrics import metric_of
from plait.tasks.overlap import Overlap, overlaps
from plait.tasks.schema import SPLITS, Task
from plait.tasks.sounds import SoundLengths, shown_prompt, sound_lengths

_SHOWN = 2
_NO_ROWS = "it has no data: calibrate, tune and merge --tasks put generic lines into its prompt; it cannot be evaluated."


class Tokens(Record):
    """Lengths of prompts and answers of a split, in tokens of a model.

    Attributes:
        shortest: prompt.
        median: of the prompts.
        longest: prompt.
        longest_answer: over all choices.
        truncated: prompts that lose their beginning (or, read as a whole, their end) to `max_tokens`.
    """

    shortest: int
    median: int
    longest: int
    longest_answer: int
    truncated: int


class Rendered(Record):
    """One example as the model reads it.

    Attributes:
        prompt: through the chat template when a model was given, else as turns of `role: content`.
        target: the right answer, after the delimiter.
    """

    prompt: str
    target: str


class SplitCheck(Record):
    """One split.

    Attributes:
        examples: how many.
        duplicates: how many ask what an earlier one asked.
        targets: how often each answer is right, of all words where each has a label; None where answers are free.
        majority: share of the most frequent answer, the accuracy of always giving it; None where answers are free.
        rendered: the first examples.
        tokens: lengths; None without a model, and where nothing is read.
        images: their sizes; None where there are none.
        sounds: their lengths; None where there are none.
    """

    examples: int
    duplicates: int
    targets: dict[str, int] | None
    majority: float | None
    rendered: tuple[Rendered, ...]
    tokens: Tokens | None
    images: ImageSizes | None = None
    sounds: SoundLengths | None = None


class TaskCheck(Record):
    """A task as it is.

    Attributes:
        name: of the task.
        kind: of the task.
        metric: that judges it.
        adapter: name of its own adapter.
        splits: by name.
        overlaps: splits that share questions.
        notes: what is allowed but probably a mistake.
    """

    name: str
    kind: str
    metric: str
    adapter: str
    splits: dict[SplitName, SplitCheck]
    overlaps: tuple[Overlap, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether calibration, validation and test are disjoint."""
        return not any(o.forbidden for o in self.overlaps)


def check_task(task: Task, tokenizer: Any | None = None, processor: Any | None = None) -> TaskCheck:
    """Read all of a task's splits and describe them.

    Args:
        task: to be looked at.
        tokenizer: of the model that it is for; without one tokens are not described.
        processor: in its place where chats have images or sounds.

    Raises:
        TaskError: data that cannot be read, or rows that do not fit.
    """
    splits = {name: read_examples(task, name) for name in SPLITS if name in task.split_names}
    encoder = None if tokenizer is None and processor is None else _Tokenizer(tokenizer, task, processor)
    return TaskCheck(
        name=task.name,
        kind=task.kind,
        metric=task.metric or metric_of(task).name,
        adapter=task.own_adapter,
        splits={name: _check_split(examples, encoder) for name, examples in splits.items()},
        overlaps=tuple(overlaps(splits)),
        notes=tuple(_notes(splits) if splits else [_NO_ROWS]),
    )


class _Tokenizer:
    """Puts a task's examples into tokens, as evaluation does."""

    def __init__(self, tokenizer: Any, task: Task, processor: Any) -> None:
        self._inner, self._task = tokenizer, task
        self._encoder = PromptEncoder(tokenizer, task, processor=processor)

    def text(self, prompt: Prompt) -> str:
        """Return a prompt as the model reads it."""
        return prompt_text(prompt) if isinstance(self._task.ask, Reading) else self._encoder.text(prompt)

    def questions(self, examples: Examples) -> list[Question]:
        """Return every example's prompt with its answers."""
        ask = self._task.ask
        if isinstance(ask, Reading):
            return encode_readings(self._inner, self._task, ask, [e.prompt for e in examples.items])
        return self._encoder.questions(examples, [e.choices or (e.target,) for e in examples.items])


def _check_split(examples: Examples, encoder: _Tokenizer | None) -> SplitCheck:
    items = examples.items
    labels, right = examples.task.closed_labels, [e.target for e in items]
    if isinstance(examples.task.ask, TagHead):
        labels, right = examples.task.ask.labels, [tag for target in right for tag in target.split()]
    images = [image for e in items for image in e.images]
    sounds = [sound for e in items for sound in e.sounds]
    alone = any(e.files and e.messages is None for e in items)
    counts = Counter(right)
    return SplitCheck(
        examples=len(items),
        duplicates=len(items) - len({e.question for e in items}),
        targets=None if labels is None else {label: counts[label] for label in labels},
        majority=None if labels is None else max(counts.values()) / len(right),
        rendered=tuple(_rendered(examples, i, encoder) for i in range(min(_SHOWN, len(items)))),
        tokens=None if encoder is None or alone else _tokens(examples, encoder),
        images=image_sizes(images) if images else None,
        sounds=sound_lengths(sounds) if sounds else None,
    )


def _rendered(examples: Examples, index: int, encoder: _Tokenizer | None) -> Rendered:
    example = examples.items[index]
    if encoder is not None and example.messages is not None:
        prompt = encoder.text(example.prompt)
    elif example.audio is not None:
        prompt = "\n".join(filter(None, (shown_prompt(example), example.text))) + "\n"
    elif encoder is None or example.image is not None:
        prompt = shown_prompt(example)
    else:
        prompt = encoder.text(example.prompt)
    return Rendered(prompt=prompt, target=getattr(examples.task, "delimiter", "") + example.target)


def _tokens(examples: Examples, encoder: _Tokenizer) -> Tokens:
    questions = encoder.questions(examples)
    lengths = sorted(len(q.prompt) for q in questions)
    return Tokens(
        shortest=lengths[0],
        median=lengths[len(lengths) // 2],
        longest=lengths[-1],
        longest_answer=max((len(a) for q in questions for a in q.answers), default=0),
        truncated=sum(q.truncated for q in questions),
    )


def _notes(splits: dict[SplitName, Examples]) -> list[str]:
    task = next(iter(splits.values())).task
    prompt = next(iter(splits.values())).items[0].prompt
    notes = []
    if isinstance(prompt, str) and prompt.endswith(" ") and hasattr(task, "delimiter"):
        notes.append("the prompt ends in a blank, which most tokenizers join to the next word; put it into 'delimiter'.")
    for name, examples in splits.items():
        absent = set(task.closed_labels or ()) - {e.target for e in examples.items}
        if absent:
            notes.append(f"split {name!r} has no example of {', '.join(sorted(absent))}.")
        if isinstance(task.ask, (NumberHead, Similarity)) and len({float(e.target) for e in examples.items}) == 1:
            notes.append(f"split {name!r} has one target only, {examples.items[0].target}: nothing correlates with it.")
    return notes
