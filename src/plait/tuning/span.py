"""How far a tuned merge has gone from its start, and from what its sources span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.linalg.factored import left_basis
from plait.merging.inventory import Inventory

_ROUND_OFF = 1e-6  # directions below this share of the largest are not counted to a span


def relative_distance(result: Mapping[str, Sequence[LowRank]], start: Mapping[str, Sequence[LowRank]]) -> float | None:
    """Return ‖M − M₀‖_F / ‖M₀‖_F over all target modules; None where the start is zero."""
    moved = size = 0.0
    for target, slices in result.items():
        for one, other in zip(slices, start[target], strict=True):
            moved += LowRank.concatenate([one, other], [1.0, -1.0]).energy()
            size += other.energy()
    return (moved / size) ** 0.5 if size else None


def energy_outside_span(result: Mapping[str, Sequence[LowRank]], inventory: Inventory) -> float:
    """Return the share of ‖M‖²_F that is not in the sources' joint column and row spaces, in [0, 1].

    Per matrix it is ‖M − P M Q‖²_F, where P projects on the columns of all adapters' B and Q on the rows of all their A.
    """
    lost = size = 0.0
    for target, slices in result.items():
        sources = [a.read(target) for a in inventory.adapters if target in a.targets]
        for index, delta in enumerate(slices):
            parts = [s[index] for s in sources]
            energy = delta.energy()
            columns, rows = _basis([p.b for p in parts]), _basis([p.a.mT for p in parts])
            kept = LowRank((delta.a.double() @ rows) @ rows.mT, columns @ (columns.mT @ delta.b.double())).energy()
            lost += max(0.0, energy - kept)
            size += energy
    return lost / size if size else 0.0


def _basis(parts: Sequence[Tensor]) -> Tensor:
    """Return an orthonormal basis of the columns of all parts, each counted alike: (n, k) float64."""
    scaled = [p.double() / n for p in parts if (n := float(p.double().norm())) > 0]
    if not scaled:
        return torch.zeros(parts[0].shape[0], 0, dtype=torch.float64)
    return left_basis(torch.cat(scaled, dim=1), tolerance=_ROUND_OFF)
