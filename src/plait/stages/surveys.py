"""The questions that methods ask about a whole model or module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from plait.linalg.select import MagnitudeSelect
from plait.stages.base import Block, Scope, Survey


def magnitudes(scope: Scope, wanted: Callable[[int], Sequence[int]]) -> Survey:
    """Ask for each adapter's k-th largest magnitudes.

    Args:
        scope: over the whole task vector, or over each module.
        wanted: number of entries → the ranks k.

    Returns:
        A survey whose values are (T, number of ranks).
    """

    class Magnitudes:
        def __init__(self, adapters: int) -> None:
            self._select = MagnitudeSelect(adapters, wanted)

        def observe(self, block: Block) -> None:
            self._select.observe(block.x)

        def end_pass(self) -> bool:
            return self._select.end_pass()

        @property
        def values(self) -> Tensor:
            return self._select.values

    return Survey(scope, Magnitudes)


def total(scope: Scope, quantity: Callable[[Block], Tensor]) -> Survey:
    """Ask for the sum of a quantity over all blocks, in one pass.

    Args:
        scope: over the model or over each module.
        quantity: block → tensor of a fixed shape, summed in float64. It must be exact in float64 (counts, signs), or the sum
            would depend on how blocks are cut.
    """

    class Total:
        def __init__(self, adapters: int) -> None:
            self._sum: Tensor | None = None
            self._lock = threading.Lock()

        def observe(self, block: Block) -> None:
            value = quantity(block).double()
            with self._lock:
                self._sum = value if self._sum is None else self._sum + value

        def end_pass(self) -> bool:
            return True

        @property
        def values(self) -> Tensor:
            if self._sum is None:
                raise AssertionError("a total is read before anything was observed")
            return self._sum

    return Survey(scope, Total)
