"""The list of recipe forms: the example of CONTRIBUTING.md, added as it says."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

from plait.errors import RecipeError
from plait.recipes.importers import forms
from plait.recipes.importers.base import RecipeWarning
from plait.recipes.loading import load_recipe, migrate_file

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
BLOCK = re.compile(r"<!-- skip: run by tests/unit/test_recipe_forms.py -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def shares(monkeypatch):
    module = types.ModuleType("shares")
    exec(compile(*BLOCK.findall(PAGE.read_text(encoding="utf-8")), str(PAGE), "exec"), module.__dict__)
    monkeypatch.setattr(forms, "RECIPE_FORMS", (*forms.RECIPE_FORMS, module.SHARES))


@pytest.mark.usefixtures("shares")
def test_an_added_form_is_read_migrated_and_refused_by_its_own_lines(tmp_path):
    file = tmp_path / "shares.yaml"
    file.write_text("./maths: 0.75\n./code: 0.25\n", encoding="utf-8")
    with pytest.warns(RecipeWarning, match="read as a weighted sum"):
        recipe = load_recipe(file)
    assert [(a.name, a.weight) for a in recipe.adapters] == [("maths", 0.75), ("code", 0.25)]
    text, notes = migrate_file(file)
    assert load_recipe(text).adapters == recipe.adapters
    assert notes == ["a list of shares is read as a weighted sum."]
    file.write_text("./maths: 0.75\n./code: .inf\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"shares\.yaml:2: "):
        load_recipe(file)
