"""What base, single adapters and a merge write to the same prompts."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from pydantic import Field

from plait.adapters.adapter import Adapter
from plait.adapters.config import ADAPTER_CONFIG
from plait.errors import TaskError
from plait.evaluation.candidates import Candidate, base_candidate, single_candidate
from plait.evaluation.generation import Sampling, write_reply
from plait.evaluation.loaded_base import LoadedBase
from plait.evaluation.model_calls import vocabulary
from plait.parsing import lines_of, read_text
from plait.recipes.schema import Recipe
from plait.records import Record
from plait.tasks.encoding import PromptEncoder
from plait.tasks.inputs import Messages
from plait.tasks.kinds.generation import Generation
from plait.tasks.rows import read_file
from plait.version import __version__
from plait.views import Viewed

Prompted: TypeAlias = str | Messages

_LINES = (".txt",)  # endings of files with one prompt per line


class Listener(Protocol):
    """Follows replies while they are written."""

    def writing(self, name: str, text: str) -> None:
        """Receive what someone has written so far; nothing before the first token."""

    def replied(self, asked: AskedPrompt) -> None:
        """Receive a prompt with all replies."""


class NoListener:
    """Follows nothing."""

    def writing(self, name: str, text: str) -> None:
        """Do nothing."""

    def replied(self, asked: AskedPrompt) -> None:
        """Do nothing."""


class Reply(Record):
    """One text that a model wrote.

    Attributes:
        text: without special tokens.
        tokens: how many were generated.
        complete: whether it came to its end before the longest length.
    """

    text: str
    tokens: int
    complete: bool


class AskedPrompt(Record):
    """One prompt and what was written to it.

    Attributes:
        prompt: as it was given: text, or turns of a chat (role, content).
        text: as the models read it.
        replies: who → reply, in the order in which they were asked.
    """

    prompt: Prompted
    text: str
    replies: dict[str, Reply]


class AskResult(Viewed, Record):
    """What was written to some prompts.

    Attributes:
        plait: version.
        base_model: as it was written.
        names: who was asked.
        prompts: each with its replies.
        max_new_tokens: longest reply.
        temperature: 0 where the likeliest tokens were taken.
        top_p: of the draws.
        seed: of the draws.
        dtype: of the base in memory, as transformers takes it.
        notes: for people.
        seconds: that it took.
    """

    plait: str
    base_model: str
    names: tuple[str, ...]
    prompts: tuple[AskedPrompt, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    dtype: str
    notes: tuple[str, ...] = Field(default_factory=tuple)
    seconds: float


@dataclass(frozen=True, eq=False)
class Respondent:
    """Who is asked.

    Attributes:
        name: for people.
        candidate: puts it on the base; None for a full model.
        heads: adapter whose heads act; None for the base's.
        model: folder of that full model, which is loaded once.
    """

    name: str
    candidate: Candidate | None = None
    heads: str | None = None
    model: Path | None = None

    def on(self, live: LoadedBase, models: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Return a context whose value is the model that replies."""
        return nullcontext(models[self.name]) if self.candidate is None else self.candidate.act(live, self.heads)


def base_and_singles(adapters: Mapping[str, Adapter], base: str = "base") -> list[Respondent]:
    """Return the base, and every adapter as it was trained.

    Args:
        adapters: by name.
        base: what the base is called.
    """
    heads = {name: name if adapter.full_tensors else None for name, adapter in adapters.items()}
    singles = (Respondent(name, single_candidate(name, adapters), heads[name]) for name in adapters)
    return [Respondent(base, base_candidate(adapters)), *singles]


