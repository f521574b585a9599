"""Recipes in other forms: the older framework's, and mergekit's."""

from __future__ import annotations

import copy
import warnings
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import RecipeError
from plait.linalg.keyed import Key
from plait.merging.combine import pipeline_of
from plait.merging.weighting import module_weights, towers_of
from plait.methods import Block
from plait.recipes.importers.mergekit import convert_mergekit
from plait.recipes.importers.mergekit_terms import MERGEKIT_METHODS as MERGEKIT
from plait.recipes.importers.mergekit_terms import pattern
from plait.recipes.importers.migration import migrate
from plait.recipes.loading import RecipeWarning, build_recipe, load_recipe, migrate_file
from plait.recipes.writing import to_yaml
from plait.stages.base import GramCombine, LinearCombine
from tests.every import every

ADAPTERS = [{"name": "asr", "path": "./asr"}, {"name": "emotion", "path": "./emotion"}]


def refused(data: dict) -> list[str]:
    with pytest.raises(RecipeError) as error:
        build_recipe(data)
    head, *rest = str(error.value).split("\n  - ")
    return rest or [head]


def quietly(load, recipe, overrides=None):
    """Load a recipe whose notes another test reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(recipe) if overrides is None else load(recipe, overrides=overrides)


WEIGHTED = (
    "the numbers of `method: weighted` differ from before. It interpolated A and B separately and took the first adapter's "
    "scaling; now the deltas are interpolated."
)


# --- the older framework ---------------------------------------------------------------------------------------------


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
                "`adapters: [asr]` is an old form: write `adapters: [{name: asr, path: ./asr}]`. They were folders or tasks; "
                "each is read as a folder now.",
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
                "search": {"type": "bayes"},
                "grid": {"lambda": [1]},
                "post_sweep_eval": {"enabled": True},
                "eval_tasks": ["asr"],
            },
            [
                "optimizer.type: adamerging learned coefficients of method 'weighted_delta_n', and the method is 'uniform'; "
                "write method: weighted_delta_n.",
                "grid: this version of plait cannot search yet. Take this part out.",
                "post_sweep_eval: this version of plait cannot search and evaluate yet. Take this part out.",
                "search: this version of plait cannot search yet. Take this part out.",
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
    file.write_text("adapters: [asr, emotion]\nmethod: ties\nmethod_params:\n  lambda: x\n  k: 200\ngrid: {k: [1]}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(file)

    assert [line.removeprefix(f"  - {file}:")[:20] for line in str(error.value).splitlines()[1:]] == [
        "4: method_params.lam",
        "5: method_params.k: ",
        "6: grid: this versio",
    ]


def test_migrate_lists_what_it_cannot_carry_over():
    with pytest.raises(RecipeError, match=r"recipe: 2 problems\n  - recipe: method_params.k: .*\n  - recipe: optimizer.type: "):
        migrate({"adapters": ["./a"], "method": "ties", "method_params": {"k": 0}, "optimizer": {"type": "gradient"}})


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


# --- the same numbers ------------------------------------------------------------------------------------------------


def merged(recipe, x: torch.Tensor, module: str = "model.layers.3.self_attn.q_proj") -> torch.Tensor:
    """Merge the deltas x (T, p, q) of one module by a recipe, in one block."""
    pipeline, weights = pipeline_of(recipe), module_weights(recipe, module, towers_of([module]))
    if isinstance(pipeline.combine, LinearCombine):
        weights = pipeline.combine.coefficients(weights, module)
    if isinstance(pipeline.combine, GramCombine):
        weights = pipeline.combine.coefficients(weights, x.flatten(1) @ x.flatten(1).mT)
    keys = tuple(Key(0, (a.name,)) for a in recipe.adapters)
    statistics = []
    for survey in pipeline.surveys():
        reduction, done = survey.start(len(x)), False
        while not done:
            reduction.observe(Block(x, weights, 0, keys, tuple(statistics)))
            done = reduction.end_pass()
        statistics.append(reduction.values)
    return recipe.scale * pipeline.combine_block(Block(x, weights, 0, keys, tuple(statistics)))


def deltas(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 20, 33, 100])
def test_a_migrated_ties_merges_as_it_did(k):
    """Keep the ceil(n k / 100) largest of each vector, elect by mass, average those that agree, times lambda."""
    old = {"adapters": ["./a", "./b", "./c"], "method": "ties", "method_params": {"k": k, "lambda": 1.5}}
    x = deltas(3)
    kept = torch.zeros_like(x)
    for t, vector in enumerate(x.flatten(1)):
        top = vector.abs().argsort(descending=True)[: -(-42 * k // 100)]
        kept[t].view(-1)[top] = vector[top]
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (sign != 0)
    expected = 1.5 * (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    torch.testing.assert_close(merged(quietly(build_recipe, old), x), expected)


@pytest.mark.parametrize("layer", [0, 3, 4])
def test_a_migrated_policy_weighs_as_it_did(layer):
    policy = {"type": "per_layer", "default": 0.5, "overrides": {0: 0.8, 3: 0.3}}
    recipe = quietly(build_recipe, {"adapters": ["./a", "./b"], "method": "weighted_delta", "lambda_policy": policy})
    share = {0: 0.8, 3: 0.3}.get(layer, 0.5)
    x = deltas(2)

    torch.testing.assert_close(merged(recipe, x, f"model.layers.{layer}.mlp.up_proj"), share * x[0] + (1 - share) * x[1])


def mergekit_sce(x, select_topk=1.0):
    mask = torch.ones_like(x[0])
    if select_topk < 1:
        variance = x.var(0, unbiased=False)
        mask = (variance >= variance.flatten().sort(descending=True).values[int(select_topk * variance.numel()) - 1]).double()
    x = x * mask
    w = (x**2).mean((1, 2)) / (x**2).mean((1, 2)).sum()
    agrees = (x.sign() == torch.where(x.sum(0) >= 0, 1.0, -1.0)) * w.view(-1, 1, 1)
    return (x * agrees).sum(0) / torch.where(agrees.sum(0) == 0, 1, agrees.sum(0))


def mergekit_ram(x, epsilon=1e-5, r=0.0, alpha=0.2):
    active = x.abs() > epsilon
    counts = active.sum(0)
    shared, own = (active & (counts > 1)), (active & (counts == 1))
    gain = 1 + r * (shared.sum((1, 2)) / own.sum((1, 2)).clamp(min=1)).clamp(max=alpha)
    return (x * own * gain.view(-1, 1, 1) + x * shared / counts.clamp(min=1)).sum(0)


def mergekit_multislerp(x, weights, *, normalize=True):
    w = torch.tensor(weights, dtype=x.dtype)
    w = (w / w.sum() if normalize else w).view(-1, 1, 1)
    norms = x.flatten(1).norm(dim=1).view(-1, 1, 1)
    mean = (w * x / norms).sum(0)
    return mean / mean.norm() * (w * norms).sum()


def mergekit_nuslerp(x, t):
    theta = torch.acos((x[0] * x[1]).sum() / (x[0].norm() * x[1].norm()))
    return (torch.sin((1 - t) * theta) * x[0] + torch.sin(t * theta) * x[1]) / torch.sin(theta)


def mergekit_model_stock(x):
    unit = x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)
    cosine = (unit @ unit.mT).triu(1).sum() / 3
    return 3 * cosine / (1 + 2 * cosine) * x.mean(0)


@pytest.mark.parametrize(
    ("method", "weights", "parameters", "expected"),
    [
        ("sce", None, {}, mergekit_sce),
        ("sce", None, {"select_topk": 0.3}, lambda x: mergekit_sce(x, 0.3)),
        ("ram", None, {}, mergekit_ram),
        ("ram", None, {"epsilon": 0.8}, lambda x: mergekit_ram(x, 0.8)),
        ("ramplus_tl", None, {"epsilon": 1.2}, lambda x: mergekit_ram(x, 1.2, r=0.1)),
        ("ramplus_tl", None, {"epsilon": 1.2, "r": 2, "alpha": 5}, lambda x: mergekit_ram(x, 1.2, r=2, alpha=5)),
        ("multislerp", [0.5, 1.5, 0.25], {}, lambda x: mergekit_multislerp(x, [0.5, 1.5, 0.25])),
        (
            "multislerp",
            [0.5, 1.5, 0.25],
            {"normalize_weights": False},
            lambda x: mergekit_multislerp(x, [0.5, 1.5, 0.25], normalize=False),
        ),
        ("nuslerp", [0.6, 0.2], {}, lambda x: mergekit_nuslerp(x, 0.25)),
        ("nuslerp", [1, -1], {}, lambda x: mergekit_nuslerp(x, 0.5)),
        ("model_stock", None, {}, mergekit_model_stock),
        ("breadcrumbs_ties", [0.5, 1.5, 0.25], {"density": 0.5, "gamma": 0.1}, "gta"),
        ("della_linear", [0.5, 1.5, 0.25], {}, "gta"),
    ],
)
def test_mergekits_other_methods_merge_as_there(method, weights, parameters, expected):
    names = "abc"[: len(weights or "abc")]
    models = [
        {"model": f"org/base+./{n}", "parameters": {"weight": w} if w else {}}
        for n, w in zip(names, weights or [0] * 3, strict=True)
    ]
    recipe = quietly(
        build_recipe, {"merge_method": method, "base_model": "org/base", "models": models, "parameters": parameters}
    )
    x = deltas(len(names))
    if expected == "gta":
        expected = partial(mergekit, weights=weights, elects=method.endswith("ties"), **parameters)
    reference = expected(x)
    torch.testing.assert_close(merged(recipe, x), reference)
    assert load_recipe(to_yaml(recipe)) == recipe
    if method == "ramplus_tl":
        assert pipeline_of(recipe).combine.scope == "module", "mergekit counts in one tensor at a time"


def mergekit(x, *, weights, density=1.0, gamma=None, elects=False, normalize=False, scale=1.0):
    """What mergekit does with task vectors: trim each, weigh, elect signs, sum, divide, scale."""
    kept = torch.zeros_like(x)
    for t, vector in enumerate(x.flatten(1)):
        order = vector.abs().argsort(descending=True)
        n, top = len(vector), int((gamma or 0) * len(vector))
        top = min(top, n - int(density * n))
        order = order if density >= 1 else order[top : top + int(density * n)]
        kept[t].view(-1)[order] = vector[order]
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    weighed = kept * w
    majority = torch.where(weighed.sum(0) >= 0, 1.0, -1.0)
    mask = (weighed.sign() == majority).double() if elects else torch.ones_like(weighed)
    divisor = (w * mask).sum(0)
    result = (weighed * mask).sum(0)
    return scale * (result / torch.where(divisor == 0, 1, divisor) if normalize else result)


@pytest.mark.parametrize(
    ("method", "parameters", "settings_", "expected"),
    [
        ("linear", {}, {}, {"normalize": True}),
        ("linear", {"normalize": False}, {}, {}),
        ("task_arithmetic", {"lambda": 0.7}, {}, {"scale": 0.7}),
        ("task_arithmetic", {"normalize": True}, {}, {"normalize": True}),
        ("ties", {}, {"density": 0.4}, {"density": 0.4, "elects": True, "normalize": True}),
        ("ties", {"density": 0.4, "lambda": 2.0}, {}, {"density": 0.4, "elects": True, "normalize": True, "scale": 2.0}),
        ("ties", {"normalize": False}, {"density": 0.4}, {"density": 0.4, "elects": True}),
        ("ties", {}, {}, {"elects": True, "normalize": True}),
        ("dare_linear", {"normalize": True}, {}, {"normalize": True}),
        ("dare_ties", {}, {}, {"elects": True}),
        ("dare_ties", {"normalize": True}, {}, {"elects": True, "normalize": True}),
        ("della", {}, {}, {"elects": True, "normalize": True}),
        ("breadcrumbs", {}, {"density": 0.5, "gamma": 0.1}, {"density": 0.5, "gamma": 0.1}),
        ("breadcrumbs", {}, {"density": 0.5, "gamma": 0.7}, {"density": 0.5, "gamma": 0.7}),
        ("breadcrumbs", {}, {}, {}),
    ],
)
def test_a_mergekit_recipe_merges_as_mergekit_does(method, parameters, settings_, expected):
    weights = [0.5, 1.5, 0.25]
    models = [
        {"model": f"org/base+./{name}", "parameters": {"weight": w, **settings_}}
        for name, w in zip("abc", weights, strict=True)
    ]
    recipe = quietly(build_recipe, {"merge_method": method, "models": models, "parameters": parameters})
    x = deltas(3)

    torch.testing.assert_close(merged(recipe, x), mergekit(x, weights=weights, **expected))


# --- mergekit --------------------------------------------------------------------------------------------------------

TIES = {"name": "ties", "flavor": "mergekit", "space": "delta"}


def gta(method: str, *models: dict, **top) -> dict:
    return {"merge_method": method, "models": list(models), "base_model": "org/base", **top}


def model(name: str, **parameters) -> dict:
    return {"model": name, "parameters": parameters}


A, B = model("org/base+./a", weight=1), model("org/base+org/b@v1", weight=0.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            gta(
                "ties", {"model": "org/base"}, model("org/base+./a", weight=1, density=0.3), model("./b", weight=1, density=0.3)
            ),
            {
                "base_model": "org/base",
                "method": {**TIES, "density": 0.3, "divisor": "weight"},
                "scale": 1.0,
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "./b", "weight": 1.0}],
            },
            id="base in the list, adapters with and without it",
        ),
        pytest.param(
            gta(
                "ties", A, B, parameters={"density": 0.3, "normalize": False, "lambda": 2, "int8_mask": True}, dtype="bfloat16"
            ),
            {
                "base_model": "org/base",
                "method": {**TIES, "density": 0.3, "divisor": "none"},
                "scale": 2,
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
                "output": {"dtype": "bfloat16"},
            },
            id="global parameters",
        ),
        pytest.param(
            {
                "merge_method": "linear",
                "models": [A, B, model("org/base", weight=0.5)],
                "out_dtype": "torch.float16",
                "dtype": "x",
            },
            {
                "base_model": "org/base",
                "method": {"name": "linear"},
                "output": {"dtype": "float16"},
                "adapters": [{"name": "a", "path": "./a", "weight": 0.5}, {"name": "b", "path": "org/b@v1", "weight": 0.25}],
            },
            id="linear divides by all weights, the base model's too",
        ),
        pytest.param(
            gta("task_arithmetic", model("org/base+./x/final", weight=1), model("org/base+./y/x-final", weight=2)),
            {
                "base_model": "org/base",
                "method": {"name": "task_arithmetic"},
                "scale": 1.0,
                "adapters": [
                    {"name": "x-final", "path": "./x/final", "weight": 1.0},
                    {"name": "x-final-2", "path": "./y/x-final", "weight": 2.0},
                ],
            },
            id="equal names are numbered",
        ),
        pytest.param(
            gta("dare_ties", A, B, parameters={"density": 0.5, "rescale": False, "lambda": 0.5}),
            {
                "base_model": "org/base",
                "scale": 0.25,
                "method": {
                    "name": "dare_ties",
                    "weighted_vote": True,
                    "zero_sign": "plus",
                    "space": "delta",
                    "density": 0.5,
                    "divisor": "none",
                },
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
            },
            id="dare without rescaling",
        ),
        pytest.param(
            gta("della", A, B),
            {
                "base_model": "org/base",
                "scale": 1.0,
                "method": {
                    "name": "della",
                    "weighted_vote": True,
                    "zero_sign": "plus",
                    "space": "delta",
                    "density": 1.0,
                    "epsilon": 0.0,
                    "divisor": "weight",
                },
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
            },
            id="della at density 1",
        ),
        pytest.param(
            gta("breadcrumbs", A, B, parameters={"density": 0.5, "gamma": 0.75}),
            {
                "base_model": "org/base",
                "scale": 1.0,
                "method": {"name": "breadcrumbs", "space": "delta", "density": 0.5, "gamma": 0.5},
                "adapters": [{"name": "a", "path": "./a", "weight": 1.0}, {"name": "b", "path": "org/b@v1", "weight": 0.5}],
            },
            id="breadcrumbs with too large a gamma",
        ),
        pytest.param(
            {
                "merge_method": "linear",
                "models": [
                    model(
                        "org/base+./a",
                        weight=[{"filter": "self_attn", "value": 1}, {"filter": "mlp", "value": 3}, {"value": 1}],
                    ),
                    model("org/base+./b", weight=1),
                ],
            },
            {
                "base_model": "org/base",
                "method": {"name": "linear"},
                "adapters": [{"name": "a", "path": "./a"}, {"name": "b", "path": "./b"}],
                "weights": {
                    "policy": "per_module",
                    "default": {"a": 0.5, "b": 0.5},
                    "modules": {"*self_attn*": {"a": 0.5, "b": 0.5}, "*mlp*": {"a": 0.75, "b": 0.25}},
                },
            },
            id="filters, each divided by its own sum",
        ),
        pytest.param(
            gta(
                "task_arithmetic",
                model("org/base+./a", weight=[{"filter": "q_proj.weight", "value": 1}]),
                model("org/base+./b"),
                parameters={"weight": [{"filter": "[q]*", "value": 2}, {"filter": "*", "value": 0.5}, {"value": 9}]},
            ),
            None,
            id="filters that differ",
        ),
        pytest.param(
            gta(
                "task_arithmetic",
                model("org/base+./a", weight={"filter": "q_proj.weight", "value": 1}),
                model("org/base+./b", weight=2),
                parameters={"weight": 0.5},
            ),
            {
                "base_model": "org/base",
                "method": {"name": "task_arithmetic"},
                "scale": 1.0,
                "adapters": [{"name": "a", "path": "./a"}, {"name": "b", "path": "./b"}],
                "weights": {
                    "policy": "per_module",
                    "default": {"a": 0.5, "b": 2.0},
                    "modules": {"*q_proj": {"a": 1.0, "b": 2.0}},
                },
            },
            id="a filter falls back to the recipe's weight",
        ),
    ],
)
def test_mergekit_recipes(config, expected):
    before = copy.deepcopy(config)
    converted = convert_mergekit(config)
    assert config == before
    if expected is None:
        assert [p.text for p in converted.problems] == [
            "the weights have different filters; give every model the same filters in the same order."
        ]
        return

    assert converted.problems == ()
    assert converted.data == {"version": 1, **expected}
    assert quietly(build_recipe, config) == build_recipe(converted.data) == load_recipe(to_yaml(converted.data))


@every(
    ("config", "expected"),
    [
        (
            gta("slerp", A, B),
            [
                f"merge_method: mergekit's 'slerp' has no counterpart here; these have one: {', '.join(MERGEKIT)}. "
                "mergekit's 'slerp': it turns full models; 'nuslerp' with a base_model, and plait's 'slerp', "
                "turn what the adapters changed."
            ],
        ),
        (
            gta("nearswap", A, B),
            [f"merge_method: mergekit's 'nearswap' has no counterpart here; these have one: {', '.join(MERGEKIT)}."],
        ),
        (
            {"merge_method": "multislerp", "models": [A, B]},
            [
                "merge_method: 'multislerp' needs a base_model: without one mergekit turns full models, and plait merges what "
                "adapters changed."
            ],
        ),
        (
            gta("nuslerp", A, B, model("org/base+./c", weight=1)),
            ["models: it goes from one adapter to another: give two, each with one weight."],
        ),
        (
            gta("nuslerp", A, B, parameters={"nuslerp_row_wise": True}),
            ["parameters.nuslerp_row_wise: nuslerp_row_wise is true: plait turns each module as one vector."],
        ),
        (
            gta("model_stock", A, B, parameters={"filter_wise": True}),
            ["parameters.filter_wise: filter_wise is true: plait takes one angle per module, not one per row."],
        ),
        (
            gta("sce", A, B, parameters={"select_topk": 2}),
            ["parameters.select_topk: density is 2; it must be > 0 and <= 1."],
        ),
        (
            gta("ram", A, B, parameters={"epsilon": -1}),
            ["parameters.epsilon: above is -1; it must be >= 0."],
        ),
        (
            gta("sce", A, B, parameters={"lamda": 2}),
            [
                "parameters.lamda: 'lamda' is not known here; allowed: weight, density, epsilon, gamma, lambda, normalize, "
                "rescale, int8_mask, select_topk, eps. Did you mean 'lambda'?"
            ],
        ),
        (
            gta("tise", A, B),
            [
                f"merge_method: mergekit's 'tise' has no counterpart here; these have one: {', '.join(MERGEKIT)}. "
                "Did you mean 'ties'?"
            ],
        ),
        (
            {"merge_method": "ties", "slices": [{"sources": []}]},
            ["slices: plait does not cut models into slices; it merges complete adapters: list them under 'models'."],
        ),
        ({"merge_method": "ties", "models": 3}, ["models: models is 3; it must be a list of models."]),
        (
            gta("ties", A, "x", foo=1),
            [
                "foo: 'foo' is not known here; allowed: merge_method, models, base_model, parameters, dtype, out_dtype, "
                "tokenizer_source, tokenizer, chat_template, name.",
                "models.1: it must be a mapping with the text 'model', such as {model: BASE+LORA}.",
            ],
        ),
        (
            gta("ties", A, {"model": "./b", "paramters": {}}),
            [
                "models.1.paramters: 'paramters' is not known here; allowed: model, parameters. Did you mean 'parameters'?",
                "models.1: it has no weight, and mergekit needs one: parameters: {weight: 1.0}.",
            ],
        ),
        (
            gta("ties", A, model("org/base+./b", weight=1, densty=0.5)),
            [
                "models.1.parameters.densty: 'densty' is not known here; allowed: weight, density, epsilon, gamma, "
                "lambda, normalize, "
                "rescale, int8_mask. Did you mean 'density'?"
            ],
        ),
        (
            gta(
                "ties",
                model("org/base+./a", weight=1, density=0.3),
                model("./b", weight=1, density=0.5),
                model("./c", weight=1),
            ),
            [
                "models.1.parameters.density: density differs between the models (0.3, 0.5 and 1.0), and plait has "
                "one density for "
                "all: make them equal."
            ],
        ),
        (
            gta("ties", A, B, parameters={"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]}),
            ["parameters.density: density must be one number: plait has no density by filter."],
        ),
        (
            gta("ties", model("./a", weight=[0, 0.5, 1]), B),
            [
                "models.0.parameters.weight: weight is a gradient over the layers, [0, 0.5, 1], which plait does not "
                "read: write a "
                "plait recipe with weights: {policy: per_layer, layers: {…}}."
            ],
        ),
        (
            gta("ties", model("./a", weight=[{"filter": "mlp", "value": [0, 1]}, {"value": 1}]), B),
            [
                "models.0.parameters.weight: weight is a gradient over the layers, [{'filter': 'mlp', 'value': [0, "
                "1]}, {'value': 1}], "
                "which plait does not read: write a plait recipe with weights: {policy: per_layer, layers: {…}}."
            ],
        ),
        (
            gta("ties", model("./a", weight=[{"filter": "mlp", "value": 1}]), B),
            [
                "models.0.parameters.weight: no weight holds where no filter matches; add a last entry without a "
                "filter, {value: …}."
            ],
        ),
        (gta("ties", model("./a", weight="x"), B), ["models.0.parameters.weight: weight is 'x'; it must be a number."]),
        (gta("ties", A, B, parameters={"density": 1.5}), ["parameters.density: density is 1.5; it must be > 0 and <= 1."]),
        (
            gta("della", A, B, parameters={"density": 0.9}),
            ["method: density ± epsilon is 0.9 ± 0.15; both ends must be in (0, 1]."],
        ),
        (gta("ties", A, B, parameters={"lambda": "x"}), ["parameters.lambda: scale is 'x'; it must be a number, or 'auto'."]),
        (gta("ties", A, B, parameters={"normalize": 1}), ["parameters.normalize: normalize is 1; it must be true or false."]),
        (
            gta("ties", A, B, parameters={"rescale": True}),
            ["parameters.rescale: plait's 'ties' does not rescale what it keeps; leave it out."],
        ),
        (
            gta("della", A, B, parameters={"rescale": False}),
            ["parameters.rescale: plait's 'della' always rescales what it keeps; leave it out."],
        ),
        (gta("ties", A, B, parameters=3), ["parameters: parameters is 3; it must be a mapping."]),
        (gta("ties", A, B, dtype="int8"), ["dtype: dtype is 'int8'; it must be 'float32', 'bfloat16' or 'float16'."]),
        (
            gta("ties", A, model("org/other+./b", weight=1)),
            ["models: the adapters are of 2 base models, 'org/base' and 'org/other'; plait needs one."],
        ),
        (
            gta("ties", A, model("org/base+./b+./c", weight=1)),
            ["models.1.model: 'org/base+./b+./c' holds '+' twice; write BASE+LORA."],
        ),
        (
            gta("ties", model("org/base", weight=1)),
            ["models: there is no adapter among them; write BASE+LORA, or the adapter alone."],
        ),
        (
            {**gta("ties", A, B), "base_model": "org/base+./c"},
            ["base_model: base_model is 'org/base+./c'; it must be one model, without an adapter."],
        ),
        (
            {"merge_method": "linear", "models": [model("./a", weight=1), model("./b", weight=-1)]},
            ["models: the weights sum to 0 and cannot be normalized."],
        ),
        ({"merge_method": "linear", "models": [model("./a/../../../x y/@", weight=1), model("nowhere", weight=1)]}, None),
    ],
)
def test_what_mergekit_has_and_plait_has_not(config, expected):
    found = refused(config)
    if expected is None:
        assert len(found) == 1
        assert found[0].startswith("recipe: models.1.model: 'nowhere': there is no 'nowhere' in ")
    else:
        assert found == [f"recipe: {line}" for line in expected]


RELATIVE = "relative paths start at the recipe's folder; mergekit starts at the working directory."
KEYED = "each adapter's mask comes from (seed, adapter, module); mergekit draws all masks from one generator, and rescales"
X, Y = model("/x", weight=1), model("/y", weight=1)


@every(
    ("config", "notes"),
    [
        (gta("ties", X, Y), []),
        (gta("ties", X, model("./y", weight=1)), [RELATIVE]),
        (gta("dare_linear", X, Y), [f"{KEYED} survivors to the tensor's L1 norm, where plait divides them by density."]),
        (gta("della", X, Y), [f"{KEYED} survivors to the tensor's L1 norm, where plait divides each by its probability."]),
        (
            gta("breadcrumbs", X, Y),
            ["where gamma times a matrix's entries is below 1, mergekit drops all of them and plait none of the top."],
        ),
        (
            gta("dare_ties", X, Y, parameters={"density": 0.5, "rescale": False}),
            [
                "rescale: false is expressed by a scale that is multiplied by density.",
                f"{KEYED} survivors to the tensor's L1 norm, where plait divides them by density.",
            ],
        ),
        (
            gta("ties", X, Y, parameters={"int8_mask": True, "epsilon": 0.1}, tokenizer_source="base", chat_template="auto"),
            [
                "int8_mask only saves memory in mergekit and is left out.",
                "epsilon does nothing in mergekit's 'ties' and is left out.",
                "tokenizer_source and chat_template: left out, for a merge of adapters keeps the base model's tokenizer.",
            ],
        ),
        (
            gta("linear", X, Y, parameters={"lambda": 2, "density": 0.5, "normalize": False}),
            [
                "normalize is false and the weights sum to 2: mergekit multiplies the base model by that too, plait "
                "leaves it as it is.",
                "density does nothing in mergekit's 'linear' and is left out.",
                "lambda does nothing in mergekit's 'linear' and is left out.",
            ],
        ),
        (
            gta("task_arithmetic", X, model("/y", weight=[{"filter": "mlp.", "value": 1}, {"value": 2}])),
            ["the filter 'mlp.' is read as the pattern '*mlp.*' over module paths."],
        ),
    ],
)
def test_a_note_says_where_numbers_differ(config, notes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_recipe(config)

    assert [str(w.message) for w in caught] == notes
    assert {w.category for w in caught} <= {RecipeWarning}
    assert {w.filename for w in caught} <= {__file__}


def test_mergekit_needs_more_than_its_method_to_be_recognized():
    with pytest.raises(RecipeError, match=r"merge_method: 'merge_method' is not known here; .* Did you mean 'merge_mode'"):
        build_recipe({"adapters": ["./a"], "merge_method": "ties"})


def test_a_mergekit_file_is_migrated(tmp_path):
    (tmp_path / "maths").mkdir()
    file = tmp_path / "kit.yml"
    file.write_text("merge_method: ties\nmodels:\n- model: b/b+maths\n  parameters:\n    weight: 1\n    density: 2\n")
    with pytest.raises(RecipeError, match=r"kit.yml:6: models.0.parameters.density: density is 2; it must be > 0 and <= 1"):
        load_recipe(file)
    file.write_text(file.read_text().replace("density: 2", "density: 0.5"))
    text, notes = migrate_file(file)

    assert notes == [RELATIVE]
    assert text == (
        "version: 1\nbase_model: b/b\nadapters:\n  - name: maths\n    path: ./maths\n    weight: 1.0\nmethod:\n  name: ties\n"
        "  flavor: mergekit\n  space: delta\n  density: 0.5\n  divisor: weight\nscale: 1.0\n"
    )
    (tmp_path / "new.yaml").write_text(text)
    assert load_recipe(tmp_path / "new.yaml") == quietly(load_recipe, file)


MODULES = ["model.layers.3.self_attn.q_proj", "model.layers.13.mlp.up_proj", "model.embed_tokens", "h.0.attn.c_attn", "a[b]*"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_filter_and_its_pattern_pick_the_same_modules(data):
    name = f"{data.draw(st.sampled_from(MODULES))}.weight"
    start = data.draw(st.integers(0, len(name) - 1))
    part = name[start : data.draw(st.integers(start + 1, len(name)))]
    if part.endswith((".", ".w", ".we", ".wei", ".weig", ".weigh")) and part not in ".weight":
        return  # these cut the name's end; a note says how they are read
    assert [m for m in MODULES if fnmatchcase(m, pattern(part))] == [m for m in MODULES if part in f"{m}.weight"]
