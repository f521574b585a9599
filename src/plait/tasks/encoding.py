"""Prompts and answers → tokens, as the model's own tokenizer and chat template spell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from plait.errors import TaskError
from plait.hub.pretrained import refuse_failures
from plait.tasks.asking import Reading, Similarity
from plait.tasks.chat import chat_text
from plait.tasks.examples import Examples
from plait.tasks.inputs import FileColumn, Messages, Prompt, TextPair, Words
from plait.tasks.perceiving import ChatProcessor, Perceived
from plait.tasks.schema import Task


@dataclass(frozen=True)
class Question:
    """One prompt and its possible continuations, as tokens.

    Attributes:
        prompt: never empty.
        answers: one list per continuation, none empty.
        truncated: whether the prompt lost its beginning to `max_tokens`.
        lead: what a decoder of its own reads before an answer, after its start token; empty without an encoder.
        segments: which text of a pair every token is of, as the tokenizer numbers them; empty where all are 0.
        places: where a word begins, of every word; empty for a text that is not cut into words.
        perceived: what the model is given of the prompt's images or sounds; None where there are none.
    """

    prompt: list[int]
    answers: list[list[int]]
    truncated: bool = False
    lead: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    perceived: Perceived | None = None


def check_tokens(rows: Iterable[Sequence[int]], vocabulary: int | None) -> None:
    """Make sure that a model has embeddings for all tokens.

    Args:
        rows: tokens.
        vocabulary: how many tokens the model has embeddings for; any when None.

    Raises:
        TaskError: it has not.
    """
    largest = max((max(row, default=0) for row in rows), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise TaskError(
            f"the tokenizer gives token {largest}, and the model has embeddings for tokens 0 to {vocabulary - 1}: they do not "
            "belong together."
        )


def encode_readings(
    tokenizer: Any, task: Task, ask: Reading, prompts: Sequence[Prompt], *, vocabulary: int | None = None
) -> list[Question]:
    """Return texts that are read as a whole, without answers; of the pairs of `Similarity` the first and the second in turn.

    Args:
        tokenizer: of transformers.
        task: whose texts they are.
        ask: how it asks.
        prompts: texts, pairs or words.
        vocabulary: tokens that the model has embeddings for; any when None.

    Raises:
        TaskError: the tokenizer cannot read them, or makes no token of a word.
    """
    first, given = _tokenizer_arguments(tokenizer, ask, prompts)
    words = given["is_split_into_words"]
    home = getattr(tokenizer, "name_or_path", "") or "the model"
    with refuse_failures(home, f"the tokenizer cannot read the texts of task {task.name!r}", TaskError):
        found = tokenizer(first, **given)
        lengths = [len(row) for row in found["input_ids"]]
        if ask.max_tokens is not None and max(lengths, default=0) > ask.max_tokens:
            found = tokenizer(first, truncation=True, max_length=ask.max_tokens, **given)
        rows: list[list[int]] = found["input_ids"]
        starts = [_word_starts(found.word_ids(i)) for i in range(len(rows))] if words else [{} for _ in rows]
    check_tokens(rows, vocabulary)
    kinds = found.get("token_type_ids") or [[] for _ in rows]
    questions = []
    for text, row, kind, start, length in zip(first, rows, kinds, starts, lengths, strict=True):
        unread = [word for i, word in enumerate(text) if i not in start] if words else []
        if unread:
            raise TaskError(
                f"task {task.name!r}: the tokenizer makes no token of the word {unread[0]!r}, so it cannot be given a label; "
                "leave it out of the row."
            )
        places = [start[i] for i in range(len(text))] if words else []
        questions.append(Question(row, [], length > len(row), segments=kind if any(kind) else [], places=places))
    return questions


def _tokenizer_arguments(tokenizer: Any, ask: Reading, prompts: Sequence[Prompt]) -> tuple[list[Any], dict[str, Any]]:
    """Return what a tokenizer is given, and how; prompts of a task are all of one kind."""
    pairs = [p for p in prompts if isinstance(p, TextPair)]
    lists = [list(p.words) for p in prompts if isinstance(p, Words)]
    if pairs and isinstance(ask, Similarity):
        return [text for p in pairs for text in (p.first, p.second)], {"is_split_into_words": False}
    if pairs:
        return [p.first for p in pairs], {"text_pair": [p.second for p in pairs], "is_split_into_words": False}
    if lists and _blanks_begin_words(tokenizer):
        lists = [[f" {word}" for word in text] for text in lists]
    return lists or [str(p) for p in prompts], {"is_split_into_words": bool(lists)}


def _word_starts(words: Sequence[int | None]) -> dict[int, int]:
    """Return word → its first token."""
    found: dict[int, int] = {}
    for at, word in enumerate(words):
        if word is not None:
            found.setdefault(word, at)
    return found


def _blanks_begin_words(tokenizer: Any) -> bool:
    """Whether a word has other tokens without a blank before it, as words of a list have none (GPT-2, RoBERTa)."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel(add_prefix_space=False" in repr(getattr(inner, "pre_tokenizer", None))


