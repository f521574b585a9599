"""Ridge regression on factored matrices: the M that is nearest to every Xₜ = Bₜ Aₜ on the inputs that its Gram Gₜ describes.

    min_M  Σₜ tr (M − Xₜ) Gₜ (M − Xₜ)ᵀ + ρ ‖M − X̄‖²_F     ⇒     M (Σ Gₜ + ρI) = Σ Xₜ Gₜ + ρ X̄,     X̄ = (1/T) Σ Xₜ

The Bₜ are on the left of both sides and are never looked at: only their rows change, so that the rank stays Σ rₜ.

Where the Gram matrices come as few rows, Σ Gₜ = diag(e) + YᵀY with Y (k, n), k < n, no n × n matrix is made: with
D = diag(e) + ρI,

    (D + YᵀY)⁻¹ = D⁻¹ − D⁻¹ Yᵀ (I + Y D⁻¹ Yᵀ)⁻¹ Y D⁻¹        (Woodbury).
"""

from __future__ import annotations

from plait.deferred import Tensor, torch
from plait.linalg.inputs import RowGram, mirror_lower

CONDITION = 1e6  # of Σ Gₜ + ρI, at most


class IndefiniteError(ValueError):
    """The Gram matrices do not sum to a positive semidefinite matrix."""


class RidgeSystem:
    """The equations of one matrix, taken in one adapter at a time.

    Holds one n × n matrix in float64, and two more while it solves; or, as long as the Gram matrices come as fewer than n rows
    together, those.

    Args:
        n: columns of the Xₜ.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._total: Tensor | None = None
        self._factored: list[RowGram] = []
        self._rows: list[Tensor] = []
        self._moved: list[Tensor] = []

    def add(self, rows: Tensor, gram: Tensor | RowGram) -> None:
        """Take in the rows Aₜ (r, n) and the Gram matrix Gₜ (n, n) of one adapter, both float64."""
        self._rows.append(rows)
        if isinstance(gram, RowGram):
            self._moved.append(gram.moved(rows))
            self._factored.append(gram)
        else:
            self._moved.append(rows @ gram)
            self._dense().add_(gram)
        if self._total is not None or sum(len(g.x) for g in self._factored) >= self._n:
            total = self._dense()
            while self._factored:
                self._factored.pop().add_to(total)
            mirror_lower(total)

    def solve(self, ridge: float) -> Tensor:
        """Return the rows A' (Σ rₜ, n), float64, with which M = [B₁ … B_T] A'.

        Args:
            ridge: ρ as a share of the mean eigenvalue of Σ Gₜ; ρ is never below ‖Σ Gₜ‖_F / `CONDITION`.

        Raises:
            IndefiniteError: a Gram matrix is not positive semidefinite.
        """
        rows, moved = torch.cat(self._rows), torch.cat(self._moved)
        mean = rows / len(self._rows)
        return self._solve_rows(mean, moved, ridge) if self._factored else self._solve_dense(mean, moved, ridge)

    def _dense(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(self._n, self._n, dtype=torch.float64)
        return self._total

    def _solve_dense(self, mean: Tensor, moved: Tensor, ridge: float) -> Tensor:
        total = self._dense()
        diagonal = total.diagonal()
        rho = _rho(ridge, diagonal, float(total.norm()))
        if rho == 0:  # no adapter knows of any input
            return mean
        before = diagonal.clone()
        diagonal += rho  # in place, and back again: a copy would be a third n × n matrix
        factor, failed = torch.linalg.cholesky_ex(total)
        diagonal.copy_(before)
        if int(failed):
            raise IndefiniteError("the Gram matrices do not sum to a positive semidefinite matrix")
        return torch.cholesky_solve((moved + rho * mean).mT, factor).mT

    def _solve_rows(self, mean: Tensor, moved: Tensor, ridge: float) -> Tensor:
        y, extra = torch.cat([g.x for g in self._factored]), torch.stack([g.extra for g in self._factored]).sum(0)
        squares = y.square().sum(0)
        size = float(extra.square().sum() + 2 * (extra * squares).sum() + (y @ y.mT).square().sum()) ** 0.5
        rho = _rho(ridge, extra + squares, size)
        if rho == 0:
            return mean
        d = extra + rho
        scaled = y / d
        core = scaled @ y.mT
        core.diagonal().add_(1)
        right = (moved + rho * mean) / d
        found: Tensor = right - torch.cholesky_solve((right @ y.mT).mT, torch.linalg.cholesky(core)).mT @ scaled
        return found


def _rho(ridge: float, diagonal: Tensor, size: float) -> float:
    """Return ρ from the share that is asked for, the diagonal of Σ Gₜ and ‖Σ Gₜ‖_F; 0 where Σ Gₜ is."""
    return max(ridge * float(diagonal.sum()) / len(diagonal), size / CONDITION) if size else 0.0
