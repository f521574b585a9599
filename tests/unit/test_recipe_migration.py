"""Recipes in the older framework's form: what they become."""

from __future__ import annotations

import copy

import pytest
import yaml

from plait.errors import RecipeError
from plait.recipes.importers.migration import migrate
from plait.recipes.loading import build_recipe, load_recipe, migrate_file
from plait.recipes.writing import to_yaml
from tests.recipe_texts import quietly

ADAPTERS = [{"name": "asr", "path": "./asr"}, {"name": "emotion", "path": "./emotion"}]
WEIGHTED = (
    "the numbers of `method: weighted` differ from before. It interpolated A and B separately and took the first adapter's "
    "scaling; now the deltas are interpolated."
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            {"method": "weighted", "method_params": {"lambda": 0.6}},
            {"method": {"name": "weighted", "lambda": 0.6}},
            id="method_params",
        ),
        pytest.param(
            {"method": "dare", "params": {"drop_rate": 0.5, "lambda": 2.0}},
            {"method": {"name": "dare", "drop_rate": 0.5, "lambda": 2.0}},
            id="params",
        ),
        pytest.param(
            {"method": {"name": "weighted"}, "method_params": {"lambda": 0.6}},
            {"method": {"name": "weighted", "lambda": 0.6}},
            id="a method that is a mapping already",
        ),
        pytest.param(
            {"method": "weighted_delta", "lambda": 0.25},
            {"method": {"name": "weighted_delta", "lambda": 0.25}},
            id="lambda at the top",
        ),
        pytest.param(
            {"method": "ties", "lambda": 0.25},
            {"method": {"name": "ties", "kept": "ceil", "zero_sign": "drop", "scope": "model", "density": 0.2}, "scale": 0.25},
            id="lambda at the top for ties",
        ),
        pytest.param(
            {"method": "ties", "method_params": {"k": 7, "lambda": 1.5}},
            {"method": {"name": "ties", "kept": "ceil", "zero_sign": "drop", "scope": "model", "density": 0.07}, "scale": 1.5},
            id="ties",
        ),
        pytest.param(
            {"method": "dare", "method_params": {"seed": 7}},
            {"method": "dare", "seed": 7},
            id="the seed of dare",
        ),
        pytest.param(
            {"method": "uniform", "lambda": 0.5, "lambda_policy": {"type": "scalar", "value": 0.1}},
            {"method": "uniform"},
            id="lambda without effect",
        ),
        pytest.param(
            {"method": "weighted", "lambda": 0.5, "lambda_policy": {"type": "scalar", "value": 0.25}},
            {"method": {"name": "weighted", "lambda": 0.25}},
            id="a scalar policy goes before lambda",
        ),
        pytest.param(
            {"method": "weighted", "lambda": 0.5, "lambda_policy": {"type": "scalar"}},
            {"method": {"name": "weighted", "lambda": 0.5}},
            id="a scalar policy without a value",
        ),
        pytest.param(
            {
                "method": "weighted_delta",
                "method_params": {"lambda": 0.5},
                "lambda_policy": {"type": "per_layer", "default": 0.25, "overrides": {0: 0.8, 11: 1}},
            },
            {
                "method": "linear",
                "weights": {
                    "policy": "per_layer",
                    "default": {"asr": 0.25, "emotion": 0.75},
                    "layers": {"0": {"asr": 0.8, "emotion": 0.2}, "11": {"asr": 1.0, "emotion": 0.0}},
                },
            },
            id="a policy per layer",
        ),
        pytest.param(
            {"method": "weighted", "lambda": 0.3, "lambda_policy": {"type": "per_layer"}},
            {
                "method": "linear",
                "weights": {"policy": "per_layer", "default": {"asr": 0.3, "emotion": 0.7}, "layers": {}},
            },
            id="a policy per layer that takes its default from lambda",
        ),
        pytest.param(
            {
                "method": "uniform_delta",
                "transforms": [
                    {"name": "layer_l2_normalize", "params": {"target_norm": 2.0}},
                    {"name": "identity", "params": None},
                    "ties_scaffold",
                    {"name": "ties_scaffold", "params": {"k": 1}},
                    {"name": "layer_l2_normalize", "eps": 1e-6},
                ],
            },
            {
                "method": "uniform_delta",
                "transforms": [
                    {"name": "layer_l2_normalize", "target_norm": 2.0},
                    {"name": "identity"},
                    {"name": "identity"},
                    {"name": "identity"},
                    {"name": "layer_l2_normalize", "eps": 1e-6},
                ],
            },
            id="transforms",
        ),
        pytest.param(
            {"method": "uniform_scalar_delta", "method_params": {"scale": 2, "transforms": [{"name": "identity"}]}},
            {"method": {"name": "uniform_scalar_delta", "scale": 2}, "transforms": [{"name": "identity"}]},
            id="transforms among the parameters",
        ),
        pytest.param(
            {
                "method": "uniform",
                "optimizer": {"type": "none", "params": {}},
                "post_sweep_eval": {"enabled": False},
                "grid": None,
                "split": None,
                "eval_tasks": None,
                "eval_subset": None,
                "save_merged": True,
                "output_dir": "x",
                "constraint_nonnegative": False,
                "compute_missing_interference_baselines": True,
                "lambda_policy": None,
            },
            {"method": "uniform"},
            id="what changes nothing",
        ),
        pytest.param(
            {
                "method": "weighted_delta",
                "split": "validation",
                "eval_subset": {"max_samples": 100},
                "search": {
                    "type": "bayes",
                    "budget": 20,
                    "init_points": 6,
                    "seed": 42,
                    "n_candidates": 512,
                    "space": {"lambda": {"type": "continuous", "min": 0.1, "max": 1.0, "scale": "log"}},
                    "initial_points": [{"lambda": 0.5}],
                    "warm_start_sweeps": ["x/sweeps/"],
                    "early_stop": {"enabled": True, "patience": 3, "min_evals": 9, "param_resolution": {"lambda": 0.1}},
                },
                "constraint_nonnegative": False,
                "post_sweep_eval": {"enabled": True, "split": "test", "save_merged": True},
            },
            {
                "method": {"name": "weighted_delta", "lambda": 0.1},
                "eval": {"split": "test"},
                "search": {
                    "type": "bayes",
                    "budget": 20,
                    "init_points": 6,
                    "seed": 42,
                    "split": "validation",
                    "subset": {"max_samples": 100},
                    "space": {"method.lambda": {"type": "float", "min": 0.1, "max": 1.0, "log": True}},
                    "points": [{"method.lambda": 0.5}],
                    "early_stop": {"patience": 3, "min_trials": 9, "resolution": {"method.lambda": 0.1}},
                    "constraint_nonnegative": False,
                    "save_merged": True,
                },
            },
            id="a search by a Gaussian process",
        ),
        pytest.param(
            {"method": "ties", "method_params": {"lambda": 1.0}, "grid": {"k": [10, 20], "lambda": 0.5}, "split": "test"},
            {
                "method": {"name": "ties", "density": 0.2, "kept": "ceil", "zero_sign": "drop", "scope": "model"},
                "scale": 1.0,
                "search": {"type": "grid", "grid": {"method.density": [0.1, 0.2], "scale": [0.5]}},
            },
            id="a grid at the top, of percents",
        ),
        pytest.param(
            {
                "method": "uniform_scalar_delta",
                "search": {
                    "type": "bayes",
                    "inject_zero_baseline": True,
                    "early_stop": {"enabled": False},
                    "space": {"scale": {"type": "float", "min": 0.0, "max": 2.0}},
                },
            },
            {
                "method": "uniform_scalar_delta",
                "search": {
                    "type": "bayes",
                    "space": {"method.scale": {"min": 0.0, "max": 2.0, "type": "float"}},
                    "zero_baseline": True,
                },
            },
            id="the base as a candidate",
        ),
        pytest.param(
            {
                "method": "uniform_scalar_delta",
                "search": {"grid": {"scale": [0.5, 1]}},
                "save_merged": True,
                "post_sweep_eval": {"enabled": True, "save_merged": False},
            },
            {
                "method": "uniform_scalar_delta",
                "eval": {"split": "test"},
                "search": {"type": "grid", "grid": {"method.scale": [0.5, 1]}, "save_merged": True},
            },
            id="the merge of the best, by a key at the top",
        ),
        pytest.param(
            {
                "method": "uniform_scalar_delta",
                "search": {"grid": {"scale": [0.5, 1]}},
                "save_merged": False,
                "post_sweep_eval": {"enabled": True, "save_merged": False},
            },
            {
                "method": "uniform_scalar_delta",
                "eval": {"split": "test"},
                "search": {"type": "grid", "grid": {"method.scale": [0.5, 1]}},
            },
            id="no merge of the best",
        ),
        pytest.param(
            {
                "method": "uniform",
                "optimizer": {"type": "bayes", "params": {"budget": 5}},
                "search": {"type": "grid", "grid": {}},
            },
            {"method": "uniform"},
            id="an optimizer that searched nothing",
        ),
    ],
)
def test_old_forms(old, new):
    data = {"adapters": ["asr", "emotion"], **old}
    before = copy.deepcopy(data)
    found, notes = migrate(data)

    assert found == {"version": 1, "merge_mode": "common", "adapters": ADAPTERS, **new}
    assert data == before
    assert all(" is an old form: " in note or " differ from before. " in note for note in notes)
    assert quietly(build_recipe, data) == build_recipe(found) == load_recipe(to_yaml(found))
    assert migrate(found) == (found, [])


