"""Methods of third parties: found by entry point, held to the same rules."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from plait.errors import PlanError
from plait.methods import METHODS
from plait.methods import base as methods_base
from plait.methods.base import MethodRegistry

MINE = replace(METHODS["linear"], name="mine")


def register_two(registry: MethodRegistry) -> None:
    registry.add(replace(MINE, name="one"))
    registry.add(replace(MINE, name="two"))


@pytest.fixture
def installed(monkeypatch):
    points = [
        EntryPoint(n, f"{__name__}:{target}", MethodRegistry.group) for n, target in (("b", "register_two"), ("a", "MINE"))
    ]
    monkeypatch.setattr(methods_base, "entry_points", lambda group: points if group == MethodRegistry.group else [])


def test_entry_points_are_loaded_once_and_in_order(installed):
    registry = MethodRegistry()
    registry.load_plugins()
    registry.load_plugins()
    assert list(registry) == ["mine", "one", "two"]


def test_a_name_is_taken_once():
    registry = MethodRegistry()
    registry.add(MINE)
    with pytest.raises(ValueError, match="'mine' is registered already"):
        registry.add(MINE)


def test_unknown_names_suggest():
    with pytest.raises(PlanError, match=r"method 'linaer' is not known. Did you mean 'linear'\?"):
        METHODS["linaer"]
    assert METHODS.get("linear") is METHODS["linear"]
