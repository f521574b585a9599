"""Statistics of a complete model or module that methods ask for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter

from plait.deferred import Tensor, torch
from plait.linalg.select import MagnitudeSelect
from plait.stages.base import Block, Scope, Survey

_COORDINATES = attrgetter("x")


def magnitudes(
    scope: Scope,
    wanted: Callable[[int], Sequence[int]],
    of: Callable[[Block], Tensor] = _COORDINATES,
    rows: int | None = None,
) -> Survey:
    """Ask for each adapter's k-th largest magnitudes.

    Args:
        scope: over the complete task vector, or over each module.
        wanted: number of entries → the ranks k.
        of: block → (rows, p, q) whose magnitudes are ranked; the coordinates themselves by default.
        rows: how many rows that has; one per adapter by default.

    Returns:
        A survey whose values are (rows, number of ranks).
    """

    class Magnitudes:
        def __init__(self, adapters: int) -> None:
            self._select = MagnitudeSelect(rows or adapters, wanted)

        @property
        def stride(self) -> int:
            return self._select.stride

        def observe(self, block: Block) -> None:
            self._select.observe(of(block))

        def end_pass(self) -> bool:
            return self._select.end_pass()

        @property
        def values(self) -> Tensor:
            return self._select.values

    return Survey(scope, Magnitudes, weighed=of is not _COORDINATES)


def extremes(scope: Scope, quantity: Callable[[Block], tuple[Tensor, Tensor]]) -> Survey:
    """Ask for the smallest and the largest of quantities, in one pass.

    Args:
        scope: over the model or over each module.
        quantity: block → their smallest and largest in the block, two tensors of one fixed shape.

    Returns:
        A survey whose values are (2, …): smallest, largest.
    """

    class Extremes:
        def __init__(self, adapters: int) -> None:
            self._found: Tensor | None = None
            self._lock = threading.Lock()

        def observe(self, block: Block) -> None:
            low, high = quantity(block)
            with self._lock:
                if self._found is None:
                    self._found = torch.stack([low, high])
                else:
                    self._found = torch.stack([torch.minimum(self._found[0], low), torch.maximum(self._found[1], high)])

        def end_pass(self) -> bool:
            return True

        @property
        def values(self) -> Tensor:
            if self._found is None:
                raise AssertionError("extremes are read before anything was observed")
            return self._found

    return Survey(scope, Extremes)


def sums(quantity: Callable[[Block], Tensor]) -> Survey:
    """Ask for the sums over each module of a quantity that is given by rows, in one pass.

    Rows are added with a single rounding (fsum), so the cut into blocks makes no difference.

    Args:
        quantity: block → (T, p), float64.

    Returns:
        A survey whose values are (T,), float64.
    """

    class Sums:
        def __init__(self, adapters: int) -> None:
            self._rows: list[list[float]] = [[] for _ in range(adapters)]

        def observe(self, block: Block) -> None:
            for rows, more in zip(self._rows, quantity(block).tolist(), strict=True):
                rows += more

        def end_pass(self) -> bool:
            return True

        @property
        def values(self) -> Tensor:
            return torch.tensor([math.fsum(rows) for rows in self._rows], dtype=torch.float64)

    return Survey("module", Sums)


def total(scope: Scope, quantity: Callable[[Block], Tensor], *, weighed: bool = True) -> Survey:
    """Ask for the sum of a quantity over all blocks, in one pass.

    Args:
        scope: over the model or over each module.
        quantity: block → tensor of a fixed shape, summed in float64, or in int64 where it is of integers. It must be exact
            there (counts, signs, fixed point), or the sum would depend on how blocks are cut.
        weighed: whether it may depend on the adapters' weights.
    """

    class Total:
        def __init__(self, adapters: int) -> None:
            self._sum: Tensor | None = None
            self._lock = threading.Lock()

        def observe(self, block: Block) -> None:
            value = quantity(block)
            value = value.double() if value.is_floating_point() else value
            with self._lock:
                self._sum = value if self._sum is None else self._sum + value

        def end_pass(self) -> bool:
            return True

        @property
        def values(self) -> Tensor:
            if self._sum is None:
                raise AssertionError("a total is read before anything was observed")
            return self._sum.double()

    return Survey(scope, Total, weighed=weighed)