@pytest.mark.parametrize(
    ("old", "notes"),
    [
        (
            {
                "adapters": ["asr", "./x/emotion"],
                "method": "weighted",
                "merge_mode": "strict",
                "method_params": {"lambda": 0.6},
            },
            [
                "`adapters: [asr]` is an old form: write `adapters: [{name: asr, path: ./asr}]`. They were folders or tasks: "
                "the folder of that name is taken, else the task's best adapter in artifacts/.",
                "`method_params: {lambda: 0.6}` is an old form: write `method: {name: weighted, lambda: 0.6}`.",
                WEIGHTED,
            ],
        ),
        (
            {"adapters": ["./a", "./b"], "method": "ties", "lambda": 2, "split": "test"},
            [
                "`split: test` is an old form: write `eval: {split: test}`.",
                "`lambda: 2` is an old form: write `method: {name: ties, kept: ceil, zero_sign: drop, scope: model, "
                "density: 0.2}` and `scale: 2`.",
                "`method: ties` is an old form: write `method: {name: ties, kept: ceil, zero_sign: drop, scope: model, "
                "density: 0.2}` and `scale: 2`. k was the percentage kept, 20 when not given, and lambda is scale now.",
                "`no merge_mode` is an old form: write `merge_mode: common`. It was the default, and plait's own is union.",
            ],
        ),
        (
            {
                "adapters": ["./a", "./b"],
                "method": "weighted",
                "merge_mode": "common",
                "lambda_policy": {"type": "per_layer", "default": 0.5, "overrides": {3: 0.8}},
                "transforms": [{"name": "identity", "params": {}}, "ties_scaffold"],
                "optimizer": {"type": "none"},
            },
            [
                "`lambda_policy: {type: per_layer, default: 0.5, overrides: {'3': 0.8}}` is an old form: write "
                "`method: linear` "
                "and `weights: {policy: per_layer, default: {a: 0.5, b: 0.5}, layers: {'3': {a: 0.8, b: 0.2}}}`.",
                "`transforms: [{name: identity, params: {}}]` is an old form: write `transforms: [{name: identity}]`.",
                "`ties_scaffold` is an old form: write `identity`. It never did anything.",
                "`optimizer: {type: none}` is an old form: leave it out.",
                WEIGHTED,
            ],
        ),
    ],
)
def test_one_warning_per_old_form_says_what_to_write(old, notes):
    with pytest.warns(DeprecationWarning) as caught:  # noqa: PT030  (the texts are compared below)
        build_recipe(old)

    assert [str(w.message) for w in caught] == notes
    assert {w.filename for w in caught} == {__file__}


