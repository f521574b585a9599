"""The method names of an older merging framework, with its parameters, on deltas.

Two of them averaged A and B separately and applied the first adapter's scaling to the product. Here every name means the delta
merge it was meant to be; `space: factors` still averages factors, with each adapter's own scaling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from plait.adapters.names import layer_key
from plait.deferred import Tensor, torch
from plait.methods.base import LinearMethod, MethodParams, NoParams, Preset, Source, register
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import Drop
from plait.stages.sums import Mean, Sum

_SOURCE = Source("an earlier LoRA merging framework, whose method names plait keeps")


UNIFORM = Preset(
    name="uniform",
    summary="Mean of the deltas.",
    equation="ΔW = (1/T) Σ wₜ ΔWₜ",
    params=NoParams,
    source=_SOURCE,
    deviation="It averaged A and B separately under the first adapter's scaling; the mean of the deltas is what was meant.",
    min_adapters=2,
    combines="linear",
    stages=lambda params: Pipeline(Mean()),
)
register(UNIFORM)
for _name in ("uniform_delta", "task_vector"):
    register(replace(UNIFORM, name=_name, summary="Mean of the deltas; saved as an exact adapter.", deviation=""))


class ScaleParams(MethodParams):
    """Parameters of `uniform_scalar_delta`."""

    scale: Annotated[float, Field(description="Factor on the sum.", allow_inf_nan=False)] = 1.0


register(
    Preset(
        name="uniform_scalar_delta",
        summary="One factor on the sum of the deltas.",
        equation="ΔW = scale · Σ wₜ ΔWₜ",
        params=ScaleParams,
        source=_SOURCE,
        min_adapters=2,
        combines="linear",
        stages=lambda params: Pipeline(Sum(factor=params.scale)),
    )
)


class LambdaParams(MethodParams):
    """Parameters of `weighted` and `weighted_delta`."""

    lambda_: Annotated[float, Field(alias="lambda", ge=0, le=1, description="Share of the first adapter.")]


def _between(weights: Tensor, params: LambdaParams, module: str) -> Tensor:
    return weights * torch.tensor([params.lambda_, 1 - params.lambda_], dtype=weights.dtype)


WEIGHTED = LinearMethod(
    name="weighted",
    summary="Two adapters, λ of the first and 1 − λ of the second.",
    equation="ΔW = λ ΔW₁ + (1 − λ) ΔW₂",
    params=LambdaParams,
    source=_SOURCE,
    deviation="It interpolated A and B separately: the delta had λ², (1 − λ)² and cross terms. Here deltas are interpolated.",
    min_adapters=2,
    max_adapters=2,
    coefficients=_between,
)
register(WEIGHTED)
register(replace(WEIGHTED, name="weighted_delta", deviation="", spaces=("delta", "core", "knots")))


class CoefficientParams(MethodParams):
    """Parameters of `weighted_delta_n`. Coefficients are in the order of the adapters."""

    task_coefficients: Annotated[
        tuple[float, ...] | None, Field(description="Coefficients, one per adapter; 1/T each when not given.")
    ] = None
    default_task_coefficients: Annotated[
        tuple[float, ...] | None, Field(description="Coefficients of layers that `layer_task_coefficients` does not name.")
    ] = None
    layer_task_coefficients: Annotated[
        dict[str, tuple[float, ...]],
        Field(default_factory=dict, description="Coefficients per layer, by index or by tower and index (`model.layers.3`)."),
    ]
    normalize_coefficients: Annotated[bool, Field(description="Divide the coefficients by their sum.")] = True
    allow_negative_coefficients: Annotated[bool, Field(description="Allow coefficients in [−1, 1] instead of [0, 1].")] = False
    allow_unbounded_coefficients: Annotated[bool, Field(description="Allow any finite coefficient.")] = False

    @model_validator(mode="before")
    @classmethod
    def _layers_by_text(cls, data: Any) -> Any:
        layers = data.get("layer_task_coefficients") if isinstance(data, dict) else None
        return {**data, "layer_task_coefficients": {str(k): v for k, v in layers.items()}} if isinstance(layers, dict) else data

    @model_validator(mode="after")
    def _bounds(self) -> CoefficientParams:
        if self.default_task_coefficients is not None and not self.layer_task_coefficients:
            raise ValueError(
                "default_task_coefficients are for the layers that layer_task_coefficients does not name; it names none"
            )
        low, high = (-1.0 if self.allow_negative_coefficients else 0.0), 1.0
        for row in self.rows():
            if not all(torch.tensor(row, dtype=torch.float64).isfinite()):
                raise ValueError(f"coefficients {list(row)} must be finite")
            if not self.allow_unbounded_coefficients and not all(low <= c <= high for c in row):
                raise ValueError(f"coefficients {list(row)} must be in [{low:g}, {high:g}]; see allow_negative_coefficients")
            if self.normalize_coefficients and sum(row) <= 0:
                raise ValueError(f"coefficients {list(row)} sum to {sum(row):g} and cannot be normalized")
        return self

    def rows(self) -> list[tuple[float, ...]]:
        """Return every set of coefficients."""
        single = [row for row in (self.task_coefficients, self.default_task_coefficients) if row is not None]
        return [*single, *self.layer_task_coefficients.values()]

    def for_module(self, module: str, adapters: int) -> tuple[float, ...]:
        """Return the coefficients of a module: its layer's, else the default's, else the task's, else 1/T."""
        layer = layer_key(module)
        if layer is not None:
            for name, row in self.layer_task_coefficients.items():
                if layer.matches(name):
                    return row
        if self.layer_task_coefficients and self.default_task_coefficients is not None:
            return self.default_task_coefficients
        return self.task_coefficients or (1 / adapters,) * adapters


