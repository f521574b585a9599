"""What carries loss: the answers and their ends, nothing else, character by character."""

from __future__ import annotations

import numpy as np
import pytest

from plait.errors import TaskError
from plait.training.encoding import IGNORED, ExampleEncoder, encode_all
from plait.training.formats import Completion, Conversation, PlainText
from tests.chat_models import CHATML, byte_tokenizer
from tests.language_models import tokenizer as word_tokenizer

END = "<|im_end|>"


def chat(*contents: str, system: str | None = None, asked: int = 0) -> Conversation:
    given = [{"role": "system", "content": system}] if system else []
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return Conversation((*given, *turns), asked)


def parts(tokenizer, item) -> list[tuple[str, str]]:
    """Return the text of an item in runs: '-' for given, '+' for learned."""
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(item.ids.tolist(), item.labels.tolist(), strict=True):
        assert label in (IGNORED, token)
        kind = "-" if label == IGNORED else "+"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    return [(kind, tokenizer.decode(ids)) for kind, ids in runs]


def encoded(tokenizer, example, **options):
    return [parts(tokenizer, item) for item in ExampleEncoder(tokenizer, **options).encode(example)]


def test_every_answer_of_a_chat_is_learned_with_its_end():
    (found,) = encoded(byte_tokenizer(), chat("Q", "A", "R", "B", system="S"))
    assert found == [
        ("-", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"),
        ("+", f"A{END}"),
        ("-", "\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"),
        ("+", f"B{END}"),
    ]


def test_what_stands_behind_the_last_answer_is_left_away():
    assert encoded(byte_tokenizer(), chat("Q", "A", "R")) == encoded(byte_tokenizer(), chat("Q", "A"))


def test_answers_that_are_part_of_the_prompt_are_not_learned():
    (found,) = encoded(byte_tokenizer(), chat("Q", "A", "R", "B", asked=3))
    assert [kind for kind, _ in found] == ["-", "+"]
    assert found[1] == ("+", f"B{END}")


def test_a_turn_of_weight_0_is_not_learned():
    messages = [dict(m) for m in chat("Q", "A", "R", "B").messages]
    messages[1]["weight"] = 0
    (found,) = encoded(byte_tokenizer(), Conversation(tuple(messages)))
    assert [kind for kind, _ in found] == ["-", "+"]
    assert found[1] == ("+", f"B{END}")


def test_a_template_without_an_end_gets_one():
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (found,) = encoded(byte_tokenizer(plain, eos_token="<|end|>"), chat("Q", "A"))
    assert found == [("-", "user: Q\nassistant: "), ("+", "A\n<|end|>")]


def test_an_end_of_turn_that_is_not_the_end_of_sequence_is_learned_and_ends_it():
    (found,) = encoded(byte_tokenizer(CHATML, eos_token="<|end|>"), chat("Q", "A"))
    assert found[-1] == ("+", f"A{END}")


def test_a_template_that_rewrites_earlier_turns_makes_one_example_per_answer():
    """As templates do that drop the thoughts of earlier turns."""
    rewriting = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[-1] }}")
    found = encoded(byte_tokenizer(rewriting), chat("Q", "xA", "R", "yB"))
    assert [item[-1] for item in found] == [("+", f"xA{END}"), ("+", f"yB{END}")]
    assert "assistant\nA<|im_end|>" in found[1][0][1]
    data = encode_all(
        ExampleEncoder(byte_tokenizer(rewriting)), [chat("Q", "xA", "R", "yB")], limit=None, long="drop", where="d"
    )
    assert len(data.items) == 2
    assert data.expanded == 1
    assert "one example per answer" in data.notes[0]


def test_a_template_that_puts_words_before_the_answer_learns_them():
    """As templates do that open a thought only where there is an answer."""
    thinking = CHATML.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}",
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
    )
    (found,) = encoded(byte_tokenizer(thinking), chat("Q", "A"))
    assert found[-1] == ("+", f"<think></think>A{END}")


@pytest.mark.parametrize("pad", [None, END, "<|pad|>"])
def test_the_end_is_learned_whatever_the_padding_is(pad):
    tokenizer = byte_tokenizer(**({} if pad is None else {"pad_token": pad}))
    (item,) = ExampleEncoder(tokenizer).encode(chat("Q", "A"))
    assert item.labels[-1] == tokenizer.eos_token_id


