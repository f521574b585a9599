"""Chats with images or sounds → tokens and the model's other inputs, by its own processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.errors import TaskError
from plait.hub.pretrained import refuse_failures
from plait.tasks.chat import chat_text, template_name
from plait.tasks.examples import Examples
from plait.tasks.hearing import check_longest, sample_counts
from plait.tasks.images import decoded
from plait.tasks.inputs import PLACE, FileKind, Messages
from plait.tasks.sounds import samples

_ROOM = 1 << 30  # bytes of inputs that are kept until they are read; those of others are made a second time
_PARTS: Mapping[FileKind, tuple[str, ...]] = {"image": ("image_processor",), "audio": ("feature_extractor", "audio_processor")}


class Perceived:
    """What a model is given of a prompt besides its tokens.

    Args:
        tensors: by their names: of one row, or of as many as there are images, patches or sounds.
        again: makes them again, where they are not to be kept; None: they are kept.

    Attributes:
        form: names and sizes of a row; prompts of one form and one length share a batch.
        size: how many numbers the tensors hold.
    """

    def __init__(self, tensors: Mapping[str, Any], again: Callable[[], Mapping[str, Any]] | None = None) -> None:
        self._kept, self._again = tensors if again is None else None, again
        self.form = repr([(name, tuple(tensor.shape[1:])) for name, tensor in sorted(tensors.items())])
        self.size = sum(tensor.numel() for tensor in tensors.values())

    def tensors(self) -> Mapping[str, Any]:
        """Return the tensors; what belongs to tokens has one row, (1, tokens)."""
        if self._again is not None:
            return self._again()
        return self._kept or {}


class ChatProcessor:
    """Reads chats with images or sounds, as a model's own processor and chat template have them.

    Args:
        processor: of transformers.
        kind: of the files.
        where: whose chats they are, for messages.

    Raises:
        TaskError: it takes no such files, or has no chat template.
    """

    def __init__(self, processor: Any, kind: FileKind, where: str) -> None:
        self._processor, self._kind, self._where, self._held = processor, kind, where, 0
        self.tokenizer = processor.tokenizer
        self._home = getattr(self.tokenizer, "name_or_path", "") or "the model"
        part = next((found for name in _PARTS[kind] if (found := getattr(processor, name, None)) is not None), None)
        if part is None:
            raise TaskError(f"{where} has a column {kind!r}, and {type(processor).__name__} of {self._home} takes none.")
        template = getattr(processor, "chat_template", None)
        self._template = template.get("default") if isinstance(template, dict) else template
        if not self._template:
            raise TaskError(
                f"{where} has 'messages' with {kind!r}, but {self._home} has no chat template, which says where it is read."
            )
        self.part = part
        self._check_template()

    def check(self, examples: Examples) -> None:
        """Make sure that the processor cuts none of the sounds.

        Raises:
            TaskError: one is longer than what the model hears, or whether it is cut is not known.
        """
        if self._kind == "audio":
            counts = [max(sample_counts(self.part, e.sounds)) for e in examples.items]
            check_longest(self.part, examples, counts)

    def text(self, messages: Messages) -> str:
        """Return chat turns as the model reads them, up to where the answer begins, with its own mark for every file."""
        turns = [{"role": role, "content": _parts(text, self._kind)} for role, text in messages]
        return self._rendered(turns)

    def adds_tokens(self, text: str) -> bool:
        """Whether the tokenizer's special tokens are put around a chat, as transformers has it: where it does not begin so."""
        first = self.tokenizer.bos_token
        return first is None or not text.startswith(first)

    def read(self, text: str, files: Sequence[bytes], number: int) -> tuple[list[int], Perceived]:
        """Return a chat's tokens and what the model is given besides.

        Args:
            text: as `text` returns it.
            files: encoded, in their order.
            number: of the example, for messages.

        Raises:
            TaskError: the processor does not take them.
        """

        def make() -> dict[str, Any]:
            with refuse_failures(
                self._home, f"{self._where}: the processor cannot read the chat of example {number} (from 0)", TaskError
            ):
                given = self._processor(
                    text=[text],
                    add_special_tokens=self.adds_tokens(text),
                    return_tensors="pt",
                    **self._given(files),
                )
                return {name: value for name, value in given.items() if name != "attention_mask"}

        made = make()
        ids: list[int] = made.pop("input_ids")[0].tolist()
        others = [name for name, value in made.items() if not hasattr(value, "dtype")]
        if others or "cross_attention_mask" in made:
            name = (others or ["cross_attention_mask"])[0]
            raise TaskError(
                f"{self._where}: {type(self._processor).__name__} makes {name!r}, which plait cannot read with yet."
            )
        size = sum(value.numel() * value.element_size() for value in made.values())
        kept = self._held + size <= _ROOM
        self._held += size * kept
        return ids, Perceived(made, None if kept else lambda: {k: v for k, v in make().items() if k != "input_ids"})

    def _given(self, files: Sequence[bytes]) -> dict[str, Any]:
        if self._kind == "image":
            return {"images": [[decoded(data) for data in files]]}
        rate = int(self.part.sampling_rate)
        return {"audio": [samples(data, rate) for data in files], "sampling_rate": rate}

    def _check_template(self) -> None:
        """Refuse a template that leaves files out."""
        without = [{"type": "text", "text": "a"}]
        plain, seen = (
            self._rendered([{"role": "user", "content": content}]) for content in (without, [{"type": self._kind}, *without])
        )
        if plain == seen:
            raise TaskError(
                f"{template_name(self.tokenizer)} has no place for {self._kind} files: with one it writes what it does without "
                f"one. {self._where} has a column {self._kind!r}."
            )

    def _rendered(self, turns: Sequence[Mapping[str, Any]]) -> str:
        return chat_text(self.tokenizer, turns, add_generation_prompt=True, template=self._template)


def _parts(text: str, kind: FileKind) -> list[dict[str, str]]:
    """Return a turn in parts: texts, and the places of files."""
    first, *others = text.split(PLACE)
    parts = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": kind}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]
