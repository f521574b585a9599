"""Which weight an adapter has in a module: the recipe's weight policies."""

from __future__ import annotations

import numpy as np
import pytest

from plait.errors import PlanError, RecipeError
from plait.merging.pipeline import plan_recipe
from plait.merging.weighting import module_weights, policy_problems, towers_of
from plait.recipes.loading import build_recipe
from plait.recipes.request import read_request
from plait.recipes.schema import Recipe
from tests.adapters_on_disk import Linear, layers
from tests.every import every
from tests.reference.harness import MODULES, adapter, adapters, recipe

LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head"]
TOWERS = ["audio_tower.layers.3.fc1", "language_model.layers.3.fc1", "language_model.layers.4.fc1", "projector"]


def weights_in(recipe: Recipe, module: str, modules=()) -> list[float]:
    return module_weights(recipe, module, towers_of(modules or [module]))


def made(weights=None, own=(1.0, 1.0)) -> Recipe:
    entries = [{"name": n, "path": f"./{n}", "weight": w} for n, w in zip("ab", own, strict=True)]
    return Recipe.model_validate({"adapters": entries, "weights": weights})


@pytest.mark.parametrize("weights", [None, {"policy": "scalar"}, {"policy": "per_adapter", "adapters": {}}])
def test_without_a_policy_weights_are_the_adapters_own(weights) -> None:
    found = weights_in(made(weights, (0.7, -2.0)), LLAMA[0])
    assert found == [0.7, -2.0]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"policy": "scalar", "value": 0.5}, [0.5, 1.0]),
        ({"policy": "scalar", "value": {"b": 3.0}}, [1.0, 6.0]),
        ({"policy": "per_adapter", "adapters": {"a": 4.0}, "default": 0.5}, [4.0, 1.0]),
        ({"policy": "per_adapter", "adapters": {"a": 0.0, "b": -1.0}}, [0.0, -2.0]),
    ],
)
def test_a_policy_multiplies(weights, expected) -> None:
    assert weights_in(made(weights, (1.0, 2.0)), LLAMA[0]) == expected


def test_per_layer() -> None:
    policy = made({"policy": "per_layer", "default": {"b": 9.0}, "layers": {0: 0.5, "model.layers.1": {"a": 2.0}}})
    found = [weights_in(policy, m) for m in LLAMA]
    assert found == [[0.5, 0.5], [2.0, 1.0], [1.0, 9.0], [1.0, 9.0]]  # layer 10 is not layer 1 or 0


def test_layers_of_two_towers_are_two_layers() -> None:
    policy = made(
        {"policy": "per_layer", "default": 1.0, "layers": {"audio_tower.layers.3": 5.0, "language_model.layers.3": 0.0}}
    )
    found = [weights_in(policy, m)[0] for m in TOWERS]
    assert found == [5.0, 0.0, 1.0, 1.0]


def test_per_module_takes_the_first_pattern_that_matches() -> None:
    policy = made({"policy": "per_module", "default": 7.0, "modules": {"*.0.*": 1.5, "*.q_proj": {"a": 0.0}, "*": 4.0}})
    found = [weights_in(policy, m) for m in LLAMA]
    assert found == [[1.5, 1.5], [0.0, 1.0], [4.0, 4.0], [4.0, 4.0]]


def test_patterns_know_case() -> None:
    policy = made({"policy": "per_module", "default": 7.0, "modules": {"*.Q_PROJ": 1.5}})
    assert weights_in(policy, LLAMA[0]) == [7.0, 7.0]


@pytest.mark.parametrize(
    ("weights", "modules", "text"),
    [
        (
            {"policy": "per_layer", "layers": {"7": 1.0}},
            LLAMA,
            "'7' is not a layer of these adapters",
        ),
        (
            {"policy": "per_layer", "layers": {"3": 1.0}},
            TOWERS,
            "'3' is a layer of 2 towers; name one of audio_tower.layers.3, language_model.layers.3",
        ),
        ({"policy": "per_layer", "layers": {"0": 1.0}}, ["lm_head"], "they have no layers"),
        ({"policy": "per_module", "modules": {"*.k_proj": 1.0}}, LLAMA, "'*.k_proj' matches no target module; they look like"),
    ],
)
def test_names_that_lead_nowhere_are_told(weights, modules, text) -> None:
    (problem,) = policy_problems(made(weights), modules)
    assert text in problem


