"""What a check of the contract claims of merged deltas; `Broken` says in which case it does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from plait.testing.cohorts import Cohort

CLOSE = 1e-9  # values are compared in float64, where a difference above this share of the largest is not rounding


class Broken(AssertionError):
    """A property does not hold; the message says in which case and what was found."""


@contextmanager
def case(text: str) -> Iterator[None]:
    """Put the case in front of what is broken in it; whatever else is raised there is broken too."""
    try:
        yield
    except Broken as broken:
        raise Broken(f"{text}: {broken}") from broken.__cause__
    except Exception as error:
        raise Broken(f"{text}: {type(error).__name__}: {error}") from error


def require(holds: bool, otherwise: str) -> None:  # noqa: FBT001 (the condition is the argument)
    """Raise `Broken` where a condition does not hold."""
    if not holds:
        raise Broken(otherwise)


def sound(merged: Mapping[str, Tensor], adapters: Cohort) -> None:
    """Require every module, in its shape, in the adapters' dtype, with finite values."""
    dtype = next(adapters.tensors()).dtype
    expected = {m: s for m, s in adapters.shapes.items() if any(m in modules for modules in adapters.factors.values())}
    require(set(merged) == set(expected), f"merged modules are {sorted(merged)}, not {sorted(expected)}")
    for module, x in merged.items():
        require(tuple(x.shape) == expected[module], f"{module} has shape {tuple(x.shape)}, not {expected[module]}")
        require(x.dtype == dtype, f"{module} is {x.dtype}, the adapters are {dtype}")
        require(bool(torch.isfinite(x).all()), f"{module} has {int((~torch.isfinite(x)).sum())} values that are not finite")


def not_all_zero(merged: Mapping[str, Tensor]) -> None:
    """Require that some value of some module is not zero."""
    require(any(bool((x != 0).any()) for x in merged.values()), f"{', '.join(merged)}: zero everywhere")


def identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Require equality, to the bit."""
    for module, x in expected.items():
        require(torch.equal(found[module], x), f"{module} differs by up to {float((found[module] - x).abs().max()):.3g}")


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = CLOSE) -> None:
    """Require equality up to a share of each module's largest value."""
    for module, x in expected.items():
        off, largest = float((found[module] - x).abs().max()), float(x.abs().max())
        require(off <= tolerance * largest, f"{module} differs by {off:.3g} where values reach {largest:.3g}")
