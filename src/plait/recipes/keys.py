"""Every key of a recipe by its path: description, default and allowed values, as the schema has them."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from plait.methods import METHODS
from plait.recipes.problems import spell_value
from plait.recipes.schema import Recipe
from plait.records import Record

_LISTED = 3  # methods named for a parameter that several have


def recipe_keys() -> list[dict[str, str]]:
    """Return every key below which no other is named: `path`, `description`, `default` (as a recipe spells it), `allowed`.

    Of the methods there is one key per name of a parameter; each description has its methods before it.
    """
    keys = [key for key in _keys(Recipe, "") if key["path"] != "method"]
    description = str(Recipe.model_fields["method"].description)
    name = {"path": "method.name", "description": description, "default": "linear", "allowed": "string"}
    return [name, *_method_keys(), *keys]


def parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Return a model's fields: name, default, whether it is required, allowed values, description."""
    schema = model.model_json_schema()
    return [
        {
            "name": key,
            "default": field.get("default"),
            "required": key in schema.get("required", []),
            "allowed": _allowed(field, schema.get("$defs", {})),
            "description": field.get("description", ""),
        }
        for key, field in schema.get("properties", {}).items()
    ]


def _keys(model: type[BaseModel], above: str) -> Iterator[dict[str, str]]:
    for about, field in zip(parameters(model), model.model_fields.values(), strict=True):
        if (part := _part(field)) is not None:
            yield from _keys(part, f"{above}{about['name']}.")
        else:
            yield _key(f"{above}{about['name']}", about)


def _key(path: str, about: dict[str, Any]) -> dict[str, str]:
    default = "" if about["default"] in (None, "") else spell_value(about["default"])
    return {"path": path, "description": about["description"], "default": default, "allowed": about["allowed"]}


def _part(field: FieldInfo) -> type[Record] | None:
    """Return the model of a key that is a mapping with keys of its own."""
    options = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    models = [t for t in options if isinstance(t, type) and issubclass(t, Record)]
    return models[0] if len(models) == 1 else None


def _method_keys() -> Iterator[dict[str, str]]:
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for method in METHODS.values():
        for about in parameters(method.spec):
            found.setdefault(about["name"], []).append((method.name, about))
    del found["name"]
    for name, owners in found.items():
        by_text: dict[str, list[str]] = {}
        for method_name, about in owners:
            by_text.setdefault(about["description"], []).append(method_name)
        whose = {text: ", ".join(names[:_LISTED]) + ", …" * (len(names) > _LISTED) for text, names in by_text.items()}
        texts = [text if name == "space" else f"{methods}: {text}" for text, methods in whose.items()]
        defaults = {_key("", about)["default"] for _, about in owners}
        yield {
            "path": f"method.{name}",
            "description": " ".join(texts),
            "default": defaults.pop() if len(defaults) == 1 else "",
            "allowed": " | ".join(dict.fromkeys(part for _, about in owners for part in about["allowed"].split(" | "))),
        }


def _allowed(field: dict[str, Any], shapes: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(shapes[field["$ref"].rpartition("/")[2]]["properties"].get("name", {}).get("const", "mapping"))
    if "oneOf" in field:
        return " | ".join(_allowed(option, shapes) for option in field["oneOf"])
    if field.get("type") == "array" and "items" in field:
        return f"list of {_allowed(field['items'], shapes)}".removesuffix(" of ")
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"mapping of name to {_allowed(field['additionalProperties'], shapes)}"
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " | ".join(_allowed(option, shapes) for option in field["anyOf"])
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in field
    ]
    kind = {"number": "number", "boolean": "true | false", "null": "null"}.get(field.get("type", ""), field.get("type", ""))
    return f"{kind} {', '.join(bounds)}".rstrip()
