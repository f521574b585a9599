"""TIES and its six incompatible readings."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plait.linalg.elect import Divisor, Vote
from plait.linalg.sparsify import Count
from plait.methods.base import MethodParams, Preset, Scope, Source, register
from plait.stages.elect import Elect, ZeroSign
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import Trim

Flavor = Literal["paper", "peft", "mergekit", "fusion_bench", "core_space"]


class ElectionParams(MethodParams):
    """How a sign is elected per entry and who is averaged then."""

    sign: Annotated[Vote, Field(description="Vote by magnitude (`total`) or by head (`frequency`).")] = "total"
    weighted_vote: Annotated[bool, Field(description="Multiply by the adapters' weights before the vote.")] = False
    zero_sign: Annotated[
        ZeroSign,
        Field(description="A perfect tie drops the entry, counts as plus, or takes the majority sign of the scope."),
    ] = "drop"
    divisor: Annotated[Divisor, Field(description="Divide by the agreeing adapters' count, summed weight, or not at all.")] = (
        "count"
    )


class TiesParams(ElectionParams):
    """Parameters of `ties`."""

    flavor: Annotated[
        Flavor | None,
        Field(description="Sets all of the below as one implementation does; explicit parameters win. "
                          "None means `paper`, in `factors` space `peft`."),
    ] = None  # fmt: skip
    density: Annotated[float, Field(gt=0, le=1, description="Share of entries kept per adapter (the paper's k).")] = 0.2
    scope: Annotated[Scope, Field(description="Trim over the whole task vector (`model`) or within each module.")] = "model"
    kept: Annotated[Count, Field(description="How density · entries becomes a count.")] = "floor"

    @model_validator(mode="before")
    @classmethod
    def _apply_flavor(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        flavor = data.get("flavor") or ("peft" if data.get("space") == "factors" else "paper")
        return {**FLAVORS[flavor], **data, "flavor": flavor} if flavor in FLAVORS else data


FLAVORS: dict[str, dict[str, Any]] = {
    "paper": {"scope": "model", "kept": "floor", "weighted_vote": False, "zero_sign": "drop", "divisor": "count"},
    "peft": {"scope": "module", "kept": "floor", "weighted_vote": False, "zero_sign": "plus", "divisor": "count"},
    "mergekit": {"scope": "module", "kept": "floor", "weighted_vote": True, "zero_sign": "plus", "divisor": "weight"},
    "fusion_bench": {
        "scope": "model",
        "kept": "inclusive",
        "weighted_vote": False,
        "zero_sign": "majority",
        "divisor": "none",
    },
    "core_space": {
        "scope": "module",
        "kept": "inclusive",
        "weighted_vote": False,
        "zero_sign": "majority",
        "divisor": "count",
    },
}


TIES = Preset(
    name="ties",
    summary="Trim each delta to its largest entries, elect a sign per entry, average those that agree.",
    equation="γ = sgn(Σ x̂ₜ);  ΔW = Σ_{t: sgn x̂ₜ = γ} wₜ x̂ₜ / #{t: sgn x̂ₜ = γ},  x̂ₜ = the `density` largest of |xₜ|",
    params=TiesParams,
    source=Source("Yadav et al. 2023, TIES-Merging, Algorithm 1", "https://arxiv.org/abs/2306.01708"),
    deviation=(
        "Weights multiply the surviving entries (the paper has none). A sign of 0 drops the entry, as the equation says; the "
        "authors' code gives it the global majority sign (`zero_sign: majority`) and keeps one entry more (`kept: inclusive`). "
        "Entries that tie with the threshold are all kept. The λ of the paper is `scale`."
    ),
    stages=lambda params: Pipeline(pre=(Trim.of(params),), combine=Elect.of(params)),
)


class TiesSvdParams(TiesParams):
    """Parameters of `ties_svd`: PEFT's readings are the default."""

    flavor: Annotated[Flavor | None, Field(description="As in `ties`; PEFT's when not given.")] = "peft"

    @model_validator(mode="before")
    @classmethod
    def _peft_by_default(cls, data: Any) -> Any:
        return {**data, "flavor": data.get("flavor") or "peft"} if isinstance(data, dict) else data


register(TIES)
register(
    replace(
        TIES,
        name="ties_svd",
        summary="PEFT's `ties_svd`: TIES on the dense deltas with PEFT's readings, truncated to the largest source rank.",
        params=TiesSvdParams,
        source=Source("PEFT add_weighted_adapter(combination_type='ties_svd')"),
        deviation="Randomised truncation by row blocks instead of a dense SVD; √S on both factors.",
        spaces=("delta",),
        auto_rank="largest",
    )
)
