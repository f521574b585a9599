"""Notes of stages on target modules, collected during a merge for the run record."""

from __future__ import annotations

from collections import defaultdict


class ModuleNotes:
    """Notes on target modules; one given several times for a module counts once. Threads may add in any order."""

    def __init__(self) -> None:
        self._notes: set[tuple[str, str]] = set()

    def add(self, module: str, text: str) -> None:
        """Add a note on a module; passes over the same module may repeat it."""
        self._notes.add((text, module))

    def texts(self) -> tuple[str, ...]:
        """Return every text once, with the number of modules it is about and the first of them."""
        modules: dict[str, list[str]] = defaultdict(list)
        for text, module in sorted(self._notes):
            modules[text].append(module)
        return tuple(f"{text}: {len(about)} target modules, such as {about[0]}." for text, about in modules.items())
