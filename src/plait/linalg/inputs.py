"""E[x xᵀ] of a matrix' inputs x in either of two forms: the matrix itself, or a few of the inputs, whose mean it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputRows:
    """Second moments as inputs: E[x xᵀ] is the mean of x xᵀ over the rows.

    Attributes:
        x: (k, n), of any floating dtype; k ≥ 1.
    """

    x: Tensor

    def dense(self) -> Tensor:
        """Return E[x xᵀ], (n, n) float64."""
        x = self.x.double()
        return x.mT @ x / len(x)

    def seen(self, v: Tensor) -> Tensor:
        """Return Vᵀ E[x xᵀ] V, (k, k) float64, for V (n, k) float64."""
        x = self.x.double() @ v
        return x.mT @ x / len(x)

    def damped(self, off_diagonal: float) -> RowGram:
        """Return E[x xᵀ] with its off-diagonal entries multiplied by a factor in [0, 1]."""
        x = self.x.double()
        extra = x.square().mean(0) * (1 - off_diagonal)
        return RowGram(x * (off_diagonal / len(x)) ** 0.5, extra)


@dataclass(frozen=True, eq=False)
class RowGram:
    """A Gram matrix in factored form: xᵀ x + diag(extra).

    Attributes:
        x: (k, n) float64.
        extra: (n,) float64, not negative.
    """

    x: Tensor
    extra: Tensor

    def moved(self, rows: Tensor) -> Tensor:
        """Return rows (r, n) times the matrix."""
        return (rows @ self.x.mT) @ self.x + rows * self.extra

    def add_to(self, total: Tensor) -> None:
        """Add the matrix to (n, n) float64."""
        total.addmm_(self.x.mT, self.x)
        total.diagonal().add_(self.extra)
