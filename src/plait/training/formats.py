"""Rows of any known format → canonical examples. Independent of tokens, models or files.

Three kinds of example come out: a conversation, a prompt with its completion, and plain text. A question with an answer
(alpaca, question/answer, …) is a conversation of one turn; the encoder writes it as plain text for a model without a chat
template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from plait.errors import TaskError, collect
from plait.parsing import parse_json, shown

FormatName = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "question_answer", "pair", "text"]
ChatTurn: TypeAlias = dict[str, Any]
TrainingRow: TypeAlias = Mapping[str, Any]

_SHOWN = 5
_TURNS = {"messages": ("messages",), "sharegpt": ("conversations", "conversation")}
_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat.

    Attributes:
        messages: role, content, and what else the chat template reads (`tool_calls`, …); a turn with `weight` 0 is not learned.
        given: the first so many are given; only assistant turns after them are learned.
        tools: descriptions that the chat template shows; None for none.
    """

    messages: tuple[ChatTurn, ...]
    given: int = 0
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A text and how it continues; the second is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText:
    """A text that is learned from its first token."""

    text: str


@dataclass(frozen=True)
class Perceived:
    """An image or a sound, and what is learned of it.

    Attributes:
        kind: which of them.
        data: the encoded file.
        target: a label, or a transcript.
        before: what was spoken before a transcript; empty where nothing is given.
    """

    kind: Literal["image", "audio"]
    data: bytes
    target: str
    before: str = ""


TrainingExample: TypeAlias = Conversation | Completion | PlainText | Perceived


