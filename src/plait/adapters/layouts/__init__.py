"""One class per kind of layer: how its factors are stored, what its weight looks like, what is supported there.

Code asks a layout; nothing compares names of kinds. A new kind is one file here and one line in `LAYOUTS`, and where a live
model runs it through a forward pass of its own, a class in `plait.mixture.layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.adapters.layouts.base import Layout, TensorNames, uniform_rank
from plait.adapters.layouts.conv1d import Conv1D
from plait.adapters.layouts.convolution import Convolution
from plait.adapters.layouts.embedding import Embedding
from plait.adapters.layouts.linear import Linear
from plait.adapters.layouts.parameter import Parameter

__all__ = [
    "LAYOUTS", "Conv1D", "Convolution", "Embedding", "Layout", "Linear", "Parameter", "TensorNames",
    "factor_parts", "layout_type", "module_keys", "module_layout", "uniform_rank",
]  # fmt: skip

# The first that claims a target has it.
LAYOUTS: tuple[type[Layout], ...] = (Embedding, Parameter, Convolution, Conv1D, Linear)


def layout_type(shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> type[Layout]:
    """Return the kind of layer that an adapter's target is.

    Args:
        shapes: part of the target (`lora_A`, …) → shape on disk.
        is_parameter: whether the configuration names it in `target_parameters`.
    """
    return next(layout for layout in LAYOUTS if layout.claims(shapes, is_parameter=is_parameter))


def module_layout(module: Any) -> Layout | None:
    """Return the layout of factors on a module of a live model; None where there is none.

    A layout that only says how factors are stored has no modules: those of the layout that it is derived from stay with that.
    """
    own = (layout for layout in LAYOUTS if "of_module" in vars(layout))
    return next((found for layout in own if (found := layout.of_module(module)) is not None), None)


def module_keys(layouts: Mapping[str, Layout]) -> dict[str, str]:
    """Return target → the module under which PEFT stores its tensors, in the targets' order."""
    of: dict[type[Layout], list[str]] = {}
    for target, layout in layouts.items():
        of.setdefault(type(layout), []).append(target)
    keys = {target: key for layout, targets in of.items() for target, key in layout.module_keys(targets).items()}
    return {target: keys[target] for target in layouts}


def factor_parts() -> dict[str, bool]:
    """Return what factors are called in files (`lora_A`, `lora_embedding_A`, …) → whether they are layers, and have weights."""
    return {part: bool(layout.suffix) for layout in LAYOUTS for part in (layout.a_part, layout.b_part)}
