"""What acts on the base at a time: hooks and swaps, put on together and taken off together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from plait.mixture.layers import Adapted
from plait.mixture.swaps import Swap


class Arrangement:
    """A set of adapted layers and swapped tensors.

    Args:
        layers: that act.
        swaps: that stand in.
    """

    def __init__(self, layers: Sequence[Adapted], swaps: Sequence[Swap]) -> None:
        self.layers = layers
        self._swaps = swaps
        self._undo = ExitStack()

    def attach(self) -> None:
        """Put everything on; when something fails, nothing stays."""
        with ExitStack() as undo:
            for swap in self._swaps:
                swap.apply()
                undo.callback(swap.undo)
            for layer in self.layers:
                layer.attach(undo)
            self._undo = undo.pop_all()

    def detach(self) -> None:
        """Take everything off, in reverse order."""
        self._undo.close()
