"""What is spoken in a sound, written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from plait.errors import TaskError
from plait.tasks.asking import Generated, SpeechTask, Transcribed
from plait.tasks.heard import HeardTask
from plait.tasks.inputs import Inputs, Row, content_digest
from plait.tasks.normalizing import SpeechNormalization, check_reference, normalizer, read_spellings
from plait.tasks.schema import InputMaker, Message, TemplateText, chat_inputs, kind
from plait.tasks.templates import Template as Compiled

_OWN = {"whisper_basic", "whisper_english"}


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@kind("asr")
class Asr(HeardTask):
    """What a model writes down of a sound, compared with the transcript: errors per word or per character."""

    metrics: ClassVar = ("wer", "cer")
    kind: Literal["asr"]
    metric: str = "wer"
    prompt: Annotated[
        TemplateText | None, Field(description="Jinja2 template of the text that Whisper takes as what was spoken before.")
    ] = None
    messages: Annotated[
        tuple[Message, ...] | None,
        Field(min_length=1, description="Chat turns with the sound, for audio-language models, through their chat template."),
    ] = None
    target: Annotated[TemplateText, Field(description="Jinja2 template of the transcript.")] = "{{ text }}"
    language: Annotated[
        str | None, Field(min_length=1, description="That is spoken, of Whisper: its setting, or what it hears, otherwise.")
    ] = None
    task: Annotated[
        SpeechTask | None, Field(description="Of Whisper: write down, or put into English; its own setting otherwise.")
    ] = None
    max_new_tokens: Annotated[
        int | None, Field(ge=1, description="Longest transcript; as long as the decoder has places for otherwise.")
    ] = None
    beams: Annotated[int, Field(ge=1, description="That are followed; 1 takes the likeliest token.")] = 1
    normalize: Annotated[
        tuple[SpeechNormalization, ...],
        BeforeValidator(_listed),
        Field(description="Done to hypothesis and transcript before they are compared; blanks at the ends go."),
    ] = ()
    spellings: Annotated[
        str | None, Field(min_length=1, description="For whisper_english: `normalizer.json` of a Whisper model.")
    ] = None

    @model_validator(mode="after")
    def _one_normalizer(self) -> Asr:
        own = [step for step in self.normalize if step in _OWN]
        if own and len(self.normalize) > 1:
            raise ValueError(f"normalize: {own[0]!r} does all by itself; give it alone")
        if self.spellings is not None and "whisper_english" not in own:
            raise ValueError("'spellings' belongs to 'normalize: whisper_english'")
        return self

    @model_validator(mode="after")
    def _chat_or_whisper(self) -> Asr:
        if self.messages is None:
            return self
        if "user" not in [m.role for m in self.messages]:
            raise ValueError("'messages' needs a turn of the user, in which the sound is")
        if given := [key for key in ("prompt", "language", "task") if getattr(self, key) is not None]:
            raise ValueError(f"{given[0]!r} is for Whisper; 'messages' ask for it in words")
        if self.beams > 1:
            raise ValueError("'beams' has no place with 'messages': their answers are greedy")
        if self.max_new_tokens is None:
            raise ValueError("'max_new_tokens' is missing: with 'messages' nothing else limits a transcript")
        return self

    @property
    def ask(self) -> Transcribed | Generated:
        """How answers are asked of a model."""
        if self.messages is not None and self.max_new_tokens is not None:
            return Generated(self.max_new_tokens, transcript=True)
        return Transcribed(self.language, self.task, self.max_new_tokens, self.beams)

    def inputs_of(self) -> InputMaker:
        """Return the sound of every row, and what was spoken before it where there is a prompt; or chat turns with it."""
        if self.messages is not None:
            return chat_inputs(self.messages, self.file_column, self.where)
        sounds = super().inputs_of()
        if self.prompt is None:
            return sounds
        template = Compiled(self.prompt, f"{self.where}: prompt")

        def both(rows: Sequence[Row]) -> list[Inputs | TaskError]:
            return [_with_text(*pair) for pair in zip(sounds(rows), template.each(rows), strict=True)]

        return both

    def check_target(self, target: str) -> None:
        """Make sure that errors can be counted by a transcript.

        Raises:
            TaskError: it is empty.
        """
        check_reference(target, normalizer(self.normalize, self.spellings), self.metric, self.where)

    def own_digest(self) -> Mapping[str, Any]:
        """Return what scores depend on besides the fields and the examples: what decodes sounds, and normalizes texts."""
        spellings = None if self.spellings is None else content_digest(read_spellings(Path(self.spellings)))
        whisper = {"transformers": version("transformers")} if _OWN.intersection(self.normalize) else {}
        return {**super().own_digest(), "spellings": spellings, **whisper}


def _with_text(sound: Inputs | TaskError, text: str | TaskError) -> Inputs | TaskError:
    if isinstance(sound, TaskError):
        return sound
    return text if isinstance(text, TaskError) else {**sound, "text": text}
