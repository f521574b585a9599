"""Examples → tokens and labels: what carries loss, and what does not.

Loss is on answers and on the token that ends them; prompts, system prompts and tool results have the label -100. What a
chat's answer is, is defined by the model's own template: everything that it writes after the generation prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from plait.errors import TaskError, collect
from plait.hub.pretrained import refuse_failures
from plait.tasks.chat import chat_text
from plait.training.formats import Completion, Conversation, Perceived, PlainText, TrainingExample, is_learned

IGNORED = -100
LongExamples = Literal["drop", "truncate"]
_SHOWN = 5


@dataclass(frozen=True)
class Encoded:
    """One example as the model reads it.

    Attributes:
        ids: (tokens,) int32.
        labels: (tokens,) int32; -100 where nothing is learned.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class EncodedData:
    """All examples that are trained on, or that the loss is also measured on.

    Attributes:
        items: in the examples' order: `Encoded`; of a classifier what its tokenizer gives, and `labels`; of images and sounds
            the file and its labels.
        lengths: tokens of each; none where no text is read.
        limit: most tokens of one; None for any.
        left_out: examples longer than the limit, left out.
        truncated: examples that were cut to it.
        longest: tokens of the longest example before that.
        expanded: conversations that became one example per answer.
        reasons: why images or sounds were left out.
    """

    items: tuple[Any, ...]
    lengths: tuple[int, ...]
    limit: int | None = None
    left_out: int = 0
    truncated: int = 0
    longest: int = 0
    expanded: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Return what became of long examples, and of chat templates that rewrite earlier turns."""
        many = {1: "1 example is"}
        longer = f"max_length {self.limit} (the longest has {self.longest} tokens)"
        found = {
            f"{many.get(self.left_out, f'{self.left_out} examples are')} longer than {longer} and left out. Raise max_length, "
            "or cut with long_examples truncate.": self.left_out,
            f"{many.get(self.truncated, f'{self.truncated} examples are')} cut to {longer}: what comes after is not "
            "learned.": self.truncated,
            f"{self.expanded} conversations became one example per answer, because the chat template writes earlier turns "
            "differently once a later one follows.": self.expanded,
        }
        return [note for note, count in found.items() if count]


#: What is trained on, and what the loss is also measured on; None for nothing.
EncodedSplits: TypeAlias = tuple[EncodedData, EncodedData | None]


class ExampleEncoder:
    """Turns examples into tokens and labels.

    Args:
        tokenizer: of transformers.
        all_tokens: put loss on every token, not on answers alone.
        template: file of the chat template, for messages; the tokenizer's own when None.
    """

    def __init__(self, tokenizer: Any, *, all_tokens: bool = False, template: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has no end-of-sequence token, so that no end can be learned. Name one: eos_token.")
        self._tokenizer = tokenizer
        self._all_tokens = all_tokens
        self._home = template
        self._end = int(tokenizer.eos_token_id)
        self._special = frozenset(tokenizer.all_special_ids) | frozenset(
            i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
        )
        self._closes = self._tokens("", special=True)[-1:] == [self._end] and tokenizer.bos_token_id != self._end

    def encode(self, example: TrainingExample) -> list[Encoded]:
        """Return the example as tokens: one item, or one per answer where the chat template rewrites earlier turns.

        Raises:
            TaskError: the chat template refuses it, or nothing in it is learned.
        """
        if isinstance(example, PlainText):
            ids = self._ended(self._tokens(example.text, special=True))
            return [self._item(ids, ids)]
        if isinstance(example, Completion):
            return [self._completion(example)]
        if isinstance(example, Perceived):
            raise TaskError(f"a language model reads no {example.kind}.")
        if self._tokenizer.chat_template is None:
            return [self._completion(_plain(example))]
        return self._conversation(example)

    def text(self, item: Encoded) -> tuple[str, str]:
        """Return what is given and what is learned of an item, as texts; between learned spans is `…`."""
        learned = item.labels != IGNORED
        edges = np.flatnonzero(np.diff(np.concatenate(([0], learned.astype(np.int8), [0])))).reshape(-1, 2)
        given, *spans = (item.ids[~learned], *(item.ids[start:stop] for start, stop in edges))
        return str(self._tokenizer.decode(given.tolist())), " … ".join(str(self._tokenizer.decode(s.tolist())) for s in spans)

    def _completion(self, example: Completion) -> Encoded:
        prompt = self._open(self._tokens(example.prompt, special=True))
        both = self._open(self._tokens(example.prompt + example.completion, special=True))
        if both[: len(prompt)] != prompt:  # a token reaches over the boundary; at inference the prompt ends there
            both = prompt + self._tokens(example.completion, special=False)
        ids = self._ended(both)
        return self._item(ids, [IGNORED] * len(prompt) + ids[len(prompt) :])

    def _conversation(self, chat: Conversation) -> list[Encoded]:
        turns = [i for i, m in enumerate(chat.messages) if i >= chat.given and is_learned(m)]
        whole = self._template(chat, turns[-1] + 1)  # nothing is learned after the last answer
        labels = [IGNORED] * len(whole)
        stop = 0
        for i in turns:
            before, through = self._template(chat, i, prompt=True), self._template(chat, i + 1)
            stop = _end_of(through, self._special, _shared(before, through))
            if through[:stop] != whole[:stop]:
                return [self._last_turn(chat, turn) for turn in turns]
            start = _shared(before, whole)
            labels[start:stop] = whole[start:stop]
        return [self._item(*self._closed(whole[:stop], labels[:stop]))]

    def _last_turn(self, chat: Conversation, turn: int) -> Encoded:
        through = self._template(chat, turn + 1)
        start = _shared(self._template(chat, turn, prompt=True), through)
        through = through[: _end_of(through, self._special, start)]
        return self._item(*self._closed(through, [IGNORED] * start + through[start:]))

    def _closed(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Append the end of sequence where the template ends an answer with no special token."""
        if labels[-1] != IGNORED and ids[-1] not in self._special:
            return [*ids, self._end], [*labels, self._end]
        return ids, labels

    def _template(self, chat: Conversation, count: int, *, prompt: bool = False) -> list[int]:
        messages = chat.messages[:count]
        text = chat_text(self._tokenizer, messages, tools=chat.tools, add_generation_prompt=prompt, home=self._home)
        return self._tokens(text, special=False)

    def _item(self, ids: Sequence[int], labels: Sequence[int]) -> Encoded:
        learned = ids if self._all_tokens else labels
        if all(label == IGNORED for label in learned):
            raise TaskError("nothing in it is learned: the answer has no tokens.")
        return Encoded(np.asarray(ids, np.int32), np.asarray(learned, np.int32))

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        with refuse_failures(getattr(self._tokenizer, "name_or_path", ""), "the tokenizer cannot read a text", TaskError):
            ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _open(self, ids: list[int]) -> list[int]:
        """Return tokens without the end that some tokenizers put after every text."""
        return ids[:-1] if self._closes and ids[-1:] == [self._end] else ids

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self._end] else [*ids, self._end]


