"""One phase in a process of its own: `python -m plait.training.worker`.

Reads a request (one line of JSON) on stdin and writes lines of JSON on stdout: a list for every call of its `Progress`, then
a mapping with the status. Whatever libraries print goes to stderr. Leaves when its parent is gone, which the end of stdin
shows: two processes never work on one phase.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from plait.training.job import TrainingJob
from plait.training.runners import SentProgress, run_phase


def main() -> None:
    """Do what stdin asks for."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(_line())
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def write(event: object) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    job, folder, log = TrainingJob.model_validate(request["job"]), Path(request["folder"]), Path(request["log"])
    write(run_phase(request["name"], job, folder, log, SentProgress(write)).to_json())


def _line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            sys.exit("the request was cut off")
        line += piece
    return line


def _exit_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
