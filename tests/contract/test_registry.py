"""What is registered, asked of a fresh interpreter: in this one, another test may have imported what the package forgot."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from plait.methods import METHODS, Preset
from plait.stages import STAGES
from plait.testing.subject import example_params
from tests.every import every

FOUR, THREE, DENSE = ["delta", "core", "knots", "factors"], ["delta", "core", "knots"], ["delta"]
EXPECTED = {
    "linear": FOUR,
    "cat": FOUR,
    "task_arithmetic": FOUR,
    "svd": THREE,
    "ties": FOUR,
    "ties_svd": DENSE,
    "dare_linear": FOUR,
    "dare_ties": FOUR,
    "dare_linear_svd": DENSE,
    "dare_ties_svd": DENSE,
    "magnitude_prune": FOUR,
    "magnitude_prune_svd": DENSE,
    "breadcrumbs": FOUR,
    "della": FOUR,
    "uniform": FOUR,
    "uniform_delta": FOUR,
    "task_vector": FOUR,
    "uniform_scalar_delta": FOUR,
    "weighted": FOUR,
    "weighted_delta": THREE,
    "weighted_delta_n": FOUR,
    "dare": THREE,
}
RANDOMISED = {"dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "della", "dare"}


def fresh(code: str) -> object:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def registry() -> dict:
    return fresh(
        "import json; from plait import METHODS, SPACES; from plait.transforms import TRANSFORMS; "
        "print(json.dumps({'methods': {n: list(m.spaces) for n, m in METHODS.items()}, 'spaces': list(SPACES), "
        "'transforms': list(TRANSFORMS), 'randomised': [n for n, m in METHODS.items() if m.randomised]}))"
    )


def test_all_methods_in_all_their_spaces(registry) -> None:
    found = registry["methods"]
    assert {name: found.get(name) for name in EXPECTED} == EXPECTED, "a new method needs no line here; a lost one is found"


def test_randomised_methods(registry) -> None:
    assert set(registry["randomised"]) & set(EXPECTED) == RANDOMISED


def test_spaces_and_transforms(registry) -> None:
    assert set(registry["spaces"]) == {"delta", "core", "knots", "factors"}
    assert set(registry["transforms"]) == {"identity", "layer_l2_normalize"}


def test_a_recipe_knows_them_without_further_imports() -> None:
    """The recipe's schema is built from the registry when it is imported: nobody else has to import methods first."""
    named = fresh(
        "import json; from plait.recipes.schema import Recipe; "
        "d = Recipe.model_json_schema()['properties']['method']['discriminator']['mapping']; print(json.dumps(sorted(d)))"
    )
    assert set(named) >= set(EXPECTED)


@every("name", [name for name, method in METHODS.items() if isinstance(method, Preset) and name != "pipeline"])
def test_a_parameter_has_the_bounds_of_the_stage_that_it_goes_to(name) -> None:
    """What a method hands to its stages is defined once; a method may only choose another default, or say it in its words."""
    method = METHODS[name]
    for stage in method.pipeline(method.spec.model_validate({"name": name, **example_params(method)})).stages:
        for key in set(type(stage).model_fields) & set(method.params.model_fields):
            theirs, ours = type(stage).model_fields[key], method.params.model_fields[key]
            # a parameter in place of another is None where that one is given
            annotation = theirs.annotation | None if ours.default is None else theirs.annotation
            assert (ours.annotation, ours.metadata) == (annotation, theirs.metadata), f"{name}: {key}, of {stage}"


@every("stage", STAGES.values())
def test_a_stage_is_spelled_name_first(stage) -> None:
    """In written recipes, messages and schemas."""
    assert next(iter(stage.model_fields)) == "name"
