"""Whether all entries of a tensor are finite, in one pass without a copy."""

from __future__ import annotations

import math

from plait.deferred import Tensor


def all_finite(x: Tensor) -> bool:
    """Return whether no entry is NaN or infinite: neither of the extremes is, and a NaN among the entries is both of them."""
    return x.numel() == 0 or all(math.isfinite(extreme) for extreme in x.aminmax())
