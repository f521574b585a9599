"""A folder that appears whole, by one rename, or not at all."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plait.errors import OutputError

_OURS = "plait.lock"


def output_problem(folder: Path, *, force: bool) -> str | None:
    """Return why a folder must not be written, before any work is done."""
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            return f"{folder} exists and is not a folder. Choose another output."
        above = next(p for p in folder.absolute().parents if p.exists())
        if not above.is_dir():
            return f"{folder}: {above} is not a folder. Choose another output."
        if not folder.exists() or not any(folder.iterdir()):
            return None
        if not force:
            return f"{folder} exists already. Choose another output, or replace it with --force (force=True)."
        if not (folder / _OURS).is_file():
            return (
                f"{folder} was not written by plait (it has no {_OURS}); --force replaces only what was. Choose another output."
            )
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}."
    return None


@contextmanager
def staged(folder: Path, *, force: bool) -> Iterator[Path]:
    """Offer a new folder beside `folder`; rename it there when the block ends well, remove it otherwise.

    A killed process leaves its staging folder (`.NAME.staging-PID-…`) behind, never a half-written `folder`; the next merge to
    the same place removes it.

    Args:
        folder: the final name.
        force: replace an adapter that stands there.

    Raises:
        OutputError: it cannot be written (permissions, a full disk), or stands already.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow links)
    problem = output_problem(folder, force=force)
    if problem:
        raise OutputError(problem)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        place = folder.with_name(f".{folder.name}.staging-{os.getpid()}-{secrets.token_hex(3)}")
        place.mkdir()
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from None
    try:
        yield place
        publish(place, folder, force=force)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
        ):
            raise
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}. Nothing was left there; free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def publish(place: Path, folder: Path, *, force: bool) -> None:
    """Flush a finished folder and rename it; with `force`, in the place of what stands there.

    Raises:
        OutputError: somebody else has written there in the meantime, and nothing may be replaced.
    """
    _flush(place)
    _swap(place, folder, force=force)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left of the same output."""
    for stale in folder.parent.glob(f".{glob.escape(folder.name)}.staging-*"):
        found = re.fullmatch(r"\.staging-(\d+)-[0-9a-f]+(\.old)?", stale.name.removeprefix(f".{folder.name}"))
        if found is None or _alive(int(found[1])):
            continue
        if found[2] and not folder.exists():
            stale.rename(folder)  # killed between the two renames of a replacement: the old result comes back
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 asks on POSIX only; elsewhere it would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(place: Path, folder: Path, *, force: bool) -> None:
    """Rename; an old result is moved aside first, so that one of the two always stands under the name or beside it.

    Raises:
        OutputError: another process has written there in the meantime, and nothing may be replaced.
    """
    aside = place.with_name(place.name + ".old")
    if force and folder.exists():
        folder.rename(aside)
    try:
        place.rename(folder)  # onto nothing, or onto an empty folder; the system refuses a full one
    except OSError as error:
        if aside.exists():
            aside.rename(folder)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{folder} was written by somebody else in the meantime. Choose another output.") from None
        raise
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # not every file system can flush a folder
        _flush(folder.parent, deep=False)


def _flush(folder: Path, *, deep: bool = True) -> None:
    targets = [p for p in folder.rglob("*") if p.is_file()] if deep else [folder]
    for path in targets:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
