"""E[x xᵀ] of a matrix' inputs x in either of two forms: the matrix itself, or a few of the inputs, whose mean it is."""

from __future__ import annotations

from dataclasses import dataclass

from plait.deferred import Tensor

_STRIP = 256  # rows of Σ x xᵀ that are added to at once


def add_outer_products(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x to the lower triangle of a matrix, in strips: about half the work of the product.

    Args:
        total: (n, n), changed in place; what it holds above the strips' diagonal blocks stays.
        x: (k, n), of the same dtype.
    """
    for start in range(0, x.shape[1], _STRIP):
        stop = min(start + _STRIP, x.shape[1])
        total[start:stop, :stop].addmm_(x[:, start:stop].mT, x[:, :stop])


def mirror_lower(total: Tensor) -> None:
    """Copy what `add_outer_products` has added to the other side of the diagonal, in place."""
    for start in range(_STRIP, len(total), _STRIP):
        strip = total[start : start + _STRIP, :start]
        total[:start, start : start + _STRIP].copy_(strip.mT)


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
        """Add the matrix to the lower triangle of (n, n) float64 (see `mirror_lower`)."""
        add_outer_products(total, self.x)
        total.diagonal().add_(self.extra)
