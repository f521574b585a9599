"""What several test files need, and is the same for all, is made once per run: its processes share a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

#: Of this run; None outside of pytest, where everything is made anew.
_folder: Path | None = None


def keep_in(factory: pytest.TempPathFactory) -> None:
    """Keep what is made in the folder of the run, which is above that of each of its processes."""
    global _folder  # noqa: PLW0603 (once per process)
    own = factory.getbasetemp()
    _folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kept"
    _folder.mkdir(exist_ok=True)


def copy_of(name: str, make: Callable[[Path], object], folder: Path) -> Path:
    """Put what `make` writes to a folder into `folder`; a name is made once."""
    if _folder is None:
        make(folder)
        return folder
    made = _folder / name
    with (_folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            draft = _folder / f"{name}.draft"
            shutil.rmtree(draft, ignore_errors=True)  # left by a process that failed or was killed there
            make(draft)
            draft.rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
