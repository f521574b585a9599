"""Recipes that are written: read back equal, tidy, and as the JSON Schema describes them."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import RecipeError
from plait.methods import METHODS
from plait.recipes.loading import build_recipe, load_recipe
from plait.recipes.schema import Recipe
from plait.recipes.writing import json_schema, to_yaml
from plait.transforms import TRANSFORMS
from tests.every import every
from tests.recipe_texts import AFTER, BEFORE, COMBINES, FULL

REQUIRED = {"weighted": {"lambda": 0.3}, "weighted_delta": {"lambda": 0.25}}


VARIANTS = [
    {},
    {"method": {"name": "ties", "flavor": "mergekit", "weighted_vote": False}},
    {"method": {"name": "ties", "flavor": "peft", "zero_sign": "drop", "density": 0.2}},
    {"method": {"name": "ties", "space": "factors"}},
    {"method": {"name": "ties", "space": "factors", "flavor": "paper"}},
    {"method": {"name": "ties_svd", "scope": "model"}},
    {"method": {"name": "weighted_delta_n", "layer_task_coefficients": {3: [0.5, 0.5], "model.layers.4": [1, 0]}}},
    {"weights": {"policy": "scalar", "value": {"a": 0.5}}},
    {"weights": {"policy": "per_adapter", "adapters": {"a": 0.5}, "default": 2}},
    {"weights": {"policy": "per_layer", "layers": {3: 0.5, "model.layers.4": {"a": 1, "b": 0}}, "default": {"a": 1}}},
    {"weights": {"policy": "per_module", "modules": {"*.q_proj": 0.5, "*": {"b": 2}}}},
    {"search": {"space": {"scale": "0.1..3:log", "method.space": ["core", "knots"]}, "grid": {"seed": [1, 2]}, "budget": 5}},
    {"transforms": ["identity", {"name": "layer_l2_normalize", "eps": 1e-5}]},
    {"output": {"rank": "energy:0.99", "dtype": "bfloat16", "layout": "pattern"}},
    {"heads": {"policy": "from", "adapter": "b"}, "seed": 2**63 - 1, "scale": 1e-30, "base_model": "yes"},
]


@every("change", [*VARIANTS, *({"method": {"name": name, **REQUIRED.get(name, {})}} for name in METHODS)])
def test_a_written_recipe_reads_back_equal(change):
    recipe = build_recipe({"adapters": ["a=./a", "b=org/repo@main/sub"], **change})

    assert load_recipe(to_yaml(recipe)) == recipe
    assert to_yaml(load_recipe(to_yaml(recipe))) == to_yaml(recipe)


@every("name", ["1e3", "1E-3", "1.", "7", "010", "0x1", "no", "true", "null", "2024-01-01", "1_0", "a=b"])
def test_names_that_look_like_something_else_stay_text(name):
    recipe = build_recipe({"adapters": [{"name": name.replace("=", ""), "path": f"./{name}"}], "base_model": name})

    assert load_recipe(to_yaml(recipe)) == recipe


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,6}", fullmatch=True)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, min_size=2, max_size=4, unique=True), FINITE, st.text(TEXT, min_size=1, max_size=8), st.data())
def test_any_recipe_reads_back_equal(names, number, pattern, data):
    """Names such as `no`, `1e-3`, `0x1`, `2024-01-01` and patterns with any character survive YAML."""
    base = data.draw(st.none() | st.text(TEXT, max_size=8))
    recipe = build_recipe(
        {
            "adapters": [{"name": n, "path": f"./{n}", "weight": number} for n in names],
            "base_model": base,
            "weights": {"policy": "per_module", "modules": {pattern: {names[0]: number}}},
        }
    )

    assert load_recipe(to_yaml(recipe)) == recipe


@every("change", [{"base_model": "a\0b"}, {"weights": {"policy": "per_module", "modules": {"\ud800": {"a": 1}}}}])
def test_text_that_no_file_can_hold_is_refused(change):
    with pytest.raises(RecipeError, match="which no file can hold"):
        build_recipe({"adapters": ["a=./a", "b=./b"], **change})


def test_yaml_is_tidy_and_leaves_defaults_out():
    assert to_yaml(load_recipe(FULL)) == (
        "version: 1\n"
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "adapters:\n"
        "  - name: intent\n"
        "    path: ./adapters/intent\n"
        "    weight: 0.7\n"
        "  - name: langid\n"
        "    path: org/repo@main/checkpoint-2874\n"
        "method:\n"
        "  name: ties\n"
        "  density: 0.3\n"
        "transforms:\n"
        "  - layer_l2_normalize\n"
        "weights:\n"
        "  policy: per_layer\n"
        "  layers:\n"
        "    3: 0.5\n"
    )


def test_a_flavor_is_not_spelt_out():
    recipe = build_recipe({"adapters": ["./a"], "method": {"name": "ties", "flavor": "mergekit", "scope": "model"}})

    assert to_yaml(recipe).partition("method:\n")[2] == "  name: ties\n  flavor: mergekit\n  scope: model\n"


def test_plain_data_is_written_as_it_is():
    assert to_yaml({"adapters": ["./a"], "seed": 0}) == "adapters:\n  - ./a\nseed: 0\n"


def test_the_json_schema_describes_recipes_and_their_short_forms():
    schema = json_schema()
    fields = schema["properties"]

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "plait recipe"
    assert schema["description"]
    assert schema["additionalProperties"] is False
    assert list(fields) == list(Recipe.model_fields)
    assert {"type": "string", "enum": list(METHODS)} in fields["method"]["anyOf"]
    assert {"type": "string", "enum": list(TRANSFORMS)} in fields["transforms"]["items"]["anyOf"]
    assert {"type": "string", "minLength": 1} in fields["adapters"]["items"]["anyOf"]
    assert len(fields["method"]["anyOf"][1]["oneOf"]) == len(METHODS)
    assert schema["$defs"]["AdapterEntry"]["required"] == ["path"]
    assert schema["$defs"]["weighted_method"]["properties"]["lambda"]["maximum"] == 1
    pipeline = schema["$defs"]["pipeline_method"]
    assert {"type": "string", "enum": sorted(COMBINES)} in pipeline["properties"]["combine"]["anyOf"]
    assert {"type": "string", "enum": sorted(BEFORE)} in pipeline["properties"]["pre"]["items"]["anyOf"]
    assert {"type": "string", "enum": sorted(AFTER)} in pipeline["properties"]["post"]["items"]["anyOf"]
    assert "required" not in pipeline
    assert schema["$defs"]["Trim"]["properties"]["density"]["maximum"] == 1
    for reference in set(_references(schema)):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    json.dumps(schema, allow_nan=False)


def _references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
