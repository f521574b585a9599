"""One test for a table of cases: all of them are checked, and all that fail are reported at once."""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from plait import notices

_SHOWN = 200  # characters of a case


def begin_anew() -> None:
    """Seed what is drawn without a generator; nothing has been announced yet. Before every test, and every case of one."""
    notices.forget_announcements()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what libraries draw from)
    torch.manual_seed(0)


def every(names: str | Sequence[str], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a plain test of one with a table, written like `pytest.mark.parametrize`, and stacked like it.

    The other arguments are fixtures, shared by all cases: only such as no case changes.

    Args:
        names: of the arguments: `"a"`, `"a, b"` or `("a", "b")`.
        cases: a value, or a tuple of values, for each.
    """
    words = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    several = not isinstance(names, str) or "," in names
    rows = list(cases)
    if not rows:
        raise ValueError("a table without cases proves nothing")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)
        missing = [word for word in words if word not in signature.parameters]
        if missing:
            raise TypeError(f"{test.__name__} has no argument {', '.join(missing)}")

        def run(**fixtures: Any) -> None:
            failures = []
            for row in rows:
                begin_anew()
                values = dict(zip(words, row if several else (row,), strict=True))
                try:
                    test(**fixtures, **values)
                except (Exception, pytest.fail.Exception):
                    shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
                    failures.append(f"{shown[:_SHOWN]}\n{traceback.format_exc()}")
            if failures:
                pytest.fail(f"{len(failures)} of {len(rows)} cases\n\n" + "\n".join(failures), pytrace=False)

        run.__name__, run.__qualname__, run.__module__ = test.__name__, test.__qualname__, test.__module__
        run.__doc__ = test.__doc__
        kept = [p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name not in words]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate
