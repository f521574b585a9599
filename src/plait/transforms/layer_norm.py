"""Bring every layer of an adapter to one norm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from plait.adapters.names import LayerKey, layer_key
from plait.transforms.base import Transform, TransformParams, register_transform


class LayerNormParams(TransformParams):
    """Parameters of `layer_l2_normalize`."""

    target_norm: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Frobenius norm of every layer afterward.")] = (
        1.0
    )
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False, description="Layers of at most this norm are left as they are.")] = (
        1e-12
    )
    include_non_layer_keys: Annotated[
        bool, Field(description="Treat all modules outside of layers as one layer; else leave them.")
    ] = True


def _factors(params: LayerNormParams, energies: Mapping[str, float]) -> Mapping[str, float]:
    buckets: dict[LayerKey | None, list[str]] = defaultdict(list)
    for module in energies:
        buckets[layer_key(module)].append(module)
    if not params.include_non_layer_keys:
        buckets.pop(None, None)
    factors: dict[str, float] = {}
    for modules in buckets.values():
        norm = math.sqrt(math.fsum(energies[m] for m in modules))
        if norm > params.eps:
            factors |= dict.fromkeys(modules, params.target_norm / norm)
    return factors


register_transform(
    Transform(
        "layer_l2_normalize",
        "Scale each layer's deltas together to one Frobenius norm; layers of different towers are different layers.",
        LayerNormParams,
        lambda delta, params, factor: delta if factor is None else delta.scaled(factor),
        _factors,
    )
)
