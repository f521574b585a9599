"""Parameters of methods that may be `auto`: a number that is found on texts, and is the default until then."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, WrapValidator
from pydantic.fields import FieldInfo

from plait.records import Record

#: Parameter → values that are tried, besides its default.
SEARCHED = {"ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "density": (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)}


class AutoValue(float):
    """The default of a parameter in place of the number that is still to be found; unequal to that number itself."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AutoValue) and float(self) == float(other)

    __hash__ = float.__hash__

    def __repr__(self) -> str:
        return "auto"


def searched_fields(params: type[Record]) -> dict[str, Any]:
    """Return those of a method's parameters that may be `auto`, as definitions for `create_model`."""
    fields = {name: params.model_fields[name] for name in SEARCHED if name in params.model_fields}
    return {name: _definition(info) for name, info in fields.items() if info.annotation is float}


def values_to_find(method: Record) -> dict[str, float]:
    """Return the parameters of a recipe's `method` that are to be found, with the values to begin at."""
    return {name: float(v) for name in SEARCHED if isinstance(v := getattr(method, name, None), AutoValue)}


def _definition(info: FieldInfo) -> tuple[Any, FieldInfo]:
    def read(value: Any, number: Any) -> float:
        return AutoValue(info.default) if value == "auto" or isinstance(value, AutoValue) else float(number(value))

    def schema(found: dict[str, Any]) -> None:
        number = {k: found.pop(k) for k in ("type", "minimum", "maximum", "exclusiveMinimum") if k in found}
        found["anyOf"] = [number, {"const": "auto", "description": "Found on the tasks' texts, without labels."}]

    field = FieldInfo(default=info.default, description=info.description, json_schema_extra=schema)
    spelled = PlainSerializer(lambda value: "auto" if isinstance(value, AutoValue) else value)
    return Annotated[(float, *info.metadata, WrapValidator(read), spelled)], field