def _per_layer(weights: Tensor, params: CoefficientParams, module: str) -> Tensor:
    c = torch.tensor(params.for_module(module, len(weights)), dtype=weights.dtype)
    return weights * (c / c.sum() if params.normalize_coefficients else c)


def _one_per_adapter(params: CoefficientParams, adapters: int) -> None:
    for row in params.rows():
        if len(row) != adapters:
            raise ValueError(f"{list(row)} has {len(row)} coefficients for {adapters} adapters")


register(
    LinearMethod(
        name="weighted_delta_n",
        summary="Coefficients per adapter, and per layer where given.",
        equation="ΔW = Σ cₜ(layer) wₜ ΔWₜ,  c normalized to sum 1 unless asked otherwise",
        params=CoefficientParams,
        source=_SOURCE,
        min_adapters=2,
        check=_one_per_adapter,
        layers=lambda params: tuple(params.layer_task_coefficients),
        coefficients=_per_layer,
    )
)


class DareMeanParams(MethodParams):
    """Parameters of `dare`."""

    drop_rate: Annotated[float, Field(ge=0, lt=1, description="Probability with which an entry is dropped.")] = 0.9
    density: Annotated[float | None, Field(gt=0, le=1, description="In place of drop_rate: 1 − drop_rate.")] = None
    lambda_: Annotated[float, Field(alias="lambda", description="Factor on the mean.", allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _drop_rate_from_density(cls, data: Any) -> Any:
        density = data.get("density") if isinstance(data, dict) else None
        if density is None:
            return data
        if data.get("drop_rate") is not None:
            raise ValueError("density is 1 − drop_rate, and both are given; keep one")
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            return data  # the field says what is wrong
        return {key: value for key, value in data.items() if key != "density"} | {"drop_rate": round(1 - density, 16)}


register(
    Preset(
        name="dare",
        summary="DARE with a drop rate, then λ times the mean.",
        equation="ΔW = λ (1/T) Σ wₜ mₜ ⊙ xₜ / (1 − drop_rate)",
        params=DareMeanParams,
        source=_SOURCE,
        deviation="Masks are keyed, not drawn in order from one generator; the seed is the recipe's.",
        spaces=("delta", "core", "knots"),
        min_adapters=2,
        randomised=True,
        stages=lambda params: Pipeline(
            pre=(Drop(density=round(1 - params.drop_rate, 16)),),  # 0.1, not 0.09999999999999998
            combine=Mean(factor=params.lambda_),
        ),
    )
)
