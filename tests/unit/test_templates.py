"""Templates from elsewhere: the same texts as Jinja and transformers make, and an end to those that have none."""

from __future__ import annotations

import math
import os
from decimal import Decimal
from importlib import import_module

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plait.errors import TaskError
from plait.tasks import rendering
from plait.tasks.chat import chat_text, limited_chats
from plait.tasks.templates import Template
from tests.chat_models import CHATML, byte_tokenizer
from tests.warm import run_forked

TOO_MUCH_MEMORY = {
    "multiplied text": "{{ 'a' * 2 * 10**9 }}",
    "multiplied list": "{{ ([0] * 10**9)|length }}",
    "width": "{{ '%2000000000s' % word }}",
    "format": "{{ '{:>2000000000}'.format(word) }}",
    "indent": "{{ word|indent(2 * 10**9, true) }}",
    "ljust": "{{ word.ljust(2 * 10**11) }}",
    "center": "{{ word|center(2 * 10**9) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "join": "{{ range(99999)|join('x' * 10**6) }}",
    "doubling": "{% set n = namespace(t='ab') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
}
TOO_DEEP = {
    "macro": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "loop": "{% for x in [[1]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "blocks": "{% if word %}" * 3000 + "{% endif %}" * 3000,
}
TOO_LONG = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (7 ** (10 ** 9)) % 2 }}",
    "sums": "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "folded while it is compiled": "{{ 7 ** (10 ** 9) > 1 }}",
    "slices": "{{ word|slice(10**10)|list|length }}",
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(rendering, "_SECONDS", 0.2)


@pytest.mark.parametrize("source", TOO_MUCH_MEMORY.values(), ids=TOO_MUCH_MEMORY)
def test_memory_has_an_end(source):
    with pytest.raises(TaskError, match=r"^task 'x': prompt: .*(1024 MiB|characters; at most)"):
        Template(source, "task 'x': prompt")({"word": "w"})


@pytest.mark.parametrize("source", TOO_DEEP.values(), ids=TOO_DEEP)
def test_depth_has_an_end(source):
    with pytest.raises(TaskError, match=r"^prompt: it is nested too deeply"):
        Template(source, "prompt")({"word": "w"})


@pytest.mark.parametrize("source", TOO_LONG.values(), ids=TOO_LONG)
def test_time_has_an_end(source, short):
    with pytest.raises(TaskError, match=r"^prompt.*: it takes too long to render, and was stopped"):
        Template(source, "prompt")({"word": "w"})
    assert Template("{{ word }}!", "prompt")({"word": "w"}) == "w!", "the next template is rendered as ever"


def test_time_is_that_of_all_texts(short, monkeypatch):
    monkeypatch.setattr(rendering, "_SECONDS_EACH", 0.0)
    slow = Template("{% for i in range(word * 1000) %}{% endfor %}x", "prompt")
    assert slow({"word": 1}) == "x"
    with pytest.raises(TaskError, match=r"^prompt \(one of texts 2 to 513\): it takes too long"):
        slow.each([{"word": 90}] * 2000)


def test_all_texts_together_have_an_end(monkeypatch):
    monkeypatch.setattr(rendering, "_TOTAL", 10_000)
    with pytest.raises(TaskError, match="together"):
        Template("{{ 'a' * 1000 }}", "prompt").each([{}] * 600)


@pytest.mark.parametrize("source", ["{{ word.__class__ }}", "{{ cycler.__init__.__globals__ }}", "{{ [].append(1) }}"])
def test_the_sandbox_refuses_what_reaches_out(source):
    with pytest.raises(TaskError, match=r"unsafe|not safely|is not safe"):
        Template(source, "prompt")({"word": "w"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ x y }}", r"prompt: line 2 is not Jinja2: expected token"),
        ("{{ x.y }}", r"prompt: 'str object' has no attribute 'y'; there are x, y.z\."),
        ("{{ nope }}", r"prompt: 'nope' is undefined; there are x, y.z\."),
        ("{{ 1 // 0 }}", r"prompt: ZeroDivisionError: "),
        ("{{ x|nope }}", r"prompt: line 1 is not Jinja2: No filter named 'nope'\."),
        ("{% include 'a' %}", r"prompt: TypeError: no loader for this environment"),
        ("{{ '\\ud800' }}", r"prompt: the text holds half a surrogate pair \(U\+D800\)"),
        ("{{ 10 ** 5000 }}", r"prompt: ValueError: Exceeds the limit"),
    ],
)
def test_what_a_template_raises_is_an_error_of_the_task(source, message):
    with pytest.raises(TaskError, match=message):
        Template(source, "prompt")({"x": "1", "y.z": 2})


