"""One example: what a model is given, by name, and the right answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, cast

Row: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = tuple[tuple[str, str], ...]  # chat turns (role, content)
#: bytes: an encoded file of audio or an image; several stand in chat turns, in their order.
Input: TypeAlias = str | Messages | tuple[str, ...] | bytes | tuple[bytes, ...]
Inputs: TypeAlias = Mapping[str, Input]
FileKind = Literal["image", "audio"]
#: Where an image or a sound is in the text of chat turns: Unicode's character for an object among text.
PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"


class FileColumn(NamedTuple):
    """A column of rows with encoded files.

    Attributes:
        name: of the column.
        kind: what the files are, and the name of the input.
        endings: of names of such files.
    """

    name: str
    kind: FileKind
    endings: tuple[str, ...]


@dataclass(frozen=True)
class TextPair:
    """Two texts."""

    first: str
    second: str


@dataclass(frozen=True)
class Words:
    """A text that is cut into words already."""

    words: tuple[str, ...]


Prompt: TypeAlias = str | Messages | TextPair | Words


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        inputs: name → what the model is given: `text` (with `second` the other of a pair), `messages` or `words`, `audio`,
            `image`; cannot be changed. Of `messages` with images or sounds, these are in the order of the `PLACE`s in them.
        target: the right answer.
        choices: all possible answers; empty where the answer is free.
    """

    inputs: Inputs
    target: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", MappingProxyType(dict(self.inputs)))

    def __reduce__(self) -> tuple[type[Example], tuple[dict[str, Input], str, tuple[str, ...]]]:
        return Example, (dict(self.inputs), self.target, self.choices)

    def __hash__(self) -> int:
        return hash(self.id)

    @classmethod
    def of(cls, prompt: Prompt, target: str, choices: tuple[str, ...] = ()) -> Example:
        """Return an example whose only input is a prompt."""
        return cls(inputs_of(prompt), target, choices)

    @property
    def text(self) -> str | None:
        """The text; None where there is none."""
        found = self.inputs.get("text")
        return found if isinstance(found, str) else None

    @property
    def messages(self) -> Messages | None:
        """The chat turns; None where there are none."""
        found = self.inputs.get("messages")
        return cast("Messages", found) if isinstance(found, tuple) else None

    @property
    def audio(self) -> bytes | None:
        """The audio file's bytes; None where there is none."""
        found = self.inputs.get("audio")
        return found if isinstance(found, bytes) else None

    @property
    def image(self) -> bytes | None:
        """The image file's bytes; None where there is none."""
        found = self.inputs.get("image")
        return found if isinstance(found, bytes) else None

    @property
    def images(self) -> tuple[bytes, ...]:
        """The bytes of all image files."""
        return self._files("image")

    @property
    def sounds(self) -> tuple[bytes, ...]:
        """The bytes of all audio files."""
        return self._files("audio")

    @property
    def files(self) -> tuple[bytes, ...]:
        """The encoded files among the inputs."""
        return self.images + self.sounds

    def _files(self, kind: FileKind) -> tuple[bytes, ...]:
        found = self.inputs.get(kind, ())
        return (found,) if isinstance(found, bytes) else cast("tuple[bytes, ...]", found)

    @property
    def prompt(self) -> Prompt:
        """What is read as text: the chat turns, the words, the pair or the text; empty where there is none of them."""
        if self.messages is not None:
            return self.messages
        match self.inputs:
            case {"words": tuple(words)}:
                return Words(cast("tuple[str, ...]", words))
            case {"text": str(first), "second": str(second)}:
                return TextPair(first, second)
        return self.text or ""

    @property
    def prompt_text(self) -> str:
        """The prompt for people: chat turns as lines of `role: content`, the texts of a pair as lines, a file by its hash."""
        kind = "image" if self.images else "audio"
        named = [f"⟨{kind} of {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}⟩" for data in self.files]
        return self.text_with(named)

    def text_with(self, files: Sequence[str]) -> str:
        """Return the prompt for people, with something in place of every file; of a file without chat turns that alone."""
        text = prompt_text(self.prompt) if self.messages is not None or not files else PLACE
        first, *others = text.split(PLACE) if files else [text]
        return first + "".join(file + other for file, other in zip(files, others, strict=True))

    @cached_property
    def id(self) -> str:
        """Hash of the complete content, 16 hex digits: equal for equal examples, whatever row they are in."""
        return content_digest(self._content, self.choices, self.target)

    @cached_property
    def question(self) -> str:
        """Hash of what is asked, without the answer; of the target itself where nothing is asked."""
        content = self._content
        return content_digest(content, self.choices) if content else content_digest(self.target)

    @property
    def _content(self) -> Any:
        """The prompt alone where there is nothing else, so that hashes of text are those of every release."""
        if self.inputs.keys() <= {"text", "messages"}:
            return self.prompt
        return {k: _hashed(v) for k, v in self.inputs.items()}


def _hashed(given: Any) -> Any:
    """Return an input with hashes in place of files."""
    if isinstance(given, bytes):
        return hashlib.sha256(given).hexdigest()
    return [_hashed(part) for part in given] if isinstance(given, tuple) else given


def inputs_of(prompt: Prompt) -> Inputs:
    """Return a prompt as the only inputs, by their names."""
    match prompt:
        case str():
            return {"text": prompt}
        case TextPair(first, second):
            return {"text": first, "second": second}
        case Words(words):
            return {"words": words}
    return {"messages": prompt}


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one text, for people."""
    match prompt:
        case str():
            return prompt
        case TextPair(first, second):
            return f"{first}\n{second}"
        case Words(words):
            return " ".join(words)
    return "\n".join(f"{role}: {content}" for role, content in prompt)


def content_digest(*parts: Any) -> str:
    """Return a hash of plain values, 16 hex digits."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
