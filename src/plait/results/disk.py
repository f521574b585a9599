"""Where an output may be written: not over an input, on a disk with space for it; and what its failures are."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from plait.errors import DISK_FAULTS, DISK_FULL, OutputError, PlaitError
from plait.folders import LONGEST_NAME, absolute

#: What libraries written in Rust say of the system's error, and what torch says whose archive could not be written to its end.
_NUMBER, _CUT_OFF = re.compile(r"\(os error (\d+)\)"), re.compile(r"inline_container\.cc|PytorchStreamWriter failed")


@contextmanager
def writing(out: Path, place: Path) -> Iterator[None]:
    """Refuse what the file system fails at inside the block, such as a disk that is full.

    Args:
        out: what is being written, for the message.
        place: the folder that is written in; what fails elsewhere is raised as it is.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        if failure := write_failure(error, out, place):
            raise failure from error
        raise


def write_failure(error: BaseException, out: Path, place: Path, *, left: str = "") -> OutputError | None:
    """Return the refusal of an output whose writing the system failed at; None where the error is about something else.

    Args:
        error: raised while the output was written, and inputs were read: those that fail are named by their error.
        out: the output.
        place: the folder that it is made in, before it has its name.
        left: a sentence on what is left there.
    """
    if not isinstance(error, OSError) or isinstance(error, PlaitError) or error.errno is None:
        return None
    why = error.strerror or str(error)
    refused = (errno.EACCES, errno.EPERM, errno.EROFS)
    if not isinstance(error.filename, (str, os.PathLike)):
        if error.errno not in (*DISK_FAULTS, *refused):
            return None
    elif error.errno not in DISK_FULL:
        about = Path(os.path.abspath(error.filename))  # noqa: PTH100 (resolve() would follow links)
        if not any(about.is_relative_to(os.path.abspath(p)) for p in (place, out)):  # noqa: PTH100
            return None
        why = f"{why} ({about})"
    advice = "Free some space, or choose another place." if error.errno in DISK_FULL else ""
    advice = "Choose another place." if error.errno in refused else advice
    return OutputError(" ".join(filter(None, (f"{out} cannot be written: {why}.", left, advice))))


def full_disk(error: BaseException) -> str | None:
    """Return why a library could not write to a disk that is full; None where it failed at something else.

    Args:
        error: of any class; what led to it is looked at too.
    """
    raised: BaseException | None = error
    while raised is not None:
        found = _NUMBER.search(str(raised))
        number = raised.errno if isinstance(raised, OSError) else int(found[1]) if found else None
        if number in DISK_FULL:
            return os.strerror(number)
        if isinstance(raised, RuntimeError) and _CUT_OFF.search(str(raised)):
            return "torch could not write a file to its end"
        raised = raised.__cause__ or raised.__context__
    return None


def writing_problem(place: Path) -> str | None:
    """Return why nothing can be written in a folder, or why it cannot be made where it is not there; nothing is made.

    Args:
        place: what is there, if anything, is a folder or a link to one.

    Returns:
        Words that follow "cannot be written: "; None where it can be.

    Raises:
        OSError: the system does not let one look.
    """
    place = absolute(place)
    there = next(p for p in (place, *place.parents) if os.path.lexists(p))
    if not there.exists():
        return f"{there} is a symbolic link that leads nowhere"
    if not there.is_dir():
        return f"{there} is not a folder"
    if hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY:
        return f"{there} is on a file system that is read-only"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"no permission to write in {there}"
    if any(len(os.fsencode(name)) > LONGEST_NAME for name in place.relative_to(there).parts):
        return f"a name in it has more than {LONGEST_NAME} bytes"
    if shutil.disk_usage(there).total == 0:  # none of its own, as in memory; or of a system's values, such as /proc
        try:
            Path(tempfile.mkdtemp(prefix=".plait-", dir=there)).rmdir()
        except OSError:
            return f"{there} is on a file system that takes no new files"
    return None


def free_space(folder: Path) -> tuple[Path, int]:
    """Return the existing folder whose file system an output will be on, and the bytes that are free there."""
    place = next(p for p in (absolute(folder), *absolute(folder).parents) if p.exists())
    disk = shutil.disk_usage(place)
    return place, disk.free if disk.total else sys.maxsize  # one of no size does not say how much it takes


def check_space(out: Path, needed: int, *, what: str, on: Path | None = None, advice: str = "") -> None:
    """Refuse an output for which the disk has no space.

    Args:
        out: where it will be.
        needed: bytes still to be written.
        what: is written, such as "the model".
        on: an existing folder on the file system that takes the bytes; that of `out` when None.
        advice: ways to write fewer bytes, as the end of a sentence; none where there is none.

    Raises:
        OutputError: there is too little.
    """
    place, free = free_space(out if on is None else on)
    if free < needed:
        sizes = _size(needed), _size(free)
        if len({*sizes}) == 1:
            sizes = f"{needed} bytes", f"{free} bytes"
        ways = f"choose another place, or write fewer bytes ({advice})" if advice else "or choose another place"
        raise OutputError(f"{out}: {what} needs {sizes[0]}, {place} has {sizes[1]} free. Free some space, {ways}.")


def check_not_an_input(out: Path | None, inputs: Mapping[str, Path], *, command: str) -> None:
    """Refuse an output that would take the place of what the command reads.

    Args:
        out: the output; None for nowhere yet.
        inputs: what each is → its folder.
        command: as a noun, such as "merge".

    Raises:
        OutputError: `out` is one of the folders, holds one, or is in one.
    """
    if out is None:
        return
    place = Path(os.path.realpath(out))
    for what, folder in inputs.items():
        read = Path(os.path.realpath(folder))
        if place in (read, *read.parents) and out.exists():
            raise OutputError(f"{out} is an input of this {command} ({what}). Choose another output.")
        if read in place.parents:
            raise OutputError(f"{out} is in the folder of an input of this {command} ({what}). Choose another output.")


def _size(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"
