"""TIES and its six incompatible readings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from plait.linalg.elect import Divisor, Vote, agreement, elect_sign, merge_agreeing
from plait.linalg.sparsify import Count, keep_at_least, kept_count
from plait.methods.base import Block, ElementwiseMethod, MethodParams, Scope, Source, Survey, register
from plait.methods.surveys import magnitudes, total

ZeroSign = Literal["drop", "plus", "majority"]
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


def elect_and_merge(block: Block, x: Tensor, params: ElectionParams) -> Tensor:
    """Elect a sign per entry of x (T, p, q) and combine the adapters that agree (TIES, Algorithm 1, steps 2 and 3)."""
    voters = _voters(block, x, params)
    sign = elect_sign(voters, params.sign)
    if params.zero_sign == "plus":
        sign = torch.where(sign == 0, 1, sign)
    elif params.zero_sign == "majority":
        sign = torch.where(sign == 0, block.statistics[-1].sign().to(sign.dtype), sign)
    return merge_agreeing(x, agreement(voters, sign), block.weights, params.divisor)


def check_election(params: Any, adapters: int) -> None:
    """Refuse what would give wrong numbers in silence.

    Raises:
        ValueError: division by weights in a space whose weights hold the scalings.
    """
    if params.divisor == "weight" and params.space == "factors":
        raise ValueError(
            "divisor 'weight' (flavor 'mergekit') in space 'factors' would divide by √(weight · scaling) and so lose the "
            "scalings; use another divisor, or space 'delta'"
        )


def majority(params: ElectionParams, scope: Scope, sparsify: Callable[[Block], Tensor]) -> tuple[Survey, ...]:
    """Ask for the majority of the elected signs where perfect ties take it; `elect_and_merge` reads the last statistic."""
    if params.zero_sign != "majority":
        return ()
    return (total(scope, lambda block: elect_sign(_voters(block, sparsify(block), params), params.sign).sum()),)


def _voters(block: Block, x: Tensor, params: ElectionParams) -> Tensor:
    return x * block.weights.to(x.dtype).view(-1, 1, 1) if params.weighted_vote else x


def _trim(block: Block) -> Tensor:
    return keep_at_least(block.x, block.statistics[0][:, 0])


def _surveys(params: TiesParams) -> tuple[Survey, ...]:
    trimming = magnitudes(params.scope, lambda entries: [kept_count(entries, params.density, params.kept)])
    return (trimming, *majority(params, params.scope, _trim))


def ties(block: Block, params: TiesParams) -> Tensor:
    """Trim every adapter, elect a sign per entry, average the adapters that agree with it; (p, q)."""
    return elect_and_merge(block, _trim(block), params)


TIES = ElementwiseMethod(
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
    combine=ties,
    surveys=_surveys,
    check=check_election,
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
