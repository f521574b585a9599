"""`delta`: the dense matrices ΔWₜ themselves, streamed by blocks of rows and never held all at once."""

from __future__ import annotations

from collections.abc import Sequence

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.spaces.base import Array, Frame, Space, unchanged


class Delta(Space):
    """The papers' own space for elementwise methods. Results are dense; an adapter needs a truncation."""

    name = "delta"
    about = "the dense deltas, streamed by row blocks; what the papers mean"
    low_rank = False
    arrays = ("delta",)

    def frame(self, factors: Sequence[LowRank], scalings: Sequence[float]) -> Frame:
        """Return ΔWₜ as one stack of (d_out, d_in)."""
        deltas = [f.scaled(s) for f, s in zip(factors, scalings, strict=True)]

        def rows(start: int, stop: int, stride: int = 1) -> Tensor:
            out = deltas[0].a.new_empty(len(deltas), len(range(start, stop, stride)), deltas[0].shape[1])
            for delta, place in zip(deltas, out, strict=True):
                torch.mm(delta.b[start:stop:stride], delta.a, out=place)
            return out

        # whatever a method does entry by entry, most of it stays near the sources' row spaces
        hint = [(delta.b, delta.a) for delta in deltas if delta.rank]
        return Frame((Array("delta", deltas[0].shape, rows, unchanged, hint),), lambda merged: merged[0], deltas[0].a.dtype)

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return full rank: an elementwise method keeps no low-rank structure."""
        return min(shape)


DELTA = Delta()
