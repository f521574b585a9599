"""Rows of every format as examples: what is asked, what is learned, what is left out, what is refused."""

from __future__ import annotations

import json

import pytest

from plait.errors import TaskError
from plait.training.formats import Completion, Conversation, PlainText, convert_rows
from tests.every import every


def turns(*pairs: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in pairs)


def chat(*pairs: tuple[str, str]) -> Conversation:
    return Conversation(turns(*pairs))


ASKED = ("user", "Q"), ("assistant", "A")
MORE = ("user", "R"), ("assistant", "B")

FORMATS = {
    "alpaca": ("alpaca", {"instruction": "Q", "input": "", "output": "A"}, chat(*ASKED)),
    "alpaca with input": ("alpaca", {"instruction": "Q", "input": "I", "output": "A"}, chat(("user", "Q\n\nI"), ASKED[1])),
    "dolly": (
        "alpaca",
        {"instruction": "Q", "context": "C", "response": "A", "category": "x"},
        chat(("user", "Q\n\nC"), ASKED[1]),
    ),
    "instruction and response": ("alpaca", {"Instruction": "Q", "Response": "A"}, chat(*ASKED)),
    "question and answer": ("question_answer", {"question": "Q", "answer": "A"}, chat(*ASKED)),
    "context is not lost": (
        "question_answer",
        {"context": "C", "question": "Q", "answer": "A"},
        chat(("user", "Q\n\nC"), ASKED[1]),
    ),
    "numbers are texts": ("question_answer", {"question": "Q", "answer": 42}, chat(ASKED[0], ("assistant", "42"))),
    "context and response": ("pair", {"Context": "Q", "Response": "A"}, chat(*ASKED)),
    "input and output": ("pair", {"input": "Q", "output": "A"}, chat(*ASKED)),
    "system, user, assistant": (
        "pair",
        {"system": "S", "user": "Q", "assistant": "A"},
        chat(("system", "S"), *ASKED),
    ),
    "prompt and response": ("pair", {"prompt": "Q", "response": "A"}, chat(*ASKED)),
    "prompt and completion": ("prompt_completion", {"prompt": "Q ", "completion": "A"}, Completion("Q ", "A")),
    "prompt and completion in turns": (
        "prompt_completion",
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        Conversation(turns(*ASKED), given=1),
    ),
    "messages": ("messages", {"messages": [*turns(*ASKED, *MORE)]}, chat(*ASKED, *MORE)),
    "messages as JSON text": ("messages", {"messages": json.dumps(turns(*ASKED))}, chat(*ASKED)),
    "content in parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, *turns(ASKED[1])]},
        chat(*ASKED),
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        chat(("system", "S"), *ASKED),
    ),
    "tools": (
        "messages",
        {"messages": [*turns(*ASKED)], "tools": '[{"name": "f"}]'},
        Conversation(turns(*ASKED), tools=[{"name": "f"}]),
    ),
    "text": ("text", {"text": "all of it"}, PlainText("all of it")),
}  # fmt: skip


@every(("format", "row", "example"), FORMATS.values())
def test_every_format(format, row, example):
    found = convert_rows([row, row], where="data")
    assert found.columns.format == format
    assert found.examples == (example, example)


def test_tool_calls_stay_in_their_turn():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (example,) = convert_rows([{"messages": [*turns(("user", "Q")), call]}], where="data").examples
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}


def test_what_is_read_and_what_is_not_is_said():
    found = convert_rows([{"id": 1, "context": "C", "question": "Q", "answer": "A"}], where="data")
    assert str(found.columns) == "question_answer (question + context → answer); not used: id"


def test_a_system_prompt_is_for_conversations_without_one():
    rows = [{"messages": [*turns(("system", "own"), *ASKED)]}, {"messages": [*turns(*ASKED)]}]
    found = convert_rows(rows, where="data", system_prompt="given")
    assert [e.messages[0]["content"] for e in found.examples] == ["own", "given"]
    with pytest.raises(TaskError, match="a system prompt has no place in plain text"):
        convert_rows([{"text": "t"}], where="data", system_prompt="given")