@dataclass(frozen=True)
class ColumnRoles:
    """How a row is read.

    Attributes:
        format: which one.
        question: the column of the question, of the turns, or of the text.
        answer: the column of the answer; None where `question` holds everything.
        context: columns put after the question.
        system: the column of the system prompt.
        unused: columns that nothing is made of.
    """

    format: FormatName
    question: str
    answer: str | None = None
    context: tuple[str, ...] = ()
    system: str | None = None
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe it in words."""
        parts = [self.question, *self.context] if self.context else [self.question]
        columns_text = " + ".join(parts) + (f" → {self.answer}" if self.answer else "")
        system = f", system prompt from {self.system}" if self.system else ""
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.format} ({columns_text}{system}){unused}"


@dataclass(frozen=True)
class _PairColumns:
    format: FormatName
    question: tuple[str, ...]
    answer: tuple[str, ...]
    context: tuple[str, ...] = ()


# The first that fits. A column may be context only where it is not the question itself.
_PAIRS = (
    _PairColumns("prompt_completion", ("prompt",), ("completion",)),
    _PairColumns("alpaca", ("instruction",), ("output", "response"), ("input", "context")),
    _PairColumns("question_answer", ("question",), ("answer", "response"), ("context",)),
    _PairColumns(
        "pair",
        ("prompt", "user", "query", "message_1", "input", "context"),
        ("response", "answer", "assistant", "output", "message_2", "target"),
        ("context",),
    ),
)
_ALLOWED = (
    "messages: a list of {role, content}",
    "sharegpt: conversations, a list of {from, value}",
    "prompt_completion: prompt, completion",
    "alpaca: instruction, output or response [, input or context] [, system]",
    "question_answer: question, answer or response [, context] [, system]",
    "pair: prompt, user, query, input or context; and response, answer, assistant, output or target [, context] [, system]",
    "text: one column of plain text",
)


@dataclass(frozen=True)
class ConvertedRows:
    """What rows became.

    Attributes:
        columns: how they were read.
        examples: in the rows' order.
        unanswered: rows left out because they have no answer.
    """

    columns: ColumnRoles
    examples: tuple[TrainingExample, ...]
    unanswered: int = 0


def convert_rows(
    rows: Sequence[TrainingRow],
    *,
    where: str,
    format: FormatName = "auto",
    text_field: str = "text",
    system_prompt: str | None = None,
) -> ConvertedRows:
    """Turn rows into examples.

    Rows without an answer are left out and counted; every other row that does not fit is an error.

    Args:
        rows: column → value.
        where: what is read, for messages.
        format: of the rows; found by their columns when `auto`.
        text_field: the column of plain text.
        system_prompt: for conversations that have none.

    Raises:
        TaskError: there are no rows, the format is not known, or rows do not fit; the first few are listed.
    """
    if not rows:
        raise TaskError(f"{where}: there are no rows. Give data with at least one.")
    columns = detect_format(rows, where=where, format=format, text_field=text_field)
    make = _maker(columns, system_prompt)
    examples: list[TrainingExample] = []
    problems: list[str] = []
    unanswered = 0
    for number, row in enumerate(rows):
        try:
            example = make(row)
        except TaskError as error:
            problems.append(f"{where}: row {number}: {error}")
            if len(problems) == _SHOWN:
                break
            continue
        if example is None:
            unanswered += 1
        else:
            examples.append(example)
    collect(TaskError, problems, f"{where}: rows that do not fit, the first of them")
    if system_prompt is not None and any(not isinstance(example, Conversation) for example in examples):
        raise TaskError(
            f"{where}: read as {columns}: a system prompt has no place in plain text. Leave it out, or give a chat."
        )
    if not examples:
        raise TaskError(f"{where}: read as {columns}, none of {len(rows)} rows has an answer that could be learned.")
    return ConvertedRows(columns, tuple(examples), unanswered)


def detect_format(
    rows: Sequence[TrainingRow], *, where: str, format: FormatName = "auto", text_field: str = "text"
) -> ColumnRoles:
    """Detect the format from the columns that every row has; a format with fewer columns never hides one with more.

    Raises:
        TaskError: no format fits, or not the one given for. The message lists what was found and what is allowed.
    """
    present = [name for name in rows[0] if all(name in row for row in rows)]
    named = {name.lower(): name for name in reversed(present)}
    held = {name for row in rows for name in row}
    images = sorted(name for name in held if name.lower() in ("image", "images", "audio", "video", "videos"))
    if images:
        raise TaskError(f"{where}: column {', '.join(images)}: training is on text; images and sound are not read.")
    for columns in _candidates(named, text_field):
        if format in ("auto", columns.format):
            texts = not any(isinstance(v, list) for k, v in rows[0].items() if k in (columns.question, columns.answer))
            if columns.format == "prompt_completion" and texts:
                columns = replace(columns, system=None)  # texts are learned as they are
            used = {columns.question, columns.answer, columns.system, *columns.context}
            extra = {"tools"} if columns.format in ("messages", "sharegpt", "prompt_completion") else set()
            unused = tuple(name for name in present if name not in used and name not in extra)
            return replace(columns, unused=unused)
    wanted = "no known format" if format == "auto" else f"not {format}"
    rest = sorted(held - set(present))
    sometimes = f" (only some rows have {', '.join(rest)})" if rest else ""
    known = "\n".join(f"    {line}" for line in _ALLOWED)
    raise TaskError(
        f"{where}: {wanted}: the columns that every row has are {', '.join(present) or 'none'}"
        f"{sometimes}. Allowed:\n{known}\n  Rename the columns, or name a column of plain text "
        "(dataset_text_field; text_field under a phase's data)."
    )


def is_learned(message: ChatTurn) -> bool:
    """Return whether a turn after those given carries loss: one of the assistant, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def digest_form(example: TrainingExample) -> Any:
    """Return an example as plain values, for hashing."""
    if isinstance(example, Conversation):
        return ["conversation", list(example.messages), example.given, example.tools]
    if isinstance(example, Perceived):
        return [example.kind, hashlib.sha256(example.data).hexdigest(), example.target, example.before]
    return ["completion", example.prompt, example.completion] if isinstance(example, Completion) else ["text", example.text]


def _candidates(named: Mapping[str, str], text_field: str) -> Iterable[ColumnRoles]:
    """Yield every reading that the columns allow, the best first; `named` is lower case → as written."""
    system = named.get("system") or named.get("system_prompt")
    for name, fields in _TURNS.items():
        for field in fields:
            if field in named:
                yield ColumnRoles(name, named[field], system=system)  # type: ignore[arg-type]
    if text_field != "text" and text_field in named.values():
        yield ColumnRoles("text", text_field)
    for pair in _PAIRS:
        question = next((c for c in pair.question if c in named), None)
        answer = next((c for c in pair.answer if c in named and c != question), None)
        if question and answer:
            context = tuple(named[c] for c in pair.context if c in named and c != question)
            yield ColumnRoles(pair.format, named[question], named[answer], context, system)
    if text_field in named.values() or text_field in named:
        yield ColumnRoles("text", named.get(text_field, text_field))


