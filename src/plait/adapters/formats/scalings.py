"""Scalings that formats have one of, or per module: which one is written, and the factors that go with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from plait.adapters.lowrank import LowRank
from plait.errors import PlanError
from plait.linalg.finite import all_finite
from plait.tensorfiles.reader import DTYPES, TensorFile


def most_common(values: Iterable[float]) -> float:
    """Return the value that most have, the first of several."""
    return Counter(values).most_common(1)[0][0]


def common_value(values: Iterable[float]) -> float:
    """Return what most modules have, that they all can be expressed by: not 0, and 1 where they have nothing else."""
    return most_common([v for v in values if v] or [1.0])


def rescaled(delta: LowRank, factor: float, target: str) -> LowRank:
    """Return factor · ΔW of a target, rounded once where the factor is not a power of two.

    Raises:
        PlanError: the dtype does not hold the result.
    """
    if factor == 1:
        return delta
    b = (delta.b.double() * factor).to(delta.b.dtype)
    if not all_finite(b) or (factor and delta.b.any() and not b.any()):
        raise PlanError(
            f"{target}: its scaling is {abs(factor):.1e} times the one that is written for all modules, and multiplied into B "
            f"it is out of the range of {str(b.dtype).removeprefix('torch.')}. Write it as 'peft', with a scaling per module."
        )
    return LowRank(delta.a, b)


def one_number(file: TensorFile, name: str) -> float:
    """Return the number that a tensor holds.

    Raises:
        ValueError: it holds several, or none that is finite.
    """
    info = file.tensors[name]
    if math.prod(info.shape) != 1:
        raise ValueError(f"{name!r} is {list(info.shape)}; an alpha is one number")
    if info.dtype == "BOOL" or info.dtype not in DTYPES:
        raise ValueError(f"{name!r} is stored as {info.dtype}; an alpha is a number")
    value = float(file.read(name))
    if not math.isfinite(value):
        raise ValueError(f"{name!r} is {value}; an alpha is a finite number")
    return value
