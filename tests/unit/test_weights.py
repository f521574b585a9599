"""Which weight an adapter has in a module: the recipe's weight policies."""

from __future__ import annotations

import pytest
import torch

from plait.errors import PlanError
from plait.merging.pipeline import plan_recipe
from plait.merging.weighting import module_weights, policy_problems
from plait.recipes.schema import Recipe
from tests.adapters_on_disk import Linear, layers
from tests.reference.harness import MODULES, adapters, recipe

LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head"]
TOWERS = ["audio_tower.layers.3.fc1", "language_model.layers.3.fc1", "language_model.layers.4.fc1", "projector"]


def made(weights=None, own=(1.0, 1.0)) -> Recipe:
    entries = [{"name": n, "path": f"./{n}", "weight": w} for n, w in zip("ab", own, strict=True)]
    return Recipe.model_validate({"adapters": entries, "weights": weights})


@pytest.mark.parametrize("weights", [None, {"policy": "scalar"}, {"policy": "per_adapter", "adapters": {}}])
def test_without_a_policy_weights_are_the_adapters_own(weights) -> None:
    found = module_weights(made(weights, (0.7, -2.0)), LLAMA[0])
    assert found.tolist() == [0.7, -2.0]
    assert found.dtype == torch.float64


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
    assert module_weights(made(weights, (1.0, 2.0)), LLAMA[0]).tolist() == expected


def test_per_layer() -> None:
    policy = made({"policy": "per_layer", "default": {"b": 9.0}, "layers": {0: 0.5, "model.layers.1": {"a": 2.0}}})
    found = [module_weights(policy, m).tolist() for m in LLAMA]
    assert found == [[0.5, 0.5], [2.0, 1.0], [1.0, 9.0], [1.0, 9.0]]  # layer 10 is not layer 1 or 0


def test_layers_of_two_towers_are_two_layers() -> None:
    policy = made(
        {"policy": "per_layer", "default": 1.0, "layers": {"audio_tower.layers.3": 5.0, "language_model.layers.3": 0.0}}
    )
    found = [module_weights(policy, m).tolist()[0] for m in TOWERS]
    assert found == [5.0, 0.0, 1.0, 1.0]


def test_per_module_takes_the_first_pattern_that_matches() -> None:
    policy = made({"policy": "per_module", "default": 7.0, "modules": {"*.0.*": 1.5, "*.q_proj": {"a": 0.0}, "*": 4.0}})
    found = [module_weights(policy, m).tolist() for m in LLAMA]
    assert found == [[1.5, 1.5], [0.0, 1.0], [4.0, 4.0], [4.0, 4.0]]


def test_patterns_know_case() -> None:
    policy = made({"policy": "per_module", "default": 7.0, "modules": {"*.Q_PROJ": 1.5}})
    assert module_weights(policy, LLAMA[0]).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("weights", "modules", "text"),
    [
        (
            {"policy": "per_layer", "layers": {"7": 1.0}},
            LLAMA,
            "'7' is no layer of these adapters",
        ),
        (
            {"policy": "per_layer", "layers": {"3": 1.0}},
            TOWERS,
            "'3' stands in 2 towers; say which: audio_tower.layers.3, language_model.layers.3",
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
    with pytest.raises(PlanError, match="'9' is no layer"):
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
    with pytest.raises(ValueError, match="'c' is no adapter of this recipe; there are a, b"):
        made(weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(value) -> None:
    for weights in ({"policy": "scalar", "value": value}, {"policy": "per_adapter", "adapters": {"a": value}}):
        with pytest.raises(ValueError, match="finite"):
            made(weights)
    with pytest.raises(ValueError, match="finite"):
        made(own=(value, 1.0))
