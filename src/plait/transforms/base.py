"""What a transform is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, create_model

from plait.adapters.lowrank import LowRank
from plait.records import Record


class TransformParams(Record):
    """Base of a transform's parameters."""


@dataclass(frozen=True)
class Transform:
    """A change of one adapter.

    Attributes:
        name: as recipes spell it.
        summary: one line for people.
        params: its parameters.
        apply: (ΔW of one matrix, params, what the survey found for its module or None) → ΔW.
        survey: (params, module path → ‖ΔW‖²_F of this adapter) → module path → whatever `apply` needs; None when it needs
            nothing, so that nothing is read twice.
    """

    name: str
    summary: str
    params: type[TransformParams]
    apply: Callable[[LowRank, Any, Any], LowRank]
    survey: Callable[[Any, Mapping[str, float]], Mapping[str, Any]] | None = None

    @cached_property
    def spec(self) -> type[TransformParams]:
        """The shape of an entry of `transforms:` in a recipe."""
        tag: Any = (Literal[self.name], Field(description=self.summary))
        return create_model(f"{self.name}_transform", __base__=self.params, __doc__=self.summary, name=tag)


TRANSFORMS: dict[str, Transform] = {}


def register_transform(transform: Transform) -> Transform:
    """Add a transform to the registry and return it.

    Raises:
        ValueError: the name is taken.
    """
    if transform.name in TRANSFORMS:
        raise ValueError(f"a transform named {transform.name!r} is registered already")
    TRANSFORMS[transform.name] = transform
    return transform
