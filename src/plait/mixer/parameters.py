"""A method's parameters as controls: what the registry's own schema says of them, in the terms of a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from plait.methods.base import Method
from plait.records import Record

_STEP = 0.01


class Parameter(Record):
    """One control.

    Attributes:
        name: as a recipe spells it.
        kind: a number within bounds (`slider`) or without (`number`, `integer`), `switch`, `choice`, or YAML (`text`).
        default: of the method.
        low: smallest value of a slider.
        high: largest value of a slider.
        step: of a slider.
        options: of a choice; the empty one is none of them, where that is allowed.
        description: for people.
    """

    name: str
    kind: Literal["slider", "number", "integer", "switch", "choice", "text"]
    default: Any
    low: float = 0.0
    high: float = 1.0
    step: float = _STEP
    options: tuple[str, ...] = ()
    description: str = ""


def parameters_of(method: Method) -> tuple[Parameter, ...]:
    """Return the controls of a method's space and parameters, in the schema's order; no control has a single choice."""
    schema = method.spec.model_json_schema()
    shapes = schema.get("$defs", {})
    found = (_parameter(name, field, shapes) for name, field in schema["properties"].items() if name != "name")
    return tuple(one for one in found if one.kind != "choice" or len(one.options) > 1)


def _parameter(name: str, field: Mapping[str, Any], shapes: Mapping[str, Any]) -> Parameter:
    about = {"name": name, "default": field.get("default"), "description": field.get("description", "")}
    shape = _shape(field, shapes)
    options = shape.get("enum", [shape["const"]] if "const" in shape else [])
    if options and all(isinstance(option, str) for option in options):
        may_be_none = any(option.get("type") == "null" for option in field.get("anyOf", ()))
        return Parameter(kind="choice", options=("",) * may_be_none + tuple(options), **about)
    kind = shape.get("type")
    if kind == "boolean":
        return Parameter(kind="switch", **about)
    if kind not in ("number", "integer"):
        return Parameter(kind="text", **about)
    step = 1.0 if kind == "integer" else _STEP
    low = shape.get("minimum", shape["exclusiveMinimum"] + step if "exclusiveMinimum" in shape else None)
    high = shape.get("maximum", shape["exclusiveMaximum"] - step if "exclusiveMaximum" in shape else None)
    if low is None or high is None or (high - low) / step > 1000:
        return Parameter(kind="number" if kind == "number" else "integer", **about)
    return Parameter(kind="slider", low=low, high=high, step=step, **about)


def _shape(field: Mapping[str, Any], shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the type of a field: of a number that may be `auto`, or of a value that may be none, that of the value."""
    if "$ref" in field:
        return dict(shapes[field["$ref"].rpartition("/")[2]])
    options = [o for o in field.get("anyOf", ()) if o.get("const") != "auto" and o.get("type") != "null"]
    return dict(options[0]) if len(options) == 1 else field
