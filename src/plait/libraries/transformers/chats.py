"""Where transformers renders chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

#: Where transformers makes a chat template's text an object with a method `render`.
_CHATS, _COMPILE = "transformers.utils.chat_template_utils", "_compile_jinja_template"


def renders_chats_by_a_function() -> bool:
    """Whether chat templates are rendered in the one place that `chats_rendered_by` replaces."""
    return hasattr(import_module(_CHATS), _COMPILE)


@contextmanager
def chats_rendered_by(make: Callable[[str], Any]) -> Iterator[None]:
    """Let transformers render chat templates by other objects inside the block; not for several threads at a time.

    Args:
        make: template's text → what has a method `render(**columns)`, in place of Jinja's object.
    """
    module = import_module(_CHATS)
    original = getattr(module, _COMPILE)
    setattr(module, _COMPILE, make)
    try:
        yield
    finally:
        setattr(module, _COMPILE, original)
