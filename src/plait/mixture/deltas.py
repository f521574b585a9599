"""What one adapter, or one merge result, brings to one target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plait.adapters.adapter import Adapter
from plait.adapters.lowrank import LowRank
from plait.errors import PlanError
from plait.linalg.blocks import RowBlocks
from plait.merging.engine import MergedModule
from plait.merging.truncation import as_blocks
from plait.spaces.base import MergedMatrix


@dataclass(frozen=True, eq=False)
class AdapterDelta:
    """A low-rank delta with what may go with it; every scaling is folded in.

    Attributes:
        slices: one `LowRank` per matrix of the target's stack, all of one rank.
        bias: (d_out,) of `lora_bias`.
        magnitude: (d_out,) of DoRA.
    """

    slices: tuple[LowRank, ...]
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of every slice."""
        return self.slices[0].rank

    @staticmethod
    def read(adapter: Adapter, target: str, dtype: torch.dtype) -> AdapterDelta:
        """Read an adapter's part of a target.

        Raises:
            AdapterError: a value is NaN or infinite.
        """
        entry = adapter.targets[target]
        slices = tuple(s.scaled(entry.scaling) for s in adapter.read(target, dtype))
        bias = adapter.read_part(target, "lora_B.bias", dtype) * entry.scaling if entry.has_bias else None
        magnitude = adapter.read_part(target, "lora_magnitude_vector", dtype) if entry.is_dora else None
        return AdapterDelta(slices, bias, magnitude).trimmed()

    def trimmed(self) -> AdapterDelta:
        """Return it without ranks that are zero in every slice: zero-padding, as merged adapters are written with."""
        used = torch.stack([s.a.any(1) & s.b.any(0) for s in self.slices]).any(0)
        if bool(used.all()):
            return self
        return replace(self, slices=tuple(LowRank(s.a[used], s.b[:, used]) for s in self.slices))

    def canonical(self) -> AdapterDelta:
        """Return the same delta in balanced singular directions, σ descending: free of the gauge B → BG, A → G⁻¹A."""
        return replace(self, slices=tuple(s.canonical() for s in self.slices))


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """A dense delta.

    Attributes:
        slices: one matrix per slice, by blocks of rows.
        bias: (d_out,) that goes with it.
    """

    slices: tuple[RowBlocks, ...]
    bias: Tensor | None = None


def merged_deltas(
    merged: Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule],
) -> Iterator[tuple[str, AdapterDelta | DenseDelta]]:
    """Yield (target, delta) of a merge result; a target with a dense matrix among its slices is dense altogether."""
    if isinstance(merged, Mapping):
        for target, parts in merged.items():
            low_rank = [p for p in parts if isinstance(p, LowRank)]
            if len(low_rank) < len(parts):
                yield target, DenseDelta(tuple(as_blocks(p) for p in parts))
            else:
                widest = max(p.rank for p in low_rank)
                yield target, AdapterDelta(tuple(p.padded(widest) for p in low_rank)).trimmed()
        return
    for module in merged:
        if module.factors is not None:
            yield module.target, AdapterDelta(module.factors.slices, module.bias, module.magnitude).trimmed()
        elif module.dense is not None:
            yield module.target, DenseDelta(module.dense, module.bias)


def low_rank_only(path: str, delta: AdapterDelta | DenseDelta, done: str) -> AdapterDelta:
    """Return a delta that is factors and nothing else.

    Args:
        path: of its target.
        delta: of any kind.
        done: what only factors can be, for the message.

    Raises:
        PlanError: it is dense, or of DoRA.
    """
    if isinstance(delta, DenseDelta) or delta.magnitude is not None:
        found = "dense" if isinstance(delta, DenseDelta) else "DoRA"
        raise PlanError(f"{path!r}: the merged delta is {found}; only the factors of a low-rank delta can be {done}.")
    return delta