def test_texts_are_those_of_jinja_row_by_row():
    rows = [{"n": i, "word": "é\n" * (i % 3), "price": Decimal("1.50"), "list": [i, {"a": None}]} for i in range(1200)]
    source = "{{ n }}{{ word|upper }}{% for x in list %}{{ x }},{% endfor %} {{ price * 2 }}\n"
    plain = ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(source)
    assert Template(source, "prompt").each(rows) == [plain.render(row) for row in rows]


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_null_is_not_written_as_a_word(nothing):
    """Else a model would be asked about `None`."""
    row = {"x": "1", "y": nothing, "z": {"a": nothing}}
    with pytest.raises(TaskError, match=r"prompt: 'y' is null; leave the row out, or write {{ y or '' }} where an empty text"):
        Template("{{ x }}{{ y }}", "prompt")(row)
    with pytest.raises(TaskError, match=r"prompt: a value is null; "):
        Template("{{ z.a }}", "prompt")(row)
    assert Template("{{ x }}{{ y or '' }}{% if y %}{{ y }}{% endif %}", "prompt")(row) == "1"


def test_an_error_of_one_row_leaves_the_others():
    first, second, third = Template("{{ 6 // n }}", "prompt").each([{"n": 2}, {"n": 0}, {"n": 3}])
    assert (first, third) == ("3", "2")
    assert isinstance(second, TaskError)


def test_values_that_no_template_reads_may_be_anything():
    row = {"word": "w", "other": lambda: None}
    assert Template("{{ word }}", "prompt")(row) == "w"
    with pytest.raises(TaskError, match=r"other \(function\)"):
        Template("{{ other }}", "prompt")(row)


# Not in the process of the tests: others of them leave threads in it, and whoever forks there may wait for good.
FORKING = """
import multiprocessing
from plait.tasks.templates import Template

def in_child(queue):
    queue.put(Template("{{ word }} of the child", "prompt")({"word": "w"}))

template = Template("{{ word }} of the parent", "prompt")
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
child = context.Process(target=in_child, args=(queue,))
child.start()
print(queue.get())
child.join()
print(template({"word": "w"}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_renders_in_a_process_of_its_own():
    done = run_forked(FORKING)
    assert done.stdout.splitlines() == ["w of the child", "w of the parent"], done.stderr


TEMPLATES = {
    "chatml": CHATML,
    "special tokens": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content|trim }}{{ eos_token }}{% endfor %}",
    "undefined": "{{ nothing }}{% if enable_thinking is defined %}x{% endif %}{{ messages[0].content }}",
    "tools": (
        "{% if tools %}{{ tools|tojson(indent=2) }}{% endif %}\n"
        "{% for m in messages %}\n    {%- if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}\n"
        "    {{- m.content }}\n{% endfor %}\n"
    ),
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "reversed, with a namespace": (
        "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% if ns.last < 0 and m.role == 'user' %}"
        "{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}"
        "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}{{ messages|length }}{{ dict(a=1) }}",
}
CHATS = [
    [{"role": "user", "content": "a < b & “c”"}],
    [
        {"role": "system", "content": " be brief \n"},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant", "content": "<think>\nhm</think>\n\nhi",
            "reasoning_content": "why", "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1, None]}}}],
        },
        {"role": "user", "content": "again"},
    ],
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_chats_are_those_of_transformers(template, prompt):
    tokens = byte_tokenizer(template, bos_token="<s>")
    for chat in CHATS:
        for tools in (None, TOOLS):
            theirs = tokens.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=prompt)
            assert chat_text(tokens, chat, tools=tools, add_generation_prompt=prompt) == theirs


def test_named_templates_are_chosen_as_transformers_chooses():
    tokens = byte_tokenizer({"default": "{{ messages[0].content }}", "tool_use": "tools: {{ tools|length }}"})
    assert chat_text(tokens, CHATS[0]) == CHATS[0][0]["content"]
    assert chat_text(tokens, CHATS[0], tools=TOOLS) == "tools: 1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TOO_LONG["loops"], "takes too long"),
        (TOO_DEEP["macro"], "nested too deeply"),
        (TOO_MUCH_MEMORY["ljust"].replace("word", "messages[0].content"), "1024 MiB"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception('users first') }}", "it refuses this chat: users first"),
        ("{% if %}", "line 1 is not Jinja2"),
        ("{{ messages.nope.nope }}", "has no attribute 'nope'"),
        (7, "the chat template: "),
        ({"rag": "x"}, "the chat template: ValueError: "),
    ],
)
def test_a_chat_template_that_fails_is_named(template, message, short):
    tokens = byte_tokenizer(None)
    tokens.name_or_path = "some/folder"
    tokens.chat_template = template
    with pytest.raises(TaskError, match=r"^some/folder: the chat template: ") as caught:
        chat_text(tokens, CHATS[0])
    assert message in str(caught.value)


def test_transformers_is_left_as_it_was():
    module = import_module("transformers.utils.chat_template_utils")
    before = module._compile_jinja_template
    with limited_chats("x"):
        assert module._compile_jinja_template is not before
    assert module._compile_jinja_template is before
