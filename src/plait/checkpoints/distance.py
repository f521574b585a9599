"""How far two files' tensors are apart, by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from plait.deferred import Tensor, torch
from plait.linalg.blocks import block_ranges
from plait.tensorfiles.reader import TensorFile


class Distance(NamedTuple):
    """The difference of two tensors.

    Attributes:
        largest: |Δ|; infinite where only one of two values is a number.
        unequal: how many entries differ.
        entries: of how many.
    """

    largest: float
    unequal: int
    entries: int


def tensor_distance(one: TensorFile, two: TensorFile, name: str) -> Distance:
    """Compare a tensor that two files have under one name, of one shape."""
    shape = one.tensors[name].shape
    pairs: Iterable[tuple[Tensor, Tensor]]
    if not shape:
        pairs = [(one.read(name), two.read(name))]
    else:
        ranges = block_ranges(shape[0], math.prod(shape[1:]))
        pairs = ((one.read_rows(name, i, j), two.read_rows(name, i, j)) for i, j in ranges)
    largest, unequal = 0.0, 0
    for a, b in pairs:
        if a.numel() and not torch.equal(a, b):
            unequal += int((a != b).sum())
            distance = float((a.double() - b.double()).abs().max())
            largest = max(largest, distance if math.isfinite(distance) else math.inf)
    return Distance(largest, unequal, math.prod(shape))