def test_a_system_column_beside_plain_texts_is_told_as_not_used():
    found = convert_rows([{"prompt": "Q ", "completion": "A", "system": "S"}], where="x")
    assert found.examples == (Completion("Q ", "A"),)
    assert str(found.columns) == "prompt_completion (prompt → completion); not used: system"
    turn = {"Prompt": [{"role": "user", "content": "Q"}], "Completion": "A", "system": "S"}
    assert convert_rows([turn], where="x").examples == (Conversation(turns(("system", "S"), *ASKED), given=2),)


def test_a_turn_of_weight_0_is_not_learned():
    rows = [{"messages": [*turns(*ASKED), {"role": "user", "content": "R", "weight": 1}, *turns(MORE[1])]}]
    rows[0]["messages"][1]["weight"] = 0
    (example,) = convert_rows(rows, where="x").examples
    assert example.messages == (*turns(ASKED[0]), {**turns(ASKED[1])[0], "weight": 0}, *turns(*MORE))
    found = convert_rows([*rows, {"messages": rows[0]["messages"][:2]}], where="x")
    assert (len(found.examples), found.unanswered) == (1, 1)


def test_rows_without_an_answer_are_counted():
    rows = [{"instruction": "Q", "output": ""}, {"instruction": "Q", "output": "A"}, {"instruction": "Q", "output": None}]
    found = convert_rows(rows, where="data")
    assert (len(found.examples), found.unanswered) == (1, 2)
    with pytest.raises(TaskError, match="none of 1 rows has an answer"):
        convert_rows(rows[:1], where="data")
    assert convert_rows([{"messages": [*turns(ASKED[0])]}, {"messages": [*turns(*ASKED)]}], where="data").unanswered == 1


def test_an_unknown_format_lists_what_was_found_and_what_is_allowed():
    with pytest.raises(TaskError) as caught:
        convert_rows([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b", "score": 1}], where="rows.jsonl")
    message = str(caught.value)
    assert (
        "rows.jsonl: no known format: the columns that every row has are chosen, rejected (only some rows have score)"
        in message
    )
    for name in ("messages", "sharegpt", "prompt_completion", "alpaca", "question_answer", "pair", "text"):
        assert f"    {name}: " in message


def test_a_format_may_be_named():
    row = {"text": "T", "question": "Q", "answer": "A"}
    assert convert_rows([row], where="data").examples == (chat(*ASKED),)
    assert convert_rows([row], where="data", format="text").examples == (PlainText("T"),)
    assert convert_rows([{"body": "T"}], where="data", text_field="body").examples == (PlainText("T"),)
    with pytest.raises(TaskError, match="data: not sharegpt: the columns"):
        convert_rows([row], where="data", format="sharegpt")


BAD = {
    "no rows": ([], "there are no rows"),
    "an image": ([{"messages": [], "images": ["x"]}], "images: training is on text"),
    "a list for an answer": ([{"question": "Q", "answer": ["A"]}], r"row 0: column 'answer' is not a text: \['A'\]"),
    "turns that are texts": ([{"messages": ["Q", "A"]}], "row 0: column 'messages' is not a list of turns"),
    "an unknown role": ([{"messages": [{"role": "narrator", "content": "x"}]}], "turn 0: the role 'narrator' is not known"),
    "no content": ([{"messages": [{"role": "user", "text": "x"}]}], "turn 0: there is no content; it has role, text"),
    "pictures in parts": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        "turn 0: training is on text",
    ),
}


@every(("rows", "message"), BAD.values())
def test_rows_that_do_not_fit(rows, message):
    with pytest.raises(TaskError, match=message):
        convert_rows(rows, where="data")


def test_all_bad_rows_are_said_at_once_up_to_five():
    with pytest.raises(TaskError) as caught:
        convert_rows([{"question": "Q", "answer": [i]} for i in range(9)], where="data")
    assert [f"row {i}:" in str(caught.value) for i in range(6)] == [True] * 5 + [False]
