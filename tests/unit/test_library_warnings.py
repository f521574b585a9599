"""The watch over deprecated uses sees plait's own, and those alone."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import plait
from tests import library_warnings


def library(name: str, body: str) -> ModuleType:
    """Return a module of another package."""
    made = ModuleType(name)
    exec(compile(body, f"{name}.py", "exec"), made.__dict__)
    return made


def called_by_plait(function):
    """Call a function from a file of plait's."""
    namespace = {"__name__": "plait.somewhere", "function": function}
    exec(compile("function()", str(Path(plait.__file__).parent / "somewhere.py"), "exec"), namespace)


OLD = library("library", "import warnings\ndef old(): warnings.warn('old is deprecated', FutureWarning, stacklevel=2)")
OTHER = library("other", "def use(): library.old()")
OTHER.library = OLD
LOGGED = library(
    "logged", "import logging\ndef old(): logging.getLogger('logged').warning('`old` is deprecated! Use `new` instead!')"
)


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    library_warnings.found.clear()


@pytest.mark.parametrize(("function", "seen"), [(OLD.old, True), (LOGGED.old, True), (OTHER.use, False), (str, False)])
def test_a_use_of_plaits_own_is_seen_and_another_is_not(function, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        called_by_plait(function)
        function()
    assert bool(library_warnings.found) is seen
    assert len(library_warnings.found) == seen, "what plait does not call is not plait's"


def test_a_warning_still_points_at_its_caller(recwarn):
    warnings.simplefilter("always")
    OLD.old()
    assert recwarn.pop(FutureWarning).filename == __file__


def test_a_log_still_names_its_caller(caplog):
    logging.getLogger("here").warning("deprecated")
    assert caplog.records[0].pathname == __file__