@pytest.mark.parametrize(
    "weights",
    [{"policy": "per_layer", "layers": {"4": 1.0, "audio_tower.layers.3": 2.0}}, {"policy": "scalar", "value": 2.0}, None],
)
def test_names_that_lead_somewhere_are_fine(weights) -> None:
    assert policy_problems(made(weights), TOWERS) == []


def test_the_plan_refuses_them(tmp_path) -> None:
    written = adapters(tmp_path, 2)
    with pytest.raises(PlanError, match="'9' is not a layer"):
        plan_recipe(recipe(written, weights={"policy": "per_layer", "layers": {"9": 1.0}}))


def test_the_plan_shows_every_modules_weights(tmp_path) -> None:
    written = adapters(tmp_path, 2, {**layers(2, {"q_proj": (4, 3)}), "lm_head": Linear(5, 3)})
    plan = plan_recipe(
        recipe(written, [2.0, -1.0], weights={"policy": "per_layer", "default": 0.25, "layers": {"1": {"b": 3.0}}})
    )
    assert {m.target: m.weights for m in plan.modules} == {
        "model.layers.0.q_proj": {"a": 0.5, "b": -0.25},
        "model.layers.1.q_proj": {"a": 2.0, "b": -3.0},
        "lm_head": {"a": 0.5, "b": -0.25},
    }
    assert len(MODULES) == 4


@pytest.mark.parametrize(
    "weights",
    [
        {"policy": "scalar", "value": {"c": 1.0}},
        {"policy": "per_adapter", "adapters": {"c": 1.0}},
        {"policy": "per_layer", "layers": {"0": {"c": 1.0}}},
        {"policy": "per_module", "modules": {"*": 1.0}, "default": {"c": 1.0}},
    ],
)
def test_adapters_that_are_not_there_are_refused(weights) -> None:
    with pytest.raises(ValueError, match="'c' is not an adapter of this recipe; there are a, b"):
        made(weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(value) -> None:
    for weights in ({"policy": "scalar", "value": value}, {"policy": "per_adapter", "adapters": {"a": value}}):
        with pytest.raises(ValueError, match="finite"):
            made(weights)
    with pytest.raises(ValueError, match="finite"):
        made(own=(value, 1.0))


DEPTH = [f"model.layers.{i}.q_proj" for i in range(5)]
BOTH = [f"text.layers.{i}.fc" for i in range(5)] + [f"audio.layers.{i}.fc" for i in range(3)] + ["embed", "head"]


def along(policy, modules=DEPTH) -> list[list[float]]:
    return [weights_in(made(policy, (1.0, 2.0)), m, modules) for m in modules]


@every(
    ("policy", "factors"),
    [
        ({"first": 0.2, "last": 1.0}, [0.2, 0.4, 0.6, 0.8, 1.0]),
        ({"curve": "cosine", "first": 0.0, "last": 1.0}, [0.0, 0.5 - 8**-0.5, 0.5, 0.5 + 8**-0.5, 1.0]),
        ({"points": [0.0, 1.0, 0.0]}, [0.0, 0.5, 1.0, 0.5, 0.0]),
        ({"points": [1.0, 0.0, 0.0, 0.0, 0.0]}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"points": [-1.0, 2.0]}, [-1.0, -0.25, 0.5, 1.25, 2.0]),
        ({"first": 0.0, "last": 1.0, "layers": 9}, [0.0, 0.125, 0.25, 0.375, 0.5]),
        ({}, [1.0] * 5),
    ],
)
def test_a_schedule_goes_over_the_depth(policy, factors) -> None:
    found = along({"policy": "schedule", **policy})
    assert [a for a, _ in found] == pytest.approx(factors)
    assert [b for _, b in found] == pytest.approx([2 * f for f in factors])


def test_a_schedule_per_adapter() -> None:
    found = along({"policy": "schedule", "first": {"a": 0.0}, "last": {"b": 3.0}})
    assert found == [pytest.approx(pair) for pair in ([0, 2], [0.25, 3], [0.5, 4], [0.75, 5], [1, 6])]
    found = along({"policy": "schedule", "points": {"a": [0, 4]}, "default": {"b": 0.5}})
    assert found == [pytest.approx(pair) for pair in ([0, 1], [1, 1], [2, 1], [3, 1], [4, 1])]