class PromptEncoder:
    """Turns a task's texts into tokens.

    Text prompts get the tokenizer's special tokens (a beginning-of-sequence token, where there is one); chat prompts get
    what the chat template writes, and nothing else. Prompt and answer are tokenized as one text, so that a word that
    begins with a blank is one token; where the boundary falls inside a token, each by itself.

    An encoder-decoder model reads the prompt in its encoder, ended as its tokenizer ends texts, and generates the answer in
    its decoder; the task's delimiter is not used.

    Args:
        tokenizer: of transformers.
        task: whose texts they are.
        encoder_decoder: for an encoder-decoder model.
        vocabulary: tokens that the model has embeddings for; any when None.
        processor: of transformers, for a task with images or sounds in its chats; its tokenizer is used then.

    Attributes:
        tokenizer: the one that is used.

    Raises:
        TaskError: there is no chat template, or the processor takes no such files.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        *,
        encoder_decoder: bool = False,
        vocabulary: int | None = None,
        processor: Any = None,
    ) -> None:
        column: FileColumn | None = getattr(task, "file_column", None)
        self._chats = None if processor is None or column is None else ChatProcessor(processor, column.kind, task.where)
        if self._chats is not None and encoder_decoder:
            raise TaskError(
                f"{task.where}: chats with images or sounds are read by decoder-only models; this one has an encoder."
            )
        self.tokenizer = self._tokenizer = tokenizer if self._chats is None else self._chats.tokenizer
        self._vocabulary = vocabulary
        self._task = task
        self._encoder_decoder = encoder_decoder
        self._chat = getattr(task, "messages", None) is not None
        if self._chat and self._chats is None and not getattr(tokenizer, "chat_template", None):
            raise TaskError(f"task {task.name!r} has 'messages', but the model's tokenizer has no chat template; use 'prompt'.")

    def text(self, prompt: Prompt) -> str:
        """Return the prompt as the model reads it, up to where the answer begins."""
        if isinstance(prompt, str):
            return prompt
        if self._chats is not None:
            return self._chats.text(cast("Messages", prompt))
        turns = [{"role": role, "content": content} for role, content in cast("Messages", prompt)]
        return chat_text(self._tokenizer, turns, add_generation_prompt=True)

    def questions(self, examples: Examples, answers: Sequence[Sequence[str]]) -> list[Question]:
        """Return every example's prompt with its answers.

        Args:
            examples: the prompts.
            answers: texts per example; the task's delimiter is put before each.

        Raises:
            TaskError: an answer has no tokens.
        """
        files: Sequence[Sequence[bytes]] = ()
        if self._chats is not None:
            self._chats.check(examples)
            files = [e.files for e in examples.items]
        return self.encode([e.prompt for e in examples.items], answers, files)

    def question(self, prompt: Prompt, answers: Sequence[str]) -> Question:
        """Return one prompt with its answers."""
        return self.encode([prompt], [answers])[0]

    def encode(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], files: Sequence[Sequence[bytes]] = ()
    ) -> list[Question]:
        """Return prompts with their answers, and the files of every prompt where there are some; see `questions`."""
        texts = [self.text(p) for p in prompts]
        home = getattr(self._tokenizer, "name_or_path", "") or "the model"
        with refuse_failures(home, f"the tokenizer cannot read the texts of task {self._task.name!r}", TaskError):
            questions = (
                self._encode_separately(texts, answers) if self._encoder_decoder else self._encode_joined(texts, answers)
            )
        if self._chats is not None:
            questions = [self._perceived(*given) for given in zip(questions, texts, files, range(len(texts)), strict=True)]
        check_tokens((part for q in questions for part in (q.prompt, q.lead, *q.answers)), self._vocabulary)
        return questions

    def _encode_joined(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Question]:
        delimiter = getattr(self._task, "delimiter", "")
        whole = [text + delimiter + a for text, some in zip(texts, answers, strict=True) for a in some]
        alone = sorted({delimiter + a for some in answers for a in some})
        special = bool(texts) and self._special(texts[0])
        heads = self._tokens(texts, special=special)
        both = iter(self._tokens(whole, special=special))
        separate = dict(zip(alone, self._tokens(alone, special=False), strict=True))
        questions = []
        for head, some in zip(heads, answers, strict=True):
            pairs = [(next(both), separate[delimiter + a]) for a in some]
            tokens = [joined[len(head) :] if joined[: len(head)] == head else apart for joined, apart in pairs]
            questions.append(self._checked(head, tokens, []))
        return questions

    def _perceived(self, question: Question, text: str, files: Sequence[bytes], number: int) -> Question:
        """Return a question with the tokens that stand for its files, of which the text has a mark for each."""
        if self._chats is None:
            raise AssertionError("there is no processor")
        tokens, perceived = self._chats.read(text, files, number)
        if tokens[-1:] != question.prompt[-1:]:
            raise TaskError(f"{self._task.where}: the processor ends a chat otherwise than its tokenizer does.")
        return replace(question, prompt=tokens, perceived=perceived)

    def _special(self, text: str) -> bool:
        """Whether a prompt gets the tokenizer's special tokens."""
        return not self._chat if self._chats is None else self._chats.adds_tokens(text)

    def _encode_separately(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Question]:
        prompts = self._tokenizer(list(texts), add_special_tokens=not self._chat)["input_ids"]
        different = sorted({a for some in answers for a in some})
        target_ids = self._tokenizer(text_target=different, add_special_tokens=False)["input_ids"] if different else []
        tokens = dict(zip(different, target_ids, strict=True))
        lead = self._tokenizer(text_target="")["input_ids"]  # a language's token, or another beginning; and an end
        lead = lead[:-1] if lead[-1:] == [self._tokenizer.eos_token_id] else lead
        return [self._checked(prompt, [tokens[a] for a in some], lead) for prompt, some in zip(prompts, answers, strict=True)]

    def _checked(self, head: list[int], answers: list[list[int]], lead: list[int]) -> Question:
        if not all(answers):
            raise TaskError(f"task {self._task.name!r}: an answer has no tokens; answers must not be empty.")
        longest: int | None = getattr(self._task, "max_tokens", None)
        kept = head if longest is None else head[-longest:]
        return Question(kept or [self._start()], answers, truncated=len(kept) < len(head), lead=lead)

    def _start(self) -> int:
        """Return the token that begins a text without a prompt."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise TaskError(f"task {self._task.name!r}: the prompt is empty, and the tokenizer has no token to begin a text with.")

    def _tokens(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        end = self._tokenizer.eos_token_id
        closes = special and end is not None and self._tokenizer("")["input_ids"][-1:] == [end]
        # some tokenizers close every text; what follows a prompt is an answer, not an end
        return [row[:-1] for row in rows] if closes and self._tokenizer.bos_token_id != end else rows
