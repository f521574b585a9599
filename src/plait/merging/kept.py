"""Results per module that several merges of the same adapters share: a search merges them again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")
USUAL_BYTES = 1 << 30
UNWEIGHTED_BYTES = 1 << 31  # three adapters of a model of 135M parameters take 1.3 GiB in float32
FRAME_BYTES = 1 << 27  # of the coordinates of one merge, and as much again of what these can be had from without decompositions


class KeptResults:
    """Keeps results up to a number of bytes; those of the settings that were used least recently go first.

    Args:
        most: bytes that are kept.
        unweighted: as many besides of dense matrices that only weights are missing in, of every adapter: worth it where weights
            change again and again.

    Attributes:
        unweighted: these; None where none are kept.
    """

    def __init__(self, most: int = USUAL_BYTES, *, unweighted: int = 0) -> None:
        self.unweighted = KeptResults(unweighted) if unweighted else None
        self._most, self._bytes = most, 0
        self._groups: OrderedDict[Hashable, dict[Any, tuple[Any, int]]] = OrderedDict()
        self._lock = Lock()

    def find(self, settings: Hashable, module: str) -> Any:
        """Return what is kept of a module; None where nothing is."""
        with self._lock:
            return self._groups.get(settings, {}).get(module, (None,))[0]

    def has_room(self, settings: Hashable, module: str, count: int) -> bool:
        """Return whether a result of so many bytes is kept, or would be."""
        with self._lock:
            group = self._groups.get(settings, {})
            return module in group or sum(size for _, size in group.values()) + count <= self._most

    def result(self, settings: Hashable, module: str, make: Callable[[], T], size: Callable[[T], int | None]) -> T:
        """Return what was made before of a module with these settings, or make it, and keep it where there is room.

        Args:
            settings: all that it depends on besides the module.
            module: path of the target module.
            make: makes it.
            size: result → bytes; None for one that is not kept.
        """
        with self._lock:
            group = self._groups.get(settings, {})
            if settings in self._groups:
                self._groups.move_to_end(settings)
        if module in group:
            found: T = group[module][0]
            return found
        made = make()
        count = size(made)
        if count is not None:
            self._keep(settings, module, made, count)
        return made

    def _keep(self, settings: Hashable, module: str, made: Any, count: int) -> None:
        with self._lock:
            while self._bytes + count > self._most and self._groups and next(iter(self._groups)) != settings:
                _, oldest = self._groups.popitem(last=False)
                self._bytes -= sum(size for _, size in oldest.values())
            group = self._groups.setdefault(settings, {})
            if module not in group and self._bytes + count <= self._most:
                group[module] = (made, count)
                self._bytes += count
