"""Memory that is used again: new memory for every block would cost more than the arithmetic on it."""

from __future__ import annotations

import math
import threading

from plait.deferred import Tensor, torch


class Scratch(threading.local):
    """Buffers by name, of every thread its own; each grows to the largest size that was asked for."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return a tensor with whatever values are in its memory, which is that of the last one of this name."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[name][:size].view(dtype).view(shape)
