"""Chats → texts, by the chat template of a tokenizer, under the limits of every template.

transformers renders chat templates without limits. What it does before and after (names of messages, tools, special tokens)
is its own; only the rendering in the middle is taken out of its hands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import RLock
from typing import Any

from plait.errors import PlaitError, TaskError
from plait.libraries.transformers.chats import chats_rendered_by, renders_chats_by_a_function
from plait.notices import announce
from plait.tasks.rendering import LimitedTemplate

_one_at_a_time = RLock()


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    add_generation_prompt: bool = False,
    home: str | None = None,
    template: str | None = None,
) -> str:
    """Return a chat as its model reads it.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: with `role` and `content`.
        tools: that the model may call, as the template takes them.
        add_generation_prompt: end with the generation prompt.
        home: file of the template, for messages; the tokenizer's folder when None.
        template: of a processor; the tokenizer's own when None.

    Raises:
        TaskError: the template refuses the chat, fails, or takes too much; or it is not a template.
    """
    where = template_name(tokenizer) if home is None else f"{home}: the chat template"
    with limited_chats(where):
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=template,
                )
            )
        except PlaitError:
            raise
        except Exception as error:  # what a damaged template makes transformers raise
            raise TaskError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:400]}") from error


def template_name(tokenizer: Any) -> str:
    """Return what messages call a tokenizer's chat template."""
    home = getattr(tokenizer, "name_or_path", "") or ""
    return f"{home}: the chat template" if home else "the chat template"


@contextmanager
def limited_chats(where: str) -> Iterator[None]:
    """Put what transformers renders inside the block under limits.

    Args:
        where: what messages call the template.
    """
    if not renders_chats_by_a_function():
        announce(
            "this release of transformers renders chat templates in a way that plait does not know: they have no limits of "
            "time and memory here."
        )
        yield
        return
    with _one_at_a_time, chats_rendered_by(lambda source: _rendered(source, where)):
        yield


class _ChatTemplate:
    """What transformers takes for Jinja's object."""

    def __init__(self, source: str, where: str) -> None:
        self._limited = LimitedTemplate(source, where, "chat")

    def render(self, **columns: Any) -> str:
        """Return the text of a chat."""
        (found,) = self._limited.render([columns])
        if isinstance(found, TaskError):
            raise found
        return found


_rendered = lru_cache(maxsize=64)(_ChatTemplate)
