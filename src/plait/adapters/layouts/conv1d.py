"""Which linear layers of a base model store their weight as (d_in, d_out): transformers' Conv1D, as GPT-2 has it.

An adapter does not record it: PEFT writes `fan_in_fan_out` of the layer that it wrapped last, and corrects it on loading by the
class of each layer. So it is decided per layer: by its shape, and where that is square, by the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from plait.adapters.layouts.base import Layout
from plait.libraries.transformers.layers import CONV1D_LAYERS, CONV1D_MODELS, is_conv1d


@dataclass(frozen=True)
class Conv1D(Layout):
    """A linear layer of the base whose weight is (d_in, d_out). Known where the model is; in adapters it is a `Linear`."""

    kind = "conv1d"
    is_stored_transposed = True
    fan_in_fan_out = True

    @classmethod
    def claims(cls, shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> bool:
        """Return False: factors are those of any linear layer."""
        return False

    @classmethod
    def of_module(cls, module: Any) -> Self | None:
        """Return the layout of factors on transformers' Conv1D."""
        return cls(module.weight.shape[1], module.weight.shape[0]) if is_conv1d(module) else None


def may_be_conv1d(module: str) -> bool:
    """Return whether a module has a name that Conv1D layers have."""
    return module.rpartition(".")[2] in CONV1D_LAYERS


def has_conv1d(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Return whether the layers of a model that `may_be_conv1d` are; None where neither checkpoint nor configuration decides.

    Args:
        config: the model's `config.json`.
        shapes: tensor → shape, of its checkpoint; a bias is as long as the layer's output.
    """
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or not may_be_conv1d(module) or len(shape) != 2 or shape[0] == shape[1]:
            continue
        bias = shapes.get(f"{module}.bias")
        if bias in ((shape[0],), (shape[1],)):
            return bias == (shape[1],)
    parts = [config, *(v for v in config.values() if isinstance(v, Mapping))]  # an encoder and a decoder have theirs
    types = {str(part["model_type"]) for part in parts if part.get("model_type")}
    return bool(types & CONV1D_MODELS) if types else None
