"""How the answers of a task are asked of a model: one record per way. `evaluation.scoring` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Length = Literal["sum", "tokens", "bytes"]
Pooling = Literal["mean", "first"]
SpeechTask = Literal["transcribe", "translate"]


@dataclass(frozen=True)
class Choices:
    """The likeliest of an example's choices, as continuation of its prompt.

    Attributes:
        length: log-likelihood as it is, or divided by the answer's tokens or UTF-8 bytes.
        calibrated: less each answer's log-likelihood after the prompt with every field `N/A`.
    """

    length: Length = "sum"
    calibrated: bool = False


@dataclass(frozen=True)
class TargetLikelihood:
    """The likelihood of the target after the prompt, which may be empty; no answer is taken."""


@dataclass(frozen=True)
class Generated:
    """Greedy text after the prompt.

    Attributes:
        max_new_tokens: longest answer.
        stop: texts at which an answer ends; they are cut off.
        transcript: of what is spoken: not right or wrong as a whole, and counted in a warning where it is as long as it may be.
    """

    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    transcript: bool = False


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read, or seen, as a whole and continued by nothing; the base of the ways below.

    Attributes:
        max_tokens: longer texts lose their end; None: they are an error.
    """

    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Head(Reading):
    """The outputs of a head, which belongs to the task's own adapter."""


@dataclass(frozen=True, kw_only=True)
class LabelHead(Head):
    """The largest output of a classification head.

    Attributes:
        labels: in the order of the outputs.
    """

    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TagHead(LabelHead):
    """The largest output of a classification head at the first token of every word."""


@dataclass(frozen=True, kw_only=True)
class NumberHead(Head):
    """The one output of a head."""


@dataclass(frozen=True, kw_only=True)
class ClassPrompts(Reading):
    """The label whose texts are nearest to an image.

    Attributes:
        labels: all possible answers.
        texts: per label.
    """

    labels: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Similarity(Reading):
    """The cosine of two texts' vectors, which the model makes of each by itself.

    Attributes:
        pooling: the mean of all tokens' vectors, or that of the first token.
    """

    pooling: Pooling = "mean"


@dataclass(frozen=True)
class Transcribed:
    """What is spoken in a sound, as text.

    Attributes:
        language: that is spoken, by name or code; None: the model's own setting, or what it hears.
        task: whether it is written down, or put into English; None: the model's own setting.
        max_new_tokens: longest transcript; None: as long as the decoder has places for.
        beams: that are followed; 1 takes the likeliest token.
    """

    language: str | None = None
    task: SpeechTask | None = None
    max_new_tokens: int | None = None
    beams: int = 1


@dataclass(frozen=True)
class Harness:
    """By lm-eval's own evaluator."""


Ask: TypeAlias = Choices | TargetLikelihood | Generated | Reading | Transcribed | Harness
