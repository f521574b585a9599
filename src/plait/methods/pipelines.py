"""The method without a name of its own: stages as a recipe spells them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, create_model, field_validator

from plait.methods.base import MethodParams, Preset, Source
from plait.stages import (
    DeltaCombine,
    DeltaStage,
    EntryCombine,
    EntryStage,
    GramCombine,
    LinearCombine,
    MergedStage,
    Pipeline,
    Stage,
    stages_of,
)
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
            pre=(_several(DeltaStage, EntryStage), before),
            combine=(_one_of(LinearCombine, GramCombine, EntryCombine, DeltaCombine), combine),
            post=(_several(MergedStage), after),
        ),
        source=Source("the stages that the methods above are made of"),
        stages=lambda params: Pipeline(params.combine, params.pre, params.post),
    )


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _one_of(*kinds: type[Stage]) -> Any:
    """Return the shape of a stage in a recipe: one of some kinds, distinguished by `name`."""
    return Annotated[Union[tuple(stages_of(*kinds).values())], Field(discriminator="name")]  # noqa: UP007 (built at run time)


def _several(*kinds: type[Stage]) -> Any:
    shape = _one_of(*kinds)
    return tuple[shape, ...]  # type: ignore[valid-type]
