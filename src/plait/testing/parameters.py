"""Whether a method's parameters are described and bounded, with defaults within their own bounds."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from plait.methods import Method
from plait.testing.subject import bounds


def parameter_problems(method: Method, required: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a method's parameters.

    A number is bounded when it refuses what is not a finite number; an integer when it has two bounds.

    Args:
        method: whose parameters.
        required: a value for every parameter that has no default; others are ignored.
    """
    fields = method.params.model_fields
    needed = {f.alias or n: required[f.alias or n] for n, f in fields.items() if f.is_required()}
    problems = [p for name, field in fields.items() for p in _field_problems(method, name, field, needed)]
    try:
        defaults = method.params.model_validate(needed).model_dump(by_alias=True)
        method.params.model_validate(defaults)
    except ValidationError as error:
        problems.append(f"the defaults are refused: {error.errors()[0]['msg']}")
    return problems


def _field_problems(method: Method, name: str, field: FieldInfo, needed: Mapping[str, Any]) -> Iterator[str]:
    if not (field.description or "").strip():
        yield f"{name} has no description"
    leaves = set(_leaves(field.annotation))
    for leaf in leaves:
        if leaf is Any or leaf is str:
            yield f"{name} takes any {'text' if leaf is str else 'value'}; list the choices (Literal)"
        contained = get_origin(field.annotation) not in (None, Union, types.UnionType, Literal)
        if leaf is int and None in bounds(field) and not contained:
            yield f"{name} is an integer without two bounds"
    for value in (math.nan, math.inf, -math.inf) if float in leaves else ():
        if not _refuses(method, {**needed, field.alias or name: _holding(value, field.annotation)}):
            yield f"{name} is a number without bounds: it takes {value}"


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the plain types that an annotation is made of; keys of mappings are names and are left out."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None) or annotation is Ellipsis or origin is Literal or annotation is bool:
        return
    if origin is None:
        if not (isinstance(annotation, type) and issubclass(annotation, Enum)):
            yield annotation
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from _leaves(args[1])
    else:
        for arg in args:
            yield from _leaves(arg)


def _holding(value: float, annotation: Any) -> Any:
    """Return something of an annotation's form in which a number is `value`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _holding(value, next(a for a in args if float in _leaves(a)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"0": _holding(value, args[1])}
    if origin is not None:
        return [_holding(value, next(a for a in args if float in _leaves(a)))]
    return value


def _refuses(method: Method, values: Mapping[str, Any]) -> bool:
    try:
        method.params.model_validate(values)
    except ValidationError:
        return True
    return False
