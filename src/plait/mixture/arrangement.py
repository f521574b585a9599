"""What acts on the base at a time: hooks and swaps, put on together and taken off together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from plait.mixture.layers import Adapted
from plait.mixture.swaps import Swap


class Arrangement:
    """A set of adapted layers and swapped tensors.

    Args:
        layers: that act.
        swaps: of tensors.
    """

    def __init__(self, layers: Sequence[Adapted], swaps: Sequence[Swap]) -> None:
        self.layers = layers
        self._swaps = swaps
        self._undo = ExitStack()

    def attach(self) -> None:
        """Put everything on; when something fails, nothing stays."""
        _guard_hooks()
        with ExitStack() as undo:
            for swap in self._swaps:
                swap.apply()
                undo.callback(swap.undo)
            for layer in self.layers:
                layer.attach(undo)
            self._undo = undo.pop_all()

    def detach(self) -> None:
        """Take everything off, in reverse order."""
        _guard_hooks()
        self._undo.close()


def _guard_hooks() -> None:
    """Make `torch.compile` notice hooks that are added and removed.

    By default it assumes that a module's hooks never change, so code compiled on the bare base would ignore the adapters.
    Code that was compiled before is compiled again, once per process.
    """
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing is compiled
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
