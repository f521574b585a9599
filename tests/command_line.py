"""The command line, in the tests' own process."""

from __future__ import annotations

import pytest

from plait.cli.main import main


def exit_code(*words: object) -> int:
    """Run `plait WORDS` and return its exit code."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, words)])
    return int(left.value.code or 0)