def heads_apart(recipe: Recipe, adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """Return a note where a merge keeps heads apart, none of which a prompt belongs to."""
    kept = [name for name, adapter in adapters.items() if adapter.full_tensors]
    if recipe.heads.policy != "separate" or not kept:
        return ()
    return (
        f"the merge keeps the heads or token rows of {', '.join(kept)} apart, one per task; it replies with the base's. "
        "`heads: {policy: average}` or `heads: {policy: from, adapter: NAME}` merges them.",
    )


def read_prompts(source: str | Path | Sequence[str | Sequence[Mapping[str, str]]]) -> tuple[Prompted, ...]:
    """Return prompts: one text, those of a file, or a list of texts and chats.

    Args:
        source: text; a file: lines of a `.txt`, or rows (`.jsonl`, `.json`, `.csv`, `.parquet`) with the column `prompt` or
            `messages`; or texts and lists of `{"role": …, "content": …}`.

    Raises:
        TaskError: there is no prompt, or a row has neither column.
    """
    if isinstance(source, Path) or (isinstance(source, str) and _is_file(source)):
        found = tuple(_of_file(Path(source)))
        if not found:
            raise TaskError(f"{source}: there is no prompt in this file.")
        return found
    if isinstance(source, str) and _is_result(source):
        raise TaskError(f"{source} is an adapter or a model, and the prompt comes first: plait ask PROMPT|FILE {source} ….")
    given = [source] if isinstance(source, str) else [*source]
    prompts = tuple(p if isinstance(p, str) else _chat(p, f"prompt {i}") for i, p in enumerate(given, 1))
    if not prompts or not all(prompts):
        raise TaskError("a prompt must not be empty.")
    return prompts


def _is_file(text: str) -> bool:
    """Whether a prompt is the name of a file: one that is there, or a word with the ending of one."""
    return _is_there(Path(text)) or (Path(text).suffix.lower() in (*_LINES, ".jsonl") and len(text.split()) == 1)


def _is_result(text: str) -> bool:
    """Whether a prompt is the folder of an adapter or a model, which was meant for another place."""
    return any(_is_there(Path(text) / name) for name in (ADAPTER_CONFIG, "config.json"))


def _is_there(place: Path) -> bool:
    """Whether there is a file; a text that no file can be called by is the name of none.

    Raises:
        TaskError: the system cannot say, of a text that looks like a name.
    """
    try:
        return place.is_file()
    except ValueError:  # NUL in it
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG or len(str(place).split()) > 1:
            return False
        raise TaskError(f"{place}: {error.strerror or error}.") from None


def _of_file(file: Path) -> Iterator[Prompted]:
    if file.suffix.lower() in _LINES:
        yield from (line for line in lines_of(read_text(file, TaskError)) if line.strip())
        return
    for number, row in enumerate(read_file(file, besides=_LINES), 1):
        if isinstance(text := row.get("prompt"), str) and text:
            yield text
        elif row.get("messages"):
            yield _chat(row["messages"], f"{file}: row {number}")
        else:
            raise TaskError(f"{file}: row {number} has neither 'prompt' nor 'messages'; it has {', '.join(row) or 'nothing'}.")


def _chat(turns: Any, where: str) -> Prompted:
    try:
        return tuple((str(turn["role"]), str(turn["content"])) for turn in turns)
    except (TypeError, KeyError):
        raise TaskError(f"{where}: messages must be a list of {{role: …, content: …}}.") from None


@dataclass(frozen=True, eq=False)
class Asking:
    """Prompts that several respondents are asked.

    Attributes:
        live: the base.
        respondents: in their order.
        prompts: as given.
        sampling: how replies are written.
        system: the chat's first message, where a prompt is text.
        plain: read prompts as they are, without the chat template.
    """

    live: LoadedBase
    respondents: Sequence[Respondent]
    prompts: Sequence[Prompted]
    sampling: Sampling
    system: str | None = None
    plain: bool = False

    def result(self, base: str, notes: Sequence[str], listener: Listener) -> AskResult:
        """Ask everyone everything.

        Args:
            base: the base model as it was written.
            notes: for people.
            listener: follows replies.

        Raises:
            TaskError: the model writes no text, or a prompt does not fit.
        """
        began, how = time.perf_counter(), self.sampling
        asked = tuple(self.run(listener))
        return AskResult(
            plait=__version__,
            base_model=base,
            names=tuple(r.name for r in self.respondents),
            prompts=asked,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            dtype=self.live.options.dtype,
            notes=tuple(notes),
            seconds=round(time.perf_counter() - began, 3),
        )

    def run(self, listener: Listener) -> Iterator[AskedPrompt]:
        """Yield each prompt with all replies.

        Raises:
            TaskError: the model writes no text, or a prompt does not fit.
        """
        with ExitStack() as stack:
            models = {r.name: stack.enter_context(self.live.model(r.model)) for r in self.respondents if r.model is not None}
            for respondent in self.respondents:  # what is loaded and merged is so before the first reply
                with respondent.on(self.live, models) as model:
                    self._check(model)
            for given, prompt in zip(self.prompts, self.read, strict=True):
                replies = {}
                for respondent in self.respondents:
                    with respondent.on(self.live, models) as model:
                        replies[respondent.name] = self._reply(model, prompt, partial(listener.writing, respondent.name))
                asked = AskedPrompt(prompt=given, text=self._texts.text(prompt), replies=replies)
                listener.replied(asked)
                yield asked

    def _check(self, model: Any) -> None:
        if not getattr(model, "can_generate", lambda: False)():
            raise TaskError(f"{self.live.base}: {type(model).__name__} writes no text; only language models reply.")

    def tokens(self, model: Any, prompt: Prompted) -> Sequence[int]:
        """Return a prompt, as the encoder takes it, in tokens as a model reads it."""
        encoder = self._encoder(encoder_decoder=bool(model.config.is_encoder_decoder), size=vocabulary(model))
        return encoder.question(prompt, []).prompt

    def _reply(self, model: Any, prompt: Prompted, report: Callable[[str], object]) -> Reply:
        tokens = self.tokens(model, prompt)
        report("")
        text, count, complete = write_reply(model, self.live.tokenizer, tokens, self.sampling, report)
        return Reply(text=text, tokens=count, complete=complete)

    @cached_property
    def is_chat(self) -> bool:
        """Whether prompts are read by the chat template."""
        return not self.plain and bool(getattr(self.live.tokenizer, "chat_template", None))

    @cached_property
    def read(self) -> list[Prompted]:
        """The prompts as the encoder takes them.

        Raises:
            TaskError: a chat, or a first message, where there is no chat template.
        """
        if not self.is_chat:
            why = "--plain (plain=True) reads text alone" if self.plain else f"{self.live.base} has no chat template"
            if self.system is not None or not all(isinstance(prompt, str) for prompt in self.prompts):
                raise TaskError(f"messages need a chat template, and {why}; give the prompt as text.")
            return [*self.prompts]
        first = () if self.system is None else (("system", self.system),)
        return [(*first, ("user", prompt)) if isinstance(prompt, str) else prompt for prompt in self.prompts]

    @cached_property
    def _texts(self) -> PromptEncoder:
        return self._encoder(encoder_decoder=False, size=None)

    def _encoder(self, *, encoder_decoder: bool, size: int | None) -> PromptEncoder:
        asked = {"messages": [{"role": "user", "content": "{{ prompt }}"}]} if self.is_chat else {"prompt": "{{ prompt }}"}
        task = Generation.model_validate({"name": "prompt", "kind": "generation", **asked})
        return PromptEncoder(self.live.tokenizer, task, encoder_decoder=encoder_decoder, vocabulary=size)
