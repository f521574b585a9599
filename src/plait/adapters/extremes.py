"""Factors whose squares float32 does not hold: a merge of them is computed in float64.

Norms, Gram matrices and variances square what they measure. float32 ends at 3.4e38 and has few digits below 1e-38, so that what
is far above 1, or far below, would overflow or vanish on the way to a result that float32 can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor

# Of the largest entry of a factor and of a bound of the delta's entries. Deltas of trained adapters are between 1e-8 and 1e2;
# within the range sums of squares of 2³⁰ entries do not overflow, and squares of a thousandth of the largest do not vanish.
_LARGEST, _SMALLEST = 2.0**40, 2.0**-50


@dataclass(frozen=True)
class ExtremeDelta:
    """A delta that float32 does not suffice for.

    Attributes:
        module: the target module.
        adapter: whose delta it is.
        value: the largest magnitude of its factors, or that bound of its entries that is out of range.
    """

    module: str
    adapter: str
    value: float

    @property
    def note(self) -> str:
        """The note on the target module."""
        return f"computed in float64, since adapter {self.adapter!r} has extreme values"

    def __str__(self) -> str:
        return f"adapter {self.adapter!r} has values of the order of {self.value:.1e} there"


def float32_limit(slices: Sequence[LowRank], factor: float) -> float | None:
    """Return the size that float32 does not suffice for; None where there is none.

    Args:
        slices: the factors of one target module.
        factor: scaling and weight that they are multiplied with; 0 where the adapter does not count.
    """
    for part in slices:
        if factor == 0 or part.rank == 0:
            continue
        a, b = _largest(part.a), _largest(part.b)
        if a == 0 or b == 0:  # the delta is zero, as LoRA begins
            continue
        product = a * b * part.rank
        for size in (a, b, product, product * abs(factor)):
            if not _SMALLEST <= size <= _LARGEST:
                return size
    return None


def _largest(x: Tensor) -> float:
    low, high = x.aminmax()
    return max(abs(float(low)), abs(float(high)))
