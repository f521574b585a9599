"""What stages say of target modules while they run, for the run record."""

from __future__ import annotations

from collections import defaultdict


class Remarks:
    """Remarks, each once per module, from any thread and in any order."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def add(self, module: str, text: str) -> None:
        """Take a remark on a module in; every pass may say it again."""
        self._said.add((text, module))

    def notes(self) -> tuple[str, ...]:
        """Return every remark with how many modules it is about, and the first of them."""
        modules: dict[str, list[str]] = defaultdict(list)
        for text, module in sorted(self._said):
            modules[text].append(module)
        return tuple(f"{text}: {len(about)} target modules, such as {about[0]}." for text, about in modules.items())
