"""The method without a name of its own: stages as a recipe spells them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, create_model, field_validator

from plait.methods.base import MethodParams, Preset, Source
from plait.stages import STAGES, Pipeline, place_of
from plait.stages.sums import Sum


class PipelineParams(MethodParams):
    """Parameters of `pipeline`: a stage is its name, or a mapping with `name` and parameters."""

    if TYPE_CHECKING:
        pre: tuple[Any, ...]
        combine: Any
        post: tuple[Any, ...]

    @field_validator("pre", "post", mode="before", check_fields=False)
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [_named(v) for v in value] if isinstance(value, (list, tuple)) else value

    @field_validator("combine", mode="before", check_fields=False)
    @classmethod
    def _combine_by_name(cls, value: Any) -> Any:
        return _named(value)


def pipeline_method() -> Preset:
    """Return the method `pipeline`, which takes every stage that is registered by now."""
    before = Field((), description="Stages before the merge: on deltas, then on entries.")
    combine = Field(Sum(), description="The stage by which many deltas become one.")
    after = Field((), description="Stages after the merge, on the merged delta.")
    return Preset(
        name="pipeline",
        summary="Stages as the recipe spells them: pre, combine, post.",
        equation="pre → combine → post",
        params=create_model(
            "PipelineParams",
            __base__=PipelineParams,
            __doc__=PipelineParams.__doc__,
            pre=(_several("pre"), before),
            combine=(_one_of("combine"), combine),
            post=(_several("post"), after),
        ),
        source=Source("the stages that the methods above are made of"),
        stages=lambda params: Pipeline(params.combine, params.pre, params.post),
    )


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _one_of(place: str) -> Any:
    """Return the shape of a stage in a recipe: one of those that belong in a place, distinguished by `name`."""
    stages = tuple(stage for stage in STAGES.values() if place_of(stage) == place)
    return Annotated[Union[stages], Field(discriminator="name")]  # noqa: UP007 (built at run time)


def _several(place: str) -> Any:
    shape = _one_of(place)
    return tuple[shape, ...]  # type: ignore[valid-type]
