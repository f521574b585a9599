"""TIES and its six incompatible readings."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plait.methods.base import MethodParams, Preset, Source, register
from plait.stages.elect import Elect, ElectFields
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import Trim, TrimFields

Flavor = Literal["paper", "peft", "mergekit", "fusion_bench", "core_space"]


class _Flavored(MethodParams):
    flavor: Annotated[
        Flavor | None,
        Field(
            description="One implementation's `scope`, `kept`, `weighted_vote`, `zero_sign` and `divisor`; those given "
            "explicitly win. By default `paper`, in `factors` space `peft`."
        ),
    ] = None


class TiesParams(ElectFields, TrimFields, _Flavored):  # fields are in the order of the last base first
    """Parameters of `ties`."""

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
        "Entries that tie with the threshold are all kept. The paper's k is `density`, its λ is `scale`."
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
        deviation="Randomized truncation by row blocks instead of a dense SVD; √S on both factors.",
        spaces=("delta",),
        auto_rank="largest",
    )
)
