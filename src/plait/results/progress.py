"""Progress of long work: a protocol, independent of how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener; stages follow one another and do not nest."""

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage of `total` steps; `unit` B means bytes."""

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""

    def finish(self) -> None:
        """End the stage."""


class PartedProgress(Progress, Protocol):
    """A listener to parts of the work too, of which several may run at a time."""

    def part(self, name: str) -> Progress:
        """Return the listener of one part. Its last stage has no steps, and is called after what became of it."""


class SilentProgress:
    """A listener that does nothing."""

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin nothing."""

    def advance(self, steps: int = 1) -> None:
        """Report nothing."""

    def finish(self) -> None:
        """End nothing."""


def progress_of_part(progress: Progress | None, name: str) -> Progress:
    """Return the listener of one part of the work; a silent one where `progress` takes no parts."""
    part = getattr(progress, "part", None)
    return SilentProgress() if part is None else part(name)
