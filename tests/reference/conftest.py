"""One thread of torch: on matrices this small, more of them only wait for each other."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every reference test."""
