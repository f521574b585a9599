"""One phase in a process of its own: `python -m plait.training.worker`.

Reads a request (one line of JSON) on stdin and writes events (lines of JSON) on stdout; whatever libraries print goes to
stderr. Leaves when its parent is gone, which the end of stdin tells: two processes never work on one phase.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from plait.training.job import TrainingJob
from plait.training.runners import PhaseStatus, attempt


class EventWriter:
    """A listener that writes what it hears, one line of JSON each.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, phase: str, stage: str, total: int, unit: str) -> None:
        """Write the beginning of a stage."""
        self._write({"event": "begin", "stage": stage, "total": total, "unit": unit})

    def advance(self, phase: str, steps: int) -> None:
        """Write steps done."""
        self._write({"event": "advance", "steps": steps})

    def end(self, outcome: PhaseStatus) -> None:
        """Write how the phase ended."""
        record = None if outcome.record is None else outcome.record.model_dump(mode="json")
        self._write({"event": "end", "record": record, "error": outcome.error})

    def _write(self, event: dict[str, Any]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


def main() -> None:
    """Do what stdin asks for."""
    events = EventWriter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    request = json.loads(_line())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = TrainingJob.model_validate(request["job"])
    events.end(attempt(request["name"], job, Path(request["folder"]), Path(request["log"]), events))


def _line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            sys.exit("the request was cut off")
        line += piece
    return line


def _leave_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