def encode_all(
    encoder: ExampleEncoder, examples: Sequence[TrainingExample], *, limit: int | None, long: LongExamples, where: str
) -> EncodedData:
    """Encode every example.

    Args:
        encoder: of the model.
        examples: what is trained on.
        limit: most tokens of one example; None for any.
        long: what becomes of longer ones. One whose answer is after the limit is left out even with `truncate`.
        where: what is read, for messages.

    Raises:
        TaskError: examples cannot be encoded (the first few are listed), or none is left.
    """
    items: list[Encoded] = []
    problems: list[str] = []
    left_out = truncated = longest = expanded = 0
    for number, example in enumerate(examples):
        try:
            made = encoder.encode(example)
        except TaskError as error:
            problems.append(f"{where}: example {number}: {error}")
            if len(problems) == _SHOWN:
                break
            continue
        expanded += len(made) > 1
        for item in made:
            longest = max(longest, len(item.ids))
            cut = limit is not None and len(item.ids) > limit
            kept = Encoded(item.ids[:limit], item.labels[:limit])
            if cut and (long == "drop" or (kept.labels == IGNORED).all()):
                left_out += 1
            else:
                truncated += cut
                items.append(kept)
    collect(TaskError, problems, f"{where}: examples that cannot be encoded, the first of them")
    if not items:
        raise TaskError(
            f"{where}: no example is left: all {left_out} are longer than max_length {limit} (the longest has "
            f"{longest} tokens). Raise max_length, or cut them with long_examples truncate."
        )
    return EncodedData(tuple(items), tuple(len(item.ids) for item in items), limit, left_out, truncated, longest, expanded)


def _plain(chat: Conversation) -> Completion:
    """Write a question as text, for a model that has no chat template."""
    if len(chat.messages) - 1 != sum(m["role"] != "assistant" for m in chat.messages):
        raise TaskError("a chat of several turns needs a chat template, and the tokenizer has none: give chat_template_path.")
    *earlier, answer = chat.messages
    heads = {"system": "", "developer": "", "user": "### Instruction:\n"}
    unknown = sorted({m["role"] for m in earlier} - {*heads})
    if unknown or answer["role"] != "assistant":
        raise TaskError(f"roles {', '.join(unknown) or 'in this order'} need a chat template, and the tokenizer has none.")
    prompt = "".join(f"{heads[m['role']]}{m['content']}\n\n" for m in earlier)
    return Completion(prompt + "### Response:\n", str(answer["content"]))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _end_of(ids: Sequence[int], special: frozenset[int], start: int) -> int:
    """Return the index after the last special token from `start` on: what a template writes from there begins the next turn."""
    return next((i + 1 for i in range(len(ids) - 1, start - 1, -1) if ids[i] in special), len(ids))
