"""What a schema allows at a place of a document: its fields, its bounds, its type. The schema is the recipe's unless given.

Reads pydantic's own description of the schema, so that methods and transforms of third parties are covered too. Knows
nothing of problems or of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from plait.recipes.paths import KeyPath, Plain, get_item
from plait.recipes.schema import Recipe

FieldType: TypeAlias = Any  # a type, or a form of `typing`
_BOUNDS = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<="))


def field_names(model: type[BaseModel]) -> list[str]:
    """Return a model's fields as a recipe spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def model_at(path: KeyPath, data: Plain, root: type[BaseModel] = Recipe) -> type[BaseModel] | None:
    """Return the model whose fields are allowed at a path; None where there is none, or several are possible."""
    shape = _walk(path, data, root)[0]
    return shape if _is_model(shape) else None


def tags_at(path: KeyPath, data: Plain, root: type[BaseModel] = Recipe) -> list[str]:
    """Return the names that distinguish the models which are allowed at a path; none where there is one model or none."""
    models = [m for m in _members(_walk(path, data, root)[0]) if _is_model(m) and "name" in m.model_fields]
    return [get_args(m.model_fields["name"].annotation)[0] for m in models] if len(models) > 1 else []


def bounds_at(path: KeyPath, data: Plain, root: type[BaseModel] = Recipe) -> str:
    """Return the bounds of the number at a path, such as `> 0 and <= 1`; empty when it has none."""
    field = _walk(path, data, root)[1]
    found = field.metadata if field is not None else []
    words = [f"{sign} {spell_number(getattr(b, name))}" for kind, name, sign in _BOUNDS for b in found if isinstance(b, kind)]
    return " and ".join(words)


def spell_number(value: float) -> str:
    """Write a number without a needless decimal point."""
    return str(int(value)) if value == int(value) else repr(value)


def is_number_only(path: KeyPath, data: Plain, root: type[BaseModel] = Recipe) -> bool:
    """Return whether the schema wants a number at a path and would not take a truth value."""
    kinds = set()
    for member in _members(_walk(path, data, root)[0]):
        kinds |= {type(v) for v in get_args(member)} if _origin(member) is Literal else {member}
    return bool(kinds & {int, float}) and bool not in kinds


def _walk(path: KeyPath, data: Plain, root: type[BaseModel]) -> tuple[FieldType, FieldInfo | None]:
    shape: FieldType = root
    field: FieldInfo | None = None
    for key in path:
        fields = shape.model_fields.items() if _is_model(shape) else ()
        field = next((f for name, f in fields if key == (f.alias or name)), None)
        inner = field.annotation if field is not None else _inside(shape)
        data = get_item(data, key)
        shape = _choose(inner, data)
    return shape, field


def _inside(shape: FieldType) -> FieldType:
    """Return what a list or a mapping holds."""
    origin, arguments = _origin(shape), get_args(shape)
    if origin in (tuple, list) and arguments:
        return arguments[0]
    return arguments[1] if origin is dict else None


def _choose(shape: FieldType, value: Plain) -> FieldType:
    """Return the member of a union that a value is meant for, or the shape itself."""
    members = list(_members(shape))
    if len(members) == 1:
        return members[0]
    if isinstance(value, Mapping):
        tagged = [m for m in members if _is_model(m) and _has_tag(m, value)]
        return next(iter([*tagged, *(m for m in members if _origin(m) is dict)]), shape)
    if isinstance(value, str):  # `method: ties`
        return next((m for m in members if _is_model(m) and _has_tag(m, {"name": value})), shape)
    return shape


def _has_tag(model: type[BaseModel], value: Mapping[str, Plain]) -> bool:
    """Return whether a value has what distinguishes this model from others: a field with one allowed value."""
    tags = ((n, f.annotation) for n, f in model.model_fields.items())
    return any(_origin(a) is Literal and get_args(a) == (value.get(n),) for n, a in tags)


def _members(shape: FieldType) -> Iterator[FieldType]:
    """Yield the members of a union, without None and without annotations; a shape that is not a union yields itself."""
    if _origin(shape) is Annotated:
        yield from _members(get_args(shape)[0])
    elif _origin(shape) in (Union, UnionType):
        for member in get_args(shape):
            yield from _members(member)
    elif shape is not NoneType:
        yield shape


def _origin(shape: FieldType) -> FieldType:
    return get_origin(shape)


def _is_model(shape: FieldType) -> TypeGuard[type[BaseModel]]:
    return isinstance(shape, type) and issubclass(shape, BaseModel)
