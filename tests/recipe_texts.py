"""Recipes as text, and what is wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from plait.errors import RecipeError
from plait.recipes.loading import build_recipe, load_recipe
from plait.recipes.schema import Recipe
from plait.stages import STAGES, base

PAIR = "adapters:\n  - {name: a, path: ./a}\n  - {name: b, path: ./b}\n"
FULL = """\
version: 1
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
adapters:
  - {name: intent,  path: ./adapters/intent,  weight: 0.7}
  - {name: langid,  path: org/repo@main/checkpoint-2874}
method: {name: ties, density: 0.3, sign: total, space: delta}
merge_mode: union
transforms: [{name: layer_l2_normalize, target_norm: 1.0}]
weights: {policy: per_layer, default: 1.0, layers: {3: 0.5}}
output: {kind: adapter, rank: auto, dtype: float32}
seed: 0
"""


def problems(text: str | Path, **kwargs) -> list[str]:
    """Return the problems that are listed for a recipe, one by one."""
    with pytest.raises(RecipeError) as error:
        load_recipe(text, **kwargs)
    head, *rest = str(error.value).split("\n  - ")
    if rest:
        assert head.endswith(f": {len(rest)} problems")
    return rest or [head]


def refused(data: dict[str, Any]) -> list[str]:
    """Return the problems that are listed for a recipe as data, one by one."""
    with pytest.raises(RecipeError) as error:
        build_recipe(data)
    head, *rest = str(error.value).split("\n  - ")
    return rest or [head]


def quietly(load: Callable[..., Recipe], recipe: Any, overrides: Sequence[str] | None = None) -> Recipe:
    """Load a recipe whose notes another test reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(recipe) if overrides is None else load(recipe, overrides=overrides)


TOP = ", ".join(Recipe.model_fields)


TIES = "flavor, density, scope, kept, sign, weighted_vote, zero_sign, divisor, name, space"
COMBINE = (base.LinearCombine, base.GramCombine, base.EntryCombine, base.DeltaCombine)
COMBINES = [name for name, stage in STAGES.items() if issubclass(stage, COMBINE)]
BEFORE = [name for name, stage in STAGES.items() if issubclass(stage, (base.DeltaStage, base.EntryStage))]
AFTER = [name for name, stage in STAGES.items() if issubclass(stage, base.MergedStage)]