def test_a_recipe_in_the_present_form_is_left_alone():
    recipe = {"adapters": ["./a"], "method": "ties", "scale": 2}

    assert migrate(recipe) == (recipe, [])


def test_overrides_go_on_top_of_what_was_migrated():
    old = yaml.safe_dump({"adapters": ["asr", "emotion"], "method": "ties", "method_params": {"k": 10, "lambda": 2}})
    overrides = {"method.density": 0.5, "scale": 3, "adapters.asr.weight": 2, "merge_mode": "union"}
    recipe = quietly(load_recipe, old, overrides)

    assert (recipe.method.density, recipe.method.kept, recipe.scale) == (0.5, "ceil", 3)
    assert (recipe.adapters[0].weight, recipe.merge_mode) == (2, "union")


def test_a_file_is_migrated_to_text_that_loads_equal(tmp_path):
    (tmp_path / "emotion").mkdir()
    file = tmp_path / "old.yaml"
    file.write_text("adapters: [asr, emotion]\nmethod: ties\nmethod_params: {k: 20}\n")
    text, notes = migrate_file(file)
    (tmp_path / "new.yaml").write_text(text)

    assert len(notes) == 4
    assert load_recipe(tmp_path / "new.yaml") == quietly(load_recipe, file)
    assert migrate_file(tmp_path / "new.yaml") == (text, [])
    file.write_text("adapters: [asr, emotion]\nmethod: ties\nmethod_params: {kk: 20}\n")
    with pytest.raises(RecipeError, match=r"old.yaml:3: method_params.kk: 'kk' is not known here"):
        migrate_file(file)
