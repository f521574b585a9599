"""The adapters as the method sees them: factors read module by module, transforms applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from plait.adapters.adapter import Adapter
from plait.adapters.extremes import ExtremeDelta, float32_limit
from plait.adapters.lowrank import LowRank
from plait.deferred import torch
from plait.merging.inventory import Inventory
from plait.merging.weighting import Towers, module_weights, towers_of
from plait.results.progress import Progress
from plait.transforms import TRANSFORMS, Transform, TransformParams


class MatrixFactors(NamedTuple):
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


class NeedsDouble(Exception):
    """Some values need float64, and all target modules need one dtype."""


class PreparedAdapters:
    """Reads factors and applies the recipe's transforms.

    Args:
        inventory: what there is.
        progress: receives the surveys that transforms need.
        is_exact: nothing is squared: factors are written as they are, side by side.
        needs_one_dtype: all target modules need one dtype, since magnitudes are compared over the model.
        in_double: that one is float64.

    Attributes:
        dtype: float32, in which everything is computed; float64 where an adapter is stored so, or `in_double`.
        extremes: target module → deltas that float32 does not suffice for, of the modules that have been read.
    """

    def __init__(
        self,
        inventory: Inventory,
        progress: Progress,
        *,
        is_exact: bool = False,
        needs_one_dtype: bool = False,
        in_double: bool = False,
    ) -> None:
        self._inventory = inventory
        self.towers: Towers = towers_of(inventory.layouts)
        self._steps: list[_Step] = []
        adapters = inventory.adapters
        double = any("F64" in a.dtypes for a in adapters)
        self.dtype = torch.float64 if double or in_double else torch.float32
        self._looks = not double and not is_exact
        self._needs_one_dtype = needs_one_dtype and not in_double
        self.extremes: dict[str, tuple[ExtremeDelta, ...]] = {}
        for params in inventory.recipe.transforms:
            transform = TRANSFORMS[str(params.name)]  # type: ignore[attr-defined]
            found: tuple[Mapping[str, Any], ...] = ({},) * len(adapters)
            if transform.survey is not None:
                progress.start(f"norms for {transform.name}", sum(len(a.targets) for a in adapters))
                found = tuple(transform.survey(params, self._energies(a, i, progress)) for i, a in enumerate(adapters))
                progress.finish()
            self._steps.append(_Step(transform, params, found))

    def check(self, module: str) -> None:
        """Refuse to compute in float32 where the present weights need float64 and all target modules need one dtype.

        Raises:
            NeedsDouble: they do.
        """
        if self._looks and self._needs_one_dtype and self._extremes(module, self._raw(module, self.dtype)):
            raise NeedsDouble

    def find_extremes(self, module: str) -> tuple[ExtremeDelta, ...]:
        """Return the deltas of a target module that float32 does not suffice for."""
        return self._extremes(module, self._raw(module, torch.float32))

    def _extremes(self, module: str, raw: Sequence[list[LowRank]]) -> tuple[ExtremeDelta, ...]:
        weights = module_weights(self._inventory.recipe, module, self.towers)
        found = []
        for adapter, slices, weight in zip(self._inventory.adapters, raw, weights, strict=True):
            size = float32_limit(slices, adapter.targets[module].scaling * weight) if slices else None
            found += [] if size is None else [ExtremeDelta(module, adapter.name, size)]
        return tuple(found)

    def read(self, module: str) -> list[MatrixFactors]:
        """Return the factors of every matrix of a target module; in float64 where float32 does not suffice for some of them.

        Raises:
            NeedsDouble: it does not, and all target modules need one dtype.
        """
        layout, dtype = self._inventory.layouts[module], self.dtype
        scalings = tuple(a.targets[module].scaling if module in a.targets else 1.0 for a in self._inventory.adapters)
        raw = self._raw(module, dtype)
        if self._looks and (found := self._extremes(module, raw)):
            if self._needs_one_dtype:
                raise NeedsDouble
            self.extremes[module] = found
            dtype = torch.float64
            raw = raw if dtype == self.dtype else self._raw(module, dtype)
        stacks = [self._transformed(slices, i, module) for i, slices in enumerate(raw)]
        absent = [LowRank.zero((layout.d_out, layout.d_in), dtype)] * layout.stack
        return [MatrixFactors(tuple(row), scalings) for row in zip(*(s or absent for s in stacks), strict=True)]

    def _raw(self, module: str, dtype: torch.dtype) -> list[list[LowRank]]:
        """Return every adapter's matrices of a module as they are stored; read once by merges that share results."""

        def read() -> list[list[LowRank]]:
            return [a.read(module, dtype) if module in a.targets else [] for a in self._inventory.adapters]

        kept = self._inventory.kept
        return read() if kept is None else kept.result(f"factors {dtype}", module, read, _bytes)

    def _transformed(self, slices: list[LowRank], index: int, module: str) -> list[LowRank]:
        for step in self._steps:
            slices = [step.transform.apply(s, step.params, step.found[index].get(module)) for s in slices]
        return slices

    def _energies(self, adapter: Adapter, index: int, progress: Progress) -> dict[str, float]:
        energies = {}
        for module, target in adapter.targets.items():
            slices = self._transformed(adapter.read(module, self.dtype), index, module)
            energies[module] = target.scaling**2 * sum(s.energy() for s in slices)
            progress.advance()
        return energies


def _bytes(factors: Sequence[Sequence[LowRank]]) -> int:
    return sum(matrix.a.nbytes + matrix.b.nbytes for adapter in factors for matrix in adapter)
