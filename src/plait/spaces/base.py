"""What a space is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.linalg.blocks import RangeHint, RowBlocks


class RowFunction(Protocol):
    """Rows of a stack."""

    def __call__(self, start: int, stop: int, stride: int = 1) -> Tensor:
        """Return every stride-th of the rows [start, stop), (T, …, q)."""


MergedMatrix = LowRank | RowBlocks  # an exact low-rank result, or a matrix that exists as blocks of rows


@dataclass(frozen=True)
class Array:
    """One stack of coordinates, (T, p, q), given by blocks of rows.

    Attributes:
        name: distinguishes the arrays of one frame (`factors` has two).
        shape: (p, q).
        rows: `rows(start, stop)` returns (T, stop − start, q).
        weight_transform: how an adapter's weight enters this array: multiplied by itself (1) or as ±√|weight| (see `factors`).
        range_hint: where the leading row space of a merge is likely to be (see `RowBlocks`).
    """

    name: str
    shape: tuple[int, int]
    rows: RowFunction
    weight_transform: Callable[[Tensor], Tensor]
    range_hint: RangeHint = ()


@dataclass(frozen=True)
class Frame:
    """The coordinates of one target module.

    Attributes:
        arrays: one stack, or two in `factors`.
        lift: takes one merged array per stack, as blocks of rows, back to a delta.
        dtype: of the arrays.
        bytes: of all that it holds in memory; None where it forms the arrays anew whenever they are read.
        small: what `Space.arrays_again` has the arrays from; None where a frame costs next to nothing.
    """

    arrays: tuple[Array, ...]
    lift: Callable[[Sequence[RowBlocks]], MergedMatrix]
    dtype: torch.dtype
    bytes: int | None = None
    small: tuple[Tensor, ...] | None = None


class Space(ABC):
    """A system of coordinates for the deltas of one target module.

    Attributes:
        name: as recipes spell it.
        about: one line for people.
        low_rank: whether every merge in it has an exact low-rank result.
        arrays: names of the arrays of its frames, the same for every module.
    """

    name: str
    about: str
    low_rank: bool
    arrays: tuple[str, ...]

    @abstractmethod
    def frame(self, factors: Sequence[LowRank], scalings: Sequence[float]) -> Frame:
        """Return the coordinates of ΔWₜ = scalingsₜ · factorsₜ.b @ factorsₜ.a; an adapter without the module has rank 0."""

    def arrays_again(self, small: Sequence[Tensor], deltas: Callable[[], Sequence[LowRank]]) -> tuple[Array, ...]:
        """Return a frame's arrays, bit for bit, without its decompositions; asked of spaces whose frames have `small`.

        Args:
            small: what the frame has as such.
            deltas: returns the factors times their scalings.
        """
        raise NotImplementedError

    @abstractmethod
    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the largest rank a merge of deltas of these ranks can have here; known before anything is read."""


def unchanged(weights: Tensor) -> Tensor:
    """Let weights enter as they are."""
    return weights


def in_memory(x: Tensor) -> RowFunction:
    """Return the row function of a stack (T, p, q) that is in memory."""
    return lambda start, stop, stride=1: x[:, start:stop:stride]
