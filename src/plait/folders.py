"""What is in a folder, and nothing beyond it.

A folder may come from elsewhere, and hold links that lead out of it, pipes that never end, and lists that name files of others.
What is copied, hashed or published of a folder is opened here: a regular file that is in it, or in the blobs of the Hub cache
that it is part of, since a snapshot there is made of links to them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from plait.errors import AddressError
from plait.parsing import opened

LONGEST_NAME = 255  # bytes of a name, on every common file system
_DRIVE = re.compile(r"[A-Za-z]:")
_ONCE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class OutsideError(OSError):
    """A name leads out of its folder, or to something that is not a regular file."""


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder for `~`; that of a user who does not exist stays, and leads nowhere."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser raises RuntimeError)


def absolute(path: str | Path, start: Path | None = None) -> Path:
    """Return a path that means the same in any working directory; links and `..` stay in it.

    Args:
        path: as its user wrote it, or a part of it.
        start: the folder that a relative path starts from; the working directory when None, and where it is relative itself.

    Raises:
        AddressError: it is relative, and the working directory does not exist any more.
    """
    place = (start or Path()) / path
    try:
        return place.absolute()
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        gone = "does not exist any more" if isinstance(error, FileNotFoundError) else why
        raise AddressError(
            f"the working directory {gone}, and {str(place)!r} starts there. Change to a folder that exists (cd), or give "
            "complete paths."
        ) from None


def working_folder() -> Path:
    """Return the working directory; the empty path where it does not exist any more: `absolute` refuses what starts there."""
    try:
        return Path.cwd()
    except OSError:
        return Path()


def file_name_problem(name: str) -> str | None:
    """Return why a name cannot be that of a file in a folder, with `/` between its parts; None where it can."""
    parts = name.split("/")
    if not name or "\0" in name:
        return "is empty or holds a NUL character"
    if "\\" in name or _DRIVE.match(name):
        return "holds a backslash or a drive letter"
    if name.startswith("/"):
        return "starts at the root of the file system"
    if ".." in parts:
        return "climbs out of the folder"
    if "" in parts or "." in parts:
        return "names a folder"
    if any(len(part.encode(errors="surrogatepass")) > LONGEST_NAME for part in parts):
        return f"has more than {LONGEST_NAME} bytes between two slashes"
    return None


def one_file(one: str, other: str) -> bool:
    """Return whether two names are those of one file where a file system does not tell upper from lower case."""
    return one.casefold() == other.casefold()


def file_in(folder: Path, name: str) -> Path:
    """Return where a file of a folder really is.

    Args:
        folder: may be a link itself: its user has named it.
        name: of the file, from the folder.

    Raises:
        FileNotFoundError: there is nothing of that name, or a link that leads nowhere.
        OutsideError: it is not a regular file of the folder.
    """
    problem = file_name_problem(name)
    if problem:
        raise OutsideError(f"{name!r} {problem}")
    try:
        real = Path(os.path.realpath(folder / name, strict=True))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OutsideError(f"{name} is a link that leads in a circle") from None
        raise
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise OutsideError(f"{name} is a link to {real}, which is outside the folder")
    if not stat.S_ISREG(real.stat().st_mode):
        raise OutsideError(f"{name} is not a regular file")
    return real


def open_in(folder: Path, name: str) -> BufferedReader:
    """Open a file of a folder for reading; one that has been exchanged for a link or a pipe in the meantime is refused.

    Raises:
        OSError: as `file_in`, or it cannot be read.
    """
    real = file_in(folder, name)
    try:
        return opened(os.open(real, os.O_RDONLY | _ONCE), real)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise OutsideError(f"{name} is not a regular file") from None
        raise


def entries(folder: Path) -> Iterator[str]:
    """Yield what is in a folder and below and is not a folder itself, links among it, by its name from there.

    Raises:
        OSError: a folder cannot be read; one that is gone holds nothing.
    """
    for place, folders, files in os.walk(folder, onerror=_unless_gone):
        links = [name for name in folders if Path(place, name).is_symlink()]  # which are not followed
        yield from (Path(place, name).relative_to(folder).as_posix() for name in (*files, *links))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _roots(folder: Path) -> list[Path]:
    """Return the real places that files of a folder may be in."""
    real = Path(os.path.realpath(folder))
    roots = [real]
    for place in (real, *real.parents):
        if place.parent.name == "snapshots":  # <repository>/snapshots/<commit>/… → <repository>/blobs, or blobs shared by all
            storage = place.parent.parent
            shared = (storage / "blobs", storage.parent / "blobs")
            roots += [blobs for blobs in shared if blobs.is_dir() and not blobs.is_symlink()]
    return roots
