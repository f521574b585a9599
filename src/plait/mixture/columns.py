"""Several deltas side by side on the live base, each a column of Λ: adapters, or merge results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.adapters.names import LayerKey, layer_key
from plait.merging.engine import MergedModule
from plait.mixture.coefficients import Axes, Coefficients, CoefficientState, Granularity
from plait.mixture.deltas import AdapterDelta, low_rank_only, merged_deltas
from plait.mixture.fitting import fitting_module
from plait.mixture.layers import Adapted, adapted
from plait.mixture.modules import ModuleIndex, TargetModule
from plait.mixture.stack import Stack
from plait.spaces.base import MergedMatrix

ColumnDeltas = Sequence[AdapterDelta | None]  # one target's delta per column


class Columns:
    """Low-rank deltas that act with coefficients; see `Mixture.combined`.

    Args:
        rows: path in the adapters → (target module, delta per column; None where a column lacks the target).
        names: of the columns.

    Attributes:
        axes: what the entries of Λ mean; modules by their paths in the adapters.
        deltas: as given, on the processor: path → delta per column.
        layers: what acts on the base.
        state: the coefficients that they read.
    """

    def __init__(self, rows: Mapping[str, tuple[TargetModule, ColumnDeltas]], names: Sequence[str]) -> None:
        layers = layers_of(rows)
        self.state = CoefficientState(Coefficients(torch.zeros(len(names)), "task"))
        self.deltas: dict[str, tuple[AdapterDelta | None, ...]] = {path: tuple(row) for path, (_, row) in rows.items()}
        self.layers: list[Adapted] = [
            adapted(target, Stack.of(target, row), self.state, module=k, layer=layers.index(layer_key(path)))
            for k, (path, (target, row)) in enumerate(rows.items())
        ]
        self.axes = Axes(
            tuple(names),
            tuple(str(key or "") for key in layers),
            tuple(rows),
            tuple(a.stack.rank for a in self.layers),
        )

    @classmethod
    def of(
        cls,
        columns: Mapping[str, Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule]],
        index: ModuleIndex,
        *,
        canonical: bool,
    ) -> Columns:
        """Find the module of every delta; see `Mixture.columns`.

        Args:
            columns: name → low-rank deltas.
            index: the model's modules.
            canonical: take every delta in balanced singular directions.

        Raises:
            PlanError: a dense delta, DoRA, a target that the model does not have, or another shape.
        """
        found: dict[str, list[AdapterDelta | None]] = {}
        for t, merged in enumerate(columns.values()):
            for path, delta in merged_deltas(merged):
                only = low_rank_only(path, delta, "combined")
                row = found.setdefault(path, [None] * len(columns))
                row[t] = only.canonical() if canonical else only
        rows = {
            path: (fitting_module(path, next(d for d in row if d is not None), index), row)
            for path, row in sorted(found.items())
        }
        return cls(rows, tuple(columns))

    def row_of_module(self) -> Tensor:
        """Return the row in Λ per layer of every module, (K,) int64."""
        layers = layers_of(self.deltas)
        return torch.tensor([layers.index(layer_key(path)) for path in self.deltas])

    def merged(self, coefficients: Tensor, granularity: Granularity) -> dict[str, tuple[LowRank, ...]]:
        """Return target → Σ of the columns with their coefficients, one exact delta per matrix, of the deltas' own dtype.

        Raises:
            PlanError: a wrong shape or dtype.
        """
        checked = Coefficients.of(coefficients.detach().cpu(), granularity, self.axes)
        rows = self.row_of_module().tolist()
        found = {}
        for k, (path, row) in enumerate(self.deltas.items()):
            share = checked.share(k, rows[k])
            found[path] = weighted_row(row, share, per_rank=granularity == "direction")
        return found

    def gram(self) -> Tensor:
        """Return ⟨ΔWₛ, ΔWₜ⟩ over all target modules, (T, T) float64."""
        total = torch.zeros(len(self.axes.tasks), len(self.axes.tasks), dtype=torch.float64)
        for row in self.deltas.values():
            for s, one in enumerate(row):
                for t, other in enumerate(row[: s + 1]):
                    if one is not None and other is not None:
                        total[s, t] += sum(a.inner(b) for a, b in zip(one.slices, other.slices, strict=True))
        return total + total.tril(-1).mT


def weighted_row(row: ColumnDeltas, share: Tensor, *, per_rank: bool) -> tuple[LowRank, ...]:
    """Return Σ of one target's deltas with their coefficients, per matrix; (T,) coefficients, or one per rank."""
    first = 0
    parts: list[list[LowRank]] = []
    for t, delta in enumerate(row):
        if delta is None:
            continue
        factor = share[first : first + delta.rank] if per_rank else share[t]
        parts.append([LowRank(s.a, s.b * factor.to(s.b.dtype)) for s in delta.slices])
        first += delta.rank
    return tuple(LowRank.concatenate(list(same), [1.0] * len(same)) for same in zip(*parts, strict=True))


def layers_of(paths: Iterable[str]) -> list[LayerKey | None]:
    """Return the layers of target modules, in order; None last, where some are in no numbered layer."""
    keys = {layer_key(path) for path in paths}
    return [*sorted(k for k in keys if k is not None), *([None] if None in keys else [])]
