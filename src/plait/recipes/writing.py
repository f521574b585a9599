"""A recipe as YAML, and the schema as JSON Schema.

Independent of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from plait.methods import METHODS
from plait.recipes.documents import FLOAT
from plait.recipes.paths import Plain
from plait.recipes.schema import Recipe
from plait.transforms import TRANSFORMS

_INDEX = re.compile(r"0|[1-9][0-9]*")
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


class _Dumper(yaml.SafeDumper):
    """Writes lists indented below their key, and quotes all that a reader might take for a number."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: FBT001, FBT002
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = '"' if any(c in "\x85\u2028\u2029" for c in value) else None  # line ends to YAML, of which it would keep none
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def to_yaml(recipe: Recipe | Mapping[str, Plain]) -> str:
    """Write a recipe as YAML in block style.

    Of a `Recipe` what has its default value is left out, except for version and method; `load_recipe` of the text
    gives an equal recipe. Plain data is written as it is.
    """
    data = _with_numbers(_sparse(recipe) if isinstance(recipe, Recipe) else dict(recipe))
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with the short forms (`method: ties`, an adapter as text) that it accepts."""
    schema = Recipe.model_json_schema()
    fields = schema["properties"]
    schema["$defs"]["AdapterEntry"]["required"].remove("name")  # it comes from the path
    fields["adapters"]["items"] = {"anyOf": [fields["adapters"]["items"], {"type": "string", "minLength": 1}]}
    fields["method"] = _with_names(fields["method"], METHODS)
    fields["transforms"]["items"] = _with_names(fields["transforms"]["items"], TRANSFORMS)
    _allow_short_pipelines(schema["$defs"]["pipeline_method"])
    search = schema["$defs"]["SearchSpec"]["properties"]
    ranges = search["space"]["additionalProperties"]  # 0..2, or a list
    search["space"]["additionalProperties"] = {"anyOf": [ranges, {"type": "string"}, {"type": "array"}]}
    search["grid"]["additionalProperties"] = True  # a list, a value, or text with commas
    head: dict[str, Any] = {
        "$schema": _DRAFT,
        "title": "plait recipe",
        "description": "What to merge and how. `plait merge RECIPE` runs it; unknown keys are errors.",
    }
    return head | {key: value for key, value in schema.items() if key not in head}


def _allow_short_pipelines(pipeline: dict[str, Any]) -> None:
    """Allow a stage as its bare name, and stages without the name `pipeline` before them."""
    stages = pipeline["properties"]
    for place in ("pre", "post"):
        stages[place]["items"] = _with_names(stages[place]["items"], stages[place]["items"]["discriminator"]["mapping"])
    stages["combine"] = _with_names(stages["combine"], stages["combine"]["discriminator"]["mapping"])
    del pipeline["required"]
    pipeline["anyOf"] = [{"required": [key]} for key in ("name", "pre", "combine", "post")]


def _with_names(schema: dict[str, Any], names: Mapping[str, object]) -> dict[str, Any]:
    """Allow a bare name in place of a mapping with a name; what describes the field as a whole stays outside."""
    outside: dict[str, Any] = {key: schema[key] for key in ("description", "default", "title") if key in schema}
    inside = {key: value for key, value in schema.items() if key not in outside}
    return {**outside, "anyOf": [{"type": "string", "enum": list(names)}, inside]}


def _sparse(recipe: Recipe) -> dict[str, Plain]:
    data = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data["method"] = shortest(recipe.method)
    if recipe.transforms:
        data["transforms"] = [shortest(transform) for transform in recipe.transforms]
    order = {name: data[name] for name in Recipe.model_fields if name in data}
    return {"version": recipe.version, **order}


def shortest(spec: BaseModel) -> Plain:
    """Return the fewest parameters that read back as an equal value: some set others (`flavor`); a bare name alone."""
    data = spec.model_dump(mode="json", by_alias=True)
    data = {"name": data.pop("name"), **data}
    for key in [key for key in reversed(data) if key != "name"]:
        fewer = {k: v for k, v in data.items() if k != key}
        if _reads_back(fewer, spec):
            data = fewer
    return data["name"] if len(data) == 1 else data


def _reads_back(data: dict[str, Plain], spec: BaseModel) -> bool:
    try:
        return type(spec).model_validate(data) == spec
    except ValueError:
        return False


def _with_numbers(value: Plain) -> Plain:
    """Return data in which the index of a layer is a number again, as people write it."""
    if isinstance(value, Mapping):
        return {int(k) if _INDEX.fullmatch(str(k)) else k: _with_numbers(v) for k, v in value.items()}
    return [_with_numbers(v) for v in value] if isinstance(value, (list, tuple)) else value


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return what a merge depends on as plain values, with every default; how it is evaluated is not part of that."""
    others = {"tasks", "eval", "calibration", "tune", "search"}
    data: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude=others)
    return data
