"""An advisory lock on a folder: one process at a time is at work there.

The lock is the system's (`flock`), on a small file that names its holder. It is free again when the process that took it, and
those that inherited it, are gone, however they ended. Where there is no `flock` (Windows) no process is kept out.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from plait.errors import OutputError
from plait.notices import announce
from plait.parsing import is_there

_PAUSE = 0.1  # seconds between tries


@contextmanager
def locked(file: Path, work: str, *, out: Path | None = None, patience: float = 0.0) -> Iterator[int | None]:
    """Hold a folder, made when missing, while the block runs.

    Args:
        file: of the lock, in that folder. It is left there; the block may remove it, and the folder.
        work: what is done in the folder, for the message that another process gets.
        out: the output that is made there, for the message where the folder cannot be written; the folder when None.
        patience: seconds to wait while another process holds it.

    Yields:
        The lock's file descriptor: a child process that inherits it holds the lock too. None where there is no `flock`.

    Raises:
        OutputError: another process holds it, or the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _taken(file, work, patience) if has_locks() else None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{out or file.parent} cannot be written: {error.strerror or error}. Choose another output."
        ) from None
    if handle is None:
        yield None
        return
    with handle:
        yield handle.fileno()


def lock_holder(file: Path, work: str) -> str | None:
    """Return a message where another process holds a lock; None where none does.

    Raises:
        OutputError: the lock cannot be opened.
    """
    if not has_locks() or not is_there(file, OutputError):
        return None
    try:
        handle = file.open("r+", encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror or error}.") from None
    with handle:
        try:
            return None if _lock(handle) else _holder(file, handle, work)
        except OSError as error:
            raise OutputError(f"{file}: {error.strerror or error}.") from None


def _taken(file: Path, work: str, patience: float) -> IO[str]:
    """Lock the file; the one who held it may have removed it meanwhile, and its folder."""
    end = time.monotonic() + patience
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = file.open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue
        try:
            is_held = _lock(handle)
        except OSError:
            handle.close()
            raise
        if not is_held:
            with handle:
                problem = _holder(file, handle, work)
            if time.monotonic() >= end:
                raise OutputError(problem)
            time.sleep(_PAUSE)
        elif not _is_current(file, handle):
            handle.close()
        else:
            who = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
            with suppress(OSError):  # a full disk: what is written next is refused, and the lock holds without a name
                os.truncate(handle.fileno(), 0)
                os.write(handle.fileno(), who.encode())
            return handle


def has_locks() -> bool:
    """Return whether this system locks files; announce it where it does not."""
    if find_spec("fcntl") is not None:
        return True
    announce("this system has no file locks (fcntl): let no two processes of plait write in one folder at the same time.")
    return False


def _lock(handle: IO[str]) -> bool:
    """Return whether this process holds the lock."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(file: Path, handle: IO[str]) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.fstat(handle.fileno()).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _holder(file: Path, handle: IO[str], work: str) -> str:
    handle.seek(0)
    who = handle.read().strip() or "another process"
    return f"{file.parent} is in use by {who}: {work}. Wait for it, stop it, or choose another output."
