"""Ridge regression on factored matrices: the M that is nearest to every Xₜ = Bₜ Aₜ on the inputs that its Gram Gₜ describes.

    min_M  Σₜ tr (M − Xₜ) Gₜ (M − Xₜ)ᵀ + ρ ‖M − X̄‖²_F     ⇒     M (Σ Gₜ + ρI) = Σ Xₜ Gₜ + ρ X̄,     X̄ = (1/T) Σ Xₜ

The Bₜ stand on the left of both sides and are never looked at: only their rows change, so that the rank stays Σ rₜ.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONDITION = 1e6  # of Σ Gₜ + ρI, at most


class IndefiniteError(ValueError):
    """The Gram matrices do not sum to a positive semidefinite matrix."""


class RidgeSystem:
    """The equations of one matrix, taken in one adapter at a time.

    Holds one n × n matrix in float64, and two more while it solves.

    Args:
        n: columns of the Xₜ.
    """

    def __init__(self, n: int) -> None:
        self._total = torch.zeros(n, n, dtype=torch.float64)
        self._rows: list[Tensor] = []
        self._moved: list[Tensor] = []

    def add(self, rows: Tensor, gram: Tensor) -> None:
        """Take in the rows Aₜ (r, n) and the Gram matrix Gₜ (n, n) of one adapter, both float64."""
        self._rows.append(rows)
        self._moved.append(rows @ gram)
        self._total += gram

    def solve(self, ridge: float) -> Tensor:
        """Return the rows A' (Σ rₜ, n), float64, with which M = [B₁ … B_T] A'.

        Args:
            ridge: ρ as a share of the mean eigenvalue of Σ Gₜ; ρ is never below ‖Σ Gₜ‖_F / `CONDITION`.

        Raises:
            IndefiniteError: a Gram matrix is not positive semidefinite.
        """
        rows, moved = torch.cat(self._rows), torch.cat(self._moved)
        mean = rows / len(self._rows)
        size, diagonal = float(self._total.norm()), self._total.diagonal()
        if size == 0:  # no adapter knows of any input
            return mean
        rho = max(ridge * float(diagonal.sum()) / len(diagonal), size / CONDITION)
        before = diagonal.clone()
        diagonal += rho  # in place, and back again: a copy would be a third n × n matrix
        factor, failed = torch.linalg.cholesky_ex(self._total)
        diagonal.copy_(before)
        if int(failed):
            raise IndefiniteError("the Gram matrices do not sum to a positive semidefinite matrix")
        return torch.cholesky_solve((moved + rho * mean).mT, factor).mT