def _maker(columns: ColumnRoles, system_prompt: str | None) -> Callable[[TrainingRow], TrainingExample | None]:
    """Return row → example; None for a row without an answer."""
    if columns.format == "text":
        return lambda row: PlainText(_text(row, columns.question)) if _filled(row, columns.question) else None
    if columns.answer is None:
        return lambda row: _conversation(row, columns, system_prompt)
    if columns.format == "prompt_completion":
        return lambda row: _prompt_completion(row, columns, system_prompt)
    return lambda row: _question(row, columns, system_prompt)


def _question(row: TrainingRow, columns: ColumnRoles, system_prompt: str | None) -> Conversation | None:
    assert columns.answer is not None
    if not _filled(row, columns.answer):
        return None
    parts = [_text(row, columns.question)] + [_text(row, c) for c in columns.context if _filled(row, c)]
    turns: list[ChatTurn] = [
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": _text(row, columns.answer)},
    ]
    return Conversation(_with_system(turns, _system(row, columns, system_prompt)))


def _prompt_completion(row: TrainingRow, columns: ColumnRoles, system_prompt: str | None) -> TrainingExample | None:
    assert columns.answer is not None
    prompt, completion = row[columns.question], row[columns.answer]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Completion(_text(row, columns.question), _text(row, columns.answer)) if _filled(row, columns.answer) else None
    given = _turns(prompt, columns.question) if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]
    given = list(_with_system(given, _system(row, columns, system_prompt)))
    answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    learned = _turns(answer, columns.answer)
    return _answered(Conversation((*given, *learned), len(given), _tools(row)))


def _conversation(row: TrainingRow, columns: ColumnRoles, system_prompt: str | None) -> Conversation | None:
    turns = _turns(row[columns.question], columns.question)
    return _answered(Conversation(_with_system(turns, _system(row, columns, system_prompt)), tools=_tools(row)))


def _answered(conversation: Conversation) -> Conversation | None:
    """Return the conversation; None when it has nothing to learn."""
    learned = conversation.messages[conversation.given :]
    return conversation if any(is_learned(m) and (m.get("content") or m.get("tool_calls")) for m in learned) else None


def _turns(value: Any, column: str) -> list[ChatTurn]:
    value = _parsed(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in value):
        raise TaskError(f"column {column!r} is not a list of turns: {shown(value)}")
    return [_turn(turn, f"column {column!r}, turn {i}") for i, turn in enumerate(value)]


def _turn(turn: Mapping[str, Any], where: str) -> ChatTurn:
    role = turn.get("role", turn.get("from"))
    known = _ROLES.get(str(role).lower())
    if known is None:
        raise TaskError(f"{where}: the role {role!r} is not known; allowed: {', '.join(sorted(_ROLES))}.")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # written as parts
        if not all(isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise TaskError(f"{where}: training is on text, and the content has other parts: {shown(content)}")
        content = "".join(p["text"] for p in content)
    if content is not None and not isinstance(content, str):
        raise TaskError(f"{where}: the content is {shown(content)}, not a text.")
    kept = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value", "weight") and v is not None}
    kept |= {"weight": 0} if turn.get("weight") == 0 else {}
    if content is None and "tool_calls" not in kept:
        raise TaskError(f"{where}: there is no content; it has {', '.join(turn) or 'nothing'}.")
    return {"role": known, "content": content or "", **kept}


def _with_system(turns: Sequence[ChatTurn], system: str | None) -> tuple[ChatTurn, ...]:
    has = bool(turns) and turns[0]["role"] in ("system", "developer")
    return tuple(turns) if has or not system else ({"role": "system", "content": system}, *turns)


def _system(row: TrainingRow, columns: ColumnRoles, system_prompt: str | None) -> str | None:
    own = _text(row, columns.system) if columns.system and _filled(row, columns.system) else None
    return own or system_prompt


def _tools(row: TrainingRow) -> Sequence[Any] | None:
    tools = _parsed(row.get("tools"))
    if tools is not None and not isinstance(tools, list):
        raise TaskError(f"column 'tools' is not a list: {shown(tools)}")
    return tools or None


def _parsed(value: Any) -> Any:
    """Return a list that was written as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(TaskError):
            return parse_json(value, "", TaskError, constants=True, nul=True)
    return value


def _filled(row: TrainingRow, column: str) -> bool:
    value = row[column]
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def _text(row: TrainingRow, column: str) -> str:
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise TaskError(f"column {column!r} is not a text: {shown(value)}")
    return value
