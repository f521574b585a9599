"""Folders of runs, named after the time."""

from __future__ import annotations

from datetime import datetime
from itertools import count
from pathlib import Path

from plait.errors import OutputError
from plait.folders import absolute


def new_run_folder(runs: Path) -> Path:
    """Make a folder `run_<time>` in `runs` that no other process has.

    Raises:
        PlaitError: it cannot be written.
    """
    absolute(runs)  # or there is no working directory that it could be in
    stamp = datetime.now().strftime("run_%Y%m%d_%H%M%S")
    for number in count(1):
        folder = runs / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from None
        return folder
    raise AssertionError("count() ended")