def test_every_tower_has_its_own_depth_and_what_is_outside_takes_the_default() -> None:
    found = [a for a, _ in along({"policy": "schedule", "first": 0.0, "last": 1.0, "default": 7.0}, BOTH)]
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.5, 1.0, 7.0, 7.0]


def test_lines_is_the_paper() -> None:
    """α + β ℓ / (L − 1); what is in no block takes α."""
    found = [a for a, _ in along({"policy": "lines", "alpha": 0.3, "beta": 0.5}, BOTH)]
    assert found == pytest.approx([0.3, 0.425, 0.55, 0.675, 0.8, 0.3, 0.55, 0.8, 0.3, 0.3])
    same = {"policy": "schedule", "first": 0.3, "last": 0.8, "default": 0.3}
    assert found == pytest.approx([a for a, _ in along(same, BOTH)])


def test_one_layer_is_the_first() -> None:
    assert along({"policy": "lines", "alpha": 0.3, "beta": 0.5}, DEPTH[:1]) == [pytest.approx([0.3, 0.6])]


def test_a_schedule_is_honored_by_the_merge(tmp_path) -> None:
    """Linear and elementwise, in delta and core space: the factor of layer 0 is 0, that of layer 1 is 1."""
    written = adapters(tmp_path, 2)
    for method in ("linear", {"name": "magmax", "space": "core"}, "karcher", "magmax"):
        out = tmp_path / str(method).replace("'", "")
        found = adapter(out, written, method=method, weights={"policy": "schedule", "first": 0.0, "last": 1.0})
        plain = adapter(out.with_name(f"{out.name} plain"), written, method=method)
        for module, x in found.items():
            factor = 0 if ".0." in module else 1
            np.testing.assert_allclose(x, factor * plain[module], atol=1e-6)


def test_a_schedule_can_be_set_by_path(tmp_path) -> None:
    written = adapters(tmp_path, 2)
    sets = ["weights.policy=lines", "weights.alpha=0.25", "weights.beta=0.5"]
    made_recipe, _ = read_request(None, {n: w.folder for n, w in written.items()}, {}, sets)
    plan = plan_recipe(made_recipe)
    assert {m.target: m.weights["a"] for m in plan.modules} == {m: 0.25 if ".0." in m else 0.75 for m in MODULES}


@pytest.mark.parametrize(
    ("weights", "modules", "text"),
    [
        ({"policy": "lines", "alpha": 1, "beta": 1}, ["lm_head"], "the adapters have no layers to follow a curve over"),
        ({"policy": "schedule", "layers": 3}, DEPTH, "3 layers, but the adapters have model.layers.4; give at least 5"),
    ],
)
def test_a_curve_over_nothing_is_told(weights, modules, text) -> None:
    (problem,) = policy_problems(made(weights), modules)
    assert text in problem


@every(
    ("weights", "text"),
    [
        ({"policy": "schedule", "points": [1.0]}, "weights.points"),
        ({"policy": "schedule", "points": [1.0, 2.0], "first": 0.5}, "curve by themselves; take first out, or the points"),
        ({"policy": "schedule", "curve": "sine"}, "weights.curve: curve is 'sine'; it must be 'linear' or 'cosine'"),
        ({"policy": "schedule", "first": {"c": 1.0}}, "weights.first.c: 'c' is not an adapter of this recipe; there are a, b"),
        (
            {"policy": "schedule", "points": {"c": [1, 2]}},
            "weights.points.c: 'c' is not an adapter of this recipe; there are a, b",
        ),
        (
            {"policy": "schedule", "frist": 1.0},
            "allowed: policy, curve, first, last, points, default, layers. Did you mean 'first'?",
        ),
        ({"policy": "lines", "alpha": 1.0}, "'beta' is missing. What the last layer has on top."),
        ({"policy": "schedules"}, "'per_module', 'schedule' or 'lines'. Did you mean 'schedule'?"),
    ],
)
def test_a_schedule_that_is_none(weights, text) -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe({"adapters": [{"name": "a", "path": "./a"}, {"name": "b", "path": "./b"}], "weights": weights})
    assert text in str(error.value)
