"""What a recipe of the older framework asks for and plait does not have: refused where it was written, all at once."""

from __future__ import annotations

import pytest

from plait.errors import RecipeError
from plait.recipes.importers.migration import migrate
from plait.recipes.loading import load_recipe
from tests.every import every
from tests.recipe_texts import refused


@every(
    ("old", "expected"),
    [
        (
            {"method": "ties", "method_params": {"k": 0}},
            ["method_params.k: k is 0, which keeps no entry: the merge would be zero. It must be > 0 and <= 100."],
        ),
        (
            {"method": "ties", "method_params": {"k": 120}},
            ["method_params.k: k is 120; it must be a percentage, > 0 and <= 100."],
        ),
        ({"method": "ties", "params": {"k": True}}, ["params.k: k is true; it must be a percentage, > 0 and <= 100."]),
        (
            {"method": "ties", "method_params": {"k": 20, "density": 0.2}},
            ["method_params.k: k (percent) and density mean the same; keep density."],
        ),
        (
            {"method": "ties", "lambda": 2, "scale": 1},
            ["lambda: lambda of 'ties' is scale now, and scale is given too; keep scale."],
        ),
        ({"method": "weighted", "lambda": 1.5}, ["lambda: lambda is 1.5; it must be >= 0 and <= 1."]),
        (
            {"method": "weighted", "method_params": {"lambda": 0.5}, "lambda": 0.5},
            ["lambda: lambda is given at the top and among the method's parameters; keep the latter."],
        ),
        (
            {"method": "dare", "method_params": {"drop_rte": 0.5}},
            [
                "method_params.drop_rte: 'drop_rte' is not known here; allowed: drop_rate, density, lambda, name, space. "
                "Did you mean 'drop_rate'?"
            ],
        ),
        (
            {"method": "dare", "method_params": {"seed": 1}, "seed": 2},
            ["method_params.seed: seed of 'dare' is the recipe's seed now, which is given too; keep the latter."],
        ),
        ({"method": "dare", "method_params": {"seed": "x"}}, ["method_params.seed: seed is 'x'; it must be an integer."]),
        (
            {"method": {"name": "dare", "drop_rate": 0.1}, "method_params": {"drop_rate": 0.5}},
            ["method_params: the method's parameters are given in method and in method_params; keep those in method."],
        ),
        (
            {"method": "dare", "method_params": {"drop_rate": 0.1}, "params": {"drop_rate": 0.5}},
            ["params: the method's parameters are given in method_params and in params; keep those in method."],
        ),
        ({"method": "dare", "method_params": 3}, ["method_params: method_params is 3; it must be a mapping."]),
        (
            {"method": "della", "lambda": 1.1},
            [
                "lambda: 'lambda' is not known here; allowed: density, epsilon, sign, weighted_vote, zero_sign, "
                "divisor, name, space. The factor on the merged delta is scale, next to the method."
            ],
        ),
        (
            {"method": "della", "lambda_policy": {"type": "scalar", "value": 1}},
            ["lambda_policy: method 'della' never had a lambda_policy; write weights: {policy: …}."],
        ),
        (
            {"method": "weighted", "lambda": 0.5, "lambda_policy": {"type": "per_lyer"}},
            ["lambda_policy.type: type is 'per_lyer'; it must be 'scalar' or 'per_layer'."],
        ),
        (
            {"method": "weighted", "lambda": 0.5, "lambda_policy": {"type": "per_layer", "overides": {}}},
            [
                "lambda_policy.overides: 'overides' is not known here; allowed: type, default, overrides. Did you "
                "mean 'overrides'?"
            ],
        ),
        (
            {"method": "weighted", "lambda_policy": {"type": "per_layer", "default": 0.5, "overrides": {3: 1.5, 4: "x"}}},
            [
                "lambda_policy.overrides.3: lambda of 3 is 1.5; it must be a number, >= 0 and <= 1.",
                "lambda_policy.overrides.4: lambda of 4 is 'x'; it must be a number, >= 0 and <= 1.",
            ],
        ),
        (
            {"method": "weighted", "lambda_policy": {"type": "per_layer", "overrides": {}}},
            ["lambda_policy.default: lambda of default is null; it must be a number, >= 0 and <= 1."],
        ),
        (
            {"method": "weighted", "lambda": 0.5, "lambda_policy": {"type": "per_layer", "overrides": [1]}},
            ["lambda_policy.overrides: overrides is [1]; it must map layers to numbers."],
        ),
        (
            {"method": "weighted", "lambda": 0.5, "lambda_policy": 3},
            ["lambda_policy: lambda_policy is 3; it must be a mapping."],
        ),
        (
            {
                "method": "weighted",
                "lambda": 0.5,
                "lambda_policy": {"type": "scalar", "value": 1},
                "weights": {"policy": "scalar"},
            },
            ["lambda_policy: lambda_policy and weights mean the same; keep weights."],
        ),
        (
            {"method": "weighted", "adapters": ["./a", "./b", "./c"], "lambda_policy": {"type": "per_layer", "default": 1}},
            ["adapters: a lambda_policy of 'weighted' needs 2 adapters that have names."],
        ),
        (
            {"method": "uniform", "transforms": [{"name": "layer_l2_normalize", "params": {"target": 1, "eps": 0}}]},
            [
                "transforms.0.params.eps: eps is 0; it must be > 0.",
                "transforms.0.params.target: 'target' is not known here; allowed: target_norm, eps, "
                "include_non_layer_keys, name. "
                "Did you mean 'target_norm'?",
            ],
        ),
        (
            {"method": "uniform", "transforms": [{"name": "layer_l2_normalize", "params": {"eps": 1}, "eps": 2}]},
            ["transforms.0.params.eps: eps is given here and next to the name; keep the latter."],
        ),
        (
            {"method": "uniform", "transforms": [{"name": "identity", "params": 1}]},
            ["transforms.0.params: params is 1; it must be a mapping."],
        ),
        (
            {"method": "uniform", "transforms": [], "params": {"transforms": []}},
            ["params.transforms: transforms are given here and at the top; keep those at the top."],
        ),
        ({"split": "test"}, ["'method' is missing."]),
        ({"method": "continual", "split": "test"}, None),
        (
            {
                "method": "uniform",
                "optimizer": {"type": "adamerging"},
                "search": {"type": "bayes", "budgets": 3},
                "grid": [1],
                "post_sweep_eval": {"enabled": True, "best": 1},
                "eval_tasks": ["asr"],
            },
            [
                "optimizer.type: adamerging learned coefficients of method 'weighted_delta_n', and the method is 'uniform'; "
                "write method: weighted_delta_n.",
                "grid: grid is [1]; it must be a mapping.",
                "post_sweep_eval.best: 'best' is not known here; allowed: enabled, split, eval_tasks, save_merged.",
                "search.budgets: 'budgets' is not known here; allowed: type, budget, init_points, seed, space, grid, "
                "early_stop, inject_zero_baseline, initial_points, known_points, warm_start_sweeps, warm_start_from, "
                "warm_start_max_points, known_points_consume_budget, n_candidates, xi. Did you mean 'budget'?",
            ],
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_where_it_was_written(old, expected):
    found = refused({"adapters": ["./a", "./b"], **old})

    if expected is None:  # the list of all methods
        assert found[0].startswith("recipe: method: method is 'continual'; it must be 'linear', ")
    else:
        assert sorted(found) == sorted(f"recipe: {line}" for line in expected)


def test_problems_of_an_old_file_have_its_lines(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("adapters: [asr, emotion]\nmethod: ties\nmethod_params:\n  lambda: x\n  k: 200\ngrid: [1]\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(file)

    assert [line.removeprefix(f"  - {file}:")[:20] for line in str(error.value).splitlines()[1:]] == [
        "4: method_params.lam",
        "5: method_params.k: ",
        "6: grid: grid is [1]",
    ]


def test_migrate_lists_what_it_cannot_carry_over():
    with pytest.raises(RecipeError, match=r"recipe: 2 problems\n  - recipe: method_params.k: .*\n  - recipe: optimizer.type: "):
        migrate({"adapters": ["./a"], "method": "ties", "method_params": {"k": 0}, "optimizer": {"type": "gradient"}})
