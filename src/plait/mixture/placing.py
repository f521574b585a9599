"""A merge result on the modules of a live model, ready to act several times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from plait.merging.engine import MergedModule
from plait.mixture.coefficients import Coefficients, CoefficientState
from plait.mixture.deltas import DenseDelta, merged_deltas
from plait.mixture.fitting import fitting_module
from plait.mixture.layers import Adapted, adapted
from plait.mixture.modules import ModuleIndex, TargetModule
from plait.mixture.stack import Stack
from plait.spaces.base import MergedMatrix


@dataclass(frozen=True, eq=False)
class PlacedMerge:
    """A merge result on the modules of a live model; see `Mixture.placed`.

    Attributes:
        index: the model's modules.
        layers: of low-rank deltas.
        dense: dense deltas, whose sum with W is formed when they act.
    """

    index: ModuleIndex
    layers: tuple[Adapted, ...]
    dense: tuple[tuple[TargetModule, DenseDelta], ...]

    @classmethod
    def of(cls, merged: Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule], index: ModuleIndex) -> PlacedMerge:
        """Find the module of every delta.

        Args:
            merged: target → one delta per slice, or merged modules as the engine yields them.
            index: the model's modules.

        Raises:
            PlanError: a target that the model does not have, or another shape.
        """
        state = CoefficientState(Coefficients(torch.ones(1), "task", 0, 1))
        layers: list[Adapted] = []
        dense: list[tuple[TargetModule, DenseDelta]] = []
        for path, delta in merged_deltas(merged):
            target = fitting_module(path, delta, index)
            if isinstance(delta, DenseDelta):
                dense.append((target, delta))
            else:
                layers.append(adapted(target, Stack.of(target, [delta]), state))
        return cls(index, tuple(layers), tuple(dense))