def test_prompt_and_completion_are_texts_as_they_stand():
    assert encoded(byte_tokenizer(), Completion("Q: ", "A")) == [[("-", "Q: "), ("+", f"A{END}")]]
    assert encoded(byte_tokenizer(), Completion("", "A")) == [[("+", f"A{END}")]]
    assert encoded(byte_tokenizer(), Completion("Q", f"A{END}")) == [[("-", "Q"), ("+", f"A{END}")]]


def test_a_token_over_the_boundary_is_split_there():
    """At inference the prompt ends where it ends."""
    tokens = word_tokenizer()
    (item,) = ExampleEncoder(tokens).encode(Completion("sort w", "1 : red"))
    assert item.ids.tolist()[: len(tokens("sort w")["input_ids"])] == tokens("sort w")["input_ids"]
    (item,) = ExampleEncoder(tokens).encode(Completion("sort w1 :", " red"))
    assert tokens.convert_ids_to_tokens(item.ids.tolist()) == ["sort", "w1", ":", "red", "</s>"]
    assert (item.labels != IGNORED).tolist() == [False, False, False, True, True]


def test_plain_text_is_learned_from_its_first_token():
    assert encoded(byte_tokenizer(), PlainText("all")) == [[("+", f"all{END}")]]


def test_without_a_chat_template_a_question_is_written_as_text():
    (found,) = encoded(byte_tokenizer(None), chat("Q", "A", system="S"))
    assert found == [("-", "S\n\n### Instruction:\nQ\n\n### Response:\n"), ("+", f"A{END}")]
    with pytest.raises(TaskError, match="several turns needs a chat template"):
        encoded(byte_tokenizer(None), chat("Q", "A", "R", "B"))


def test_loss_on_everything_when_asked_for():
    (found,) = encoded(byte_tokenizer(), chat("Q", "A"), all_tokens=True)
    assert [kind for kind, _ in found] == ["+"]


def test_bos_is_given_once():
    tokenizer = byte_tokenizer("<s>" + CHATML, bos_token="<s>")
    (found,) = encoded(tokenizer, chat("Q", "A"))
    assert found[0][1].startswith("<s><|im_start|>user")
    assert "<s>" not in found[0][1][3:]


def test_a_template_that_refuses_is_named_with_the_example():
    picky = "{% if messages[0].role != 'user' %}{{ raise_exception('starts with user') }}{% endif %}" + CHATML
    with pytest.raises(TaskError, match=r"rows: example 1: the chat template: it refuses this chat: starts with user"):
        encode_all(
            ExampleEncoder(byte_tokenizer(picky)),
            [chat("Q", "A"), chat("Q", "A", system="S")],
            limit=None,
            long="drop",
            where="rows",
        )


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        ExampleEncoder(tokenizer)


class TestLongExamples:
    LONG = (Completion("Q", "A"), Completion("Q", "A" * 20), Completion("Q" * 20, "A"))

    def encode(self, long, limit=10):
        return encode_all(ExampleEncoder(byte_tokenizer()), self.LONG, limit=limit, long=long, where="rows")

    def test_they_are_left_out_and_counted(self):
        found = self.encode("drop")
        assert (len(found.items), found.left_out, found.truncated, found.longest) == (1, 2, 0, 22)
        assert "2 examples are longer than max_length 10 (the longest has 22 tokens) and left out" in found.notes[0]

    def test_or_cut_and_counted_unless_nothing_would_be_learned(self):
        found = self.encode("truncate")
        assert (len(found.items), found.left_out, found.truncated) == (2, 1, 1)
        assert len(found.items[1].ids) == 10
        assert np.array_equal(found.items[1].labels[1:], found.items[1].ids[1:])

    def test_no_limit_keeps_all(self):
        found = self.encode("drop", limit=None)
        assert (len(found.items), found.left_out) == (3, 0)
        assert not found.notes

    def test_none_left_is_an_error(self):
        with pytest.raises(TaskError, match="no example is left: all 3 are longer than max_length 2"):
            self.encode("drop", limit=2)
