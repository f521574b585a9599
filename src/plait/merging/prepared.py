"""The adapters as the method sees them: factors read module by module, transforms applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from plait.adapters.adapter import Adapter
from plait.adapters.lowrank import LowRank
from plait.merging.inventory import Inventory
from plait.merging.progress import Progress
from plait.merging.weighting import Towers, towers_of
from plait.transforms import TRANSFORMS, Transform, TransformParams


class Factors(NamedTuple):
    """One matrix of one target module: every adapter's factors and scaling; rank 0 where an adapter lacks the module."""

    deltas: tuple[LowRank, ...]
    scalings: tuple[float, ...]

    def scaled(self) -> list[LowRank]:
        """Return the deltas with their scalings folded in."""
        return [d.scaled(s) for d, s in zip(self.deltas, self.scalings, strict=True)]


@dataclass(frozen=True)
class _Step:
    transform: Transform
    params: TransformParams
    found: tuple[Mapping[str, Any], ...]  # per adapter


class Prepared:
    """Reads factors and applies the recipe's transforms.

    Args:
        inventory: what there is.
        progress: told of the surveys that transforms need.
    """

    def __init__(self, inventory: Inventory, progress: Progress) -> None:
        self._inventory = inventory
        self.towers: Towers = towers_of(inventory.layouts)
        self._steps: list[_Step] = []
        adapters = inventory.adapters
        double = any("F64" in a.dtypes for a in adapters)
        self.dtype = torch.float64 if double else torch.float32
        for params in inventory.recipe.transforms:
            transform = TRANSFORMS[str(params.name)]  # type: ignore[attr-defined]
            found: tuple[Mapping[str, Any], ...] = ({},) * len(adapters)
            if transform.survey is not None:
                progress.start(f"norms for {transform.name}", sum(len(a.targets) for a in adapters))
                found = tuple(transform.survey(params, self._energies(a, i, progress)) for i, a in enumerate(adapters))
                progress.finish()
            self._steps.append(_Step(transform, params, found))

    def read(self, module: str) -> list[Factors]:
        """Return the factors of every matrix of a target module."""
        layout = self._inventory.layouts[module]
        scalings = tuple(a.targets[module].scaling if module in a.targets else 1.0 for a in self._inventory.adapters)
        stacks = [self._slices(a, i, module) for i, a in enumerate(self._inventory.adapters)]
        absent = [LowRank.zero((layout.d_out, layout.d_in), self.dtype)] * layout.stack
        return [Factors(tuple(row), scalings) for row in zip(*(s or absent for s in stacks), strict=True)]

    def _slices(self, adapter: Adapter, index: int, module: str) -> list[LowRank]:
        if module not in adapter.targets:
            return []
        slices = adapter.read(module, self.dtype)
        for step in self._steps:
            slices = [step.transform.apply(s, step.params, step.found[index].get(module)) for s in slices]
        return slices

    def _energies(self, adapter: Adapter, index: int, progress: Progress) -> dict[str, float]:
        energies = {}
        for module, target in adapter.targets.items():
            energies[module] = target.scaling**2 * sum(s.energy() for s in self._slices(adapter, index, module))
            progress.advance()
        return energies
