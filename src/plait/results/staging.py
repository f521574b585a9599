"""Output folders: what may be written and replaced, and a folder that appears complete or not at all.

A folder is made next to its final name and renamed. Where that cannot be, as the final name is a mount point (a container's
volume), the working directory, or in a folder that may not be written, it is made inside it, and its files are moved up, the
lock last; what belongs to plait is noted meanwhile, so that a killed process leaves nothing that the next one would not clear
away, and an old result comes back.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from plait.errors import AdapterError, AddressError, OutputError, PlaitError, collect, listed
from plait.folders import absolute, entries, file_in, file_name_problem
from plait.notices import announce, note_completed, noting_completed
from plait.results.disk import write_failure, writing_problem
from plait.results.lock import LOCK, read_lock
from plait.results.locking import has_locks

# in a folder that is filled in place
_STAGING, _MARK, _BAKING = ".plait-staging", ".plait-writing", ".plait-baking"
_CALIBRATING, _TUNING = ".plait-calibrating", ".plait-tuning"
_NOT_WORK = (".cache/huggingface/", ".gitattributes", ".DS_Store", "lost+found")  # left by tools and file systems
_LONGEST = 150  # bytes of an output's name that the names of its working folders repeat
_SHOWN = 6
_MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def checking_output(out: Path | None, *, force: bool) -> Iterator[None]:
    """Refuse an output that cannot be written, together with whatever else is found wrong inside the block.

    Args:
        out: where something is to be written; None for nowhere yet.
        force: replace what is there, where that is allowed.

    Raises:
        OutputError: it cannot be written.
        PlaitError: something else is wrong; both are reported where both are.
    """
    problem = None if out is None else output_problem(out, force=force)
    try:
        yield
    except PlaitError as error:
        if problem:
            collect(type(error), [str(error), problem], "nothing was done")
        raise
    if problem:
        raise OutputError(problem)


def output_problem(folder: Path, *, force: bool) -> str | None:
    """Return why a folder must not be written, before any work is done."""
    if problem := place_problem(folder):
        return problem
    try:
        if problem := kind_problem(folder) or _taken(folder, force=force):
            return problem
        if problem := writing_problem(_working_folder(folder) if folder.exists() else folder):
            return f"{folder} cannot be written: {problem}. Choose another output."
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}."
    return None


def place_problem(place: Path) -> str | None:
    """Return why nothing can be written at a path, whatever is there: how it is spelled, or that no result belongs there."""
    if "\0" in str(place):
        return f"{str(place)!r} holds a NUL character. Choose another output."
    if str(place).startswith("~"):
        return f"{place}: '~' is not expanded here. Write the complete path, such as {Path.home() / 'merged'}."
    try:
        whole = absolute(place)
    except AddressError as error:  # of the working directory
        return str(error)
    if os.path.realpath(whole) == whole.anchor:
        return f"{place} is the root of the file system. Choose another output."
    try:
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{place} cannot be written: {error.strerror or error}. Choose another output."
    return None


def kind_problem(place: Path, what: str = "output") -> str | None:
    """Return why what is at a path is not a folder that may be replaced by another; None where it is, or nothing is there.

    Args:
        place: where a result is to be.
        what: it is called.
    """
    if not place.is_symlink():
        return f"{place} exists and is not a folder. Choose another {what}." if place.exists() and not place.is_dir() else None
    target = os.path.realpath(place)
    if place.is_dir():
        return f"{place} is a symbolic link, and a result takes the place of what is there: give the folder itself, {target}."
    there = "which is not a folder" if place.exists() else "where nothing is"
    return f"{place} is a symbolic link to {target}, {there}. Choose another {what}."


def _taken(folder: Path, *, force: bool) -> str | None:
    """Return why what is in a folder must not be replaced."""
    if not folder.exists():
        return None
    own = set[str]().union(*_unfinished(folder))
    if all(name in own for name in _contents(folder)):
        return None
    if not force:
        return f"{folder} exists already. Choose another output, or replace it with --force (force=True)."
    if not own and not os.path.lexists(folder / LOCK):
        return (
            f"{folder} was not written by plait (it has no {LOCK}); --force replaces only what was. It holds "
            f"{listed(sorted(repr(p.name) for p in folder.iterdir()), _SHOWN)}. Choose another output."
        )
    if os.path.lexists(folder / LOCK):
        try:
            own |= read_lock(folder).files
        except AdapterError as error:
            return f"{folder} is not replaced, since what plait wrote there is not known: {error} Or choose another output."
    others = [name for name in _contents(folder) if name not in own]
    if not others:
        return None
    return (
        f"{folder} also holds what plait did not write: {listed(map(repr, sorted(others)), _SHOWN)}. --force would "
        "delete it. Move it away, or choose another output."
    )


@contextmanager
def staged(folder: Path, *, force: bool) -> Iterator[Path]:
    """Offer a new folder; make it `folder` when the block ends well, remove it otherwise.

    A killed process leaves its staging folder behind, never a half-written `folder`; the next one with this output removes it.

    Args:
        folder: the final name.
        force: replace a result of plait that is there.

    Raises:
        OutputError: it cannot be written (permissions, a full disk), or exists already.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow links)
    problem = output_problem(folder, force=force)
    if problem:
        raise OutputError(problem)
    try:
        above = _working_folder(folder)
        above.mkdir(parents=True, exist_ok=True)
        recover(folder, force=force)
        place = _own(above / _stem(folder, "staging"))
        place.mkdir()
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from None
    try:
        with held(place), noting_completed() as completed:
            yield place
            publish(place, folder, force=force)
    except OSError as error:
        left = "What was there is as it was." if os.path.lexists(folder / LOCK) else "Nothing was left there."
        if failure := write_failure(error, folder, place, left=left):
            raise failure from error
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and folder not in completed:  # stopped by its user
            error.add_note(f"{folder} {'is as it was before' if folder.exists() else 'was not written'}.")
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """Offer a temporary folder, gone when the block ends; what killed processes left of the same purpose goes first."""
    found = re.compile(rf"plait-{purpose}-(\d+)-\w+")
    for stale in Path(tempfile.gettempdir()).glob(f"plait-{purpose}-*"):
        with suppress(OSError):
            name = found.fullmatch(stale.name)
            own = not stale.is_symlink() and stale.stat().st_uid == os.getuid() if hasattr(os, "getuid") else False
            if name and own and _is_abandoned(stale, int(name[1])):
                shutil.rmtree(stale, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=f"plait-{purpose}-{os.getpid()}-"))
    try:
        with held(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def publish(place: Path, folder: Path, *, force: bool) -> None:
    """Flush a finished folder and give it its final name; with `force`, in the place of what is there.

    Raises:
        OutputError: another process has written there in the meantime, and nothing may be replaced.
    """
    _flush(place)
    try:
        if place.is_relative_to(folder) or _is_fixed(folder):
            _fill(place, folder, force=force)
        else:
            _swap(place, folder, force=force)
    finally:
        if not any(entries(place)):  # also where a signal came when it had its name
            note_completed(folder)


def baking_folder(folder: Path) -> Path:
    """Return where a model is baked that will be in `folder`: next to it, or in it where it cannot be replaced as a whole."""
    return _working_folder(folder) / _stem(folder, "baking")


def calibrating_folder(folder: Path) -> Path:
    """Return where moments are collected that will be in `folder`."""
    return _working_folder(folder) / _stem(folder, "calibrating")


def tuning_folder(folder: Path) -> Path:
    """Return where a tuning keeps its state whose result will be in `folder`; next to it or in it likewise."""
    return _working_folder(folder) / _stem(folder, "tuning")


def _working_folder(folder: Path) -> Path:
    """Return where a result is made before it has its name."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would follow links)
    return folder if _is_fixed(folder) else folder.parent


def _stem(folder: Path, purpose: str) -> str:
    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    if _is_fixed(folder):
        return {"staging": _STAGING, "baking": _BAKING, "calibrating": _CALIBRATING, "tuning": _TUNING}[purpose]
    raw = os.fsencode(folder.name)
    name = folder.name if len(raw) <= _LONGEST else hashlib.sha256(raw).hexdigest()[:24]
    return f".{name}.{purpose}"


def _is_fixed(folder: Path) -> bool:
    """Return whether a folder exists and cannot, or should not, be exchanged for another one."""
    if not folder.is_dir():
        return False
    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    with suppress(OSError):  # the working directory may be gone
        here = Path.cwd()
        if folder in (here, *here.parents):
            return True
    return folder.is_mount() or str(folder.resolve()) in _mounts() or not os.access(folder.parent, os.W_OK | os.X_OK)


def _mounts() -> set[str]:
    """Return the system's mount points, those of folders of one file system on another of its folders included."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split(" ")[4]) for line in lines if line.count(" ") > 4}


def _contents(folder: Path) -> Iterator[str]:
    """Yield what is in a folder, but for what plait works with and what tools and file systems leave everywhere."""
    working = (_MARK, _STAGING, _BAKING, _CALIBRATING, _TUNING)
    return (n for n in entries(folder) if not n.startswith(working) and not n.startswith(_NOT_WORK))


class _Names(NamedTuple):
    """Names of files: of the result that a folder is filled with, and of the one that was there."""

    new: set[str]
    old: set[str]


def _unfinished(folder: Path) -> _Names:
    """Return what a killed process was about to write and to remove where the folder is; what has a lock is finished."""
    if os.path.lexists(folder / LOCK):
        return _Names(set(), set())
    try:
        noted = json.loads(file_in(folder, _MARK).read_text(encoding="utf-8"))
        return _Names(*({n for n in noted[what] if not file_name_problem(n)} for what in _Names._fields))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _Names(set(), set())


def recover(folder: Path, *, force: bool) -> None:
    """Remove what killed processes left of the same output; the old result comes back that one was replacing.

    Raises:
        OutputError: that one must not be replaced.
        OSError: the system refuses it.
    """
    restored = False
    for above, stem in {(_working_folder(folder), _stem(folder, "staging")), (folder, _STAGING), (folder, _MARK)}:
        for stale in above.glob(f"{glob.escape(stem)}-*"):
            found = re.fullmatch(r"-(\d+)-[0-9a-f]+(\.old)?", stale.name.removeprefix(stem))
            if found is None or not _is_abandoned(stale, int(found[1])):
                continue
            if found[2] and os.path.lexists(stale / LOCK) and not os.path.lexists(folder / LOCK):
                if above == folder:
                    _take_out(stale, folder, _unfinished(folder))
                else:
                    stale.rename(folder)
                restored = True
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)
    if os.path.lexists(folder / LOCK):  # killed when that was complete
        (folder / _MARK).unlink(missing_ok=True)
    if restored and (problem := output_problem(folder, force=force)):
        raise OutputError(problem)


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Lock a folder while it is worked in, so that no process removes it, whatever it can see of this one's number.

    Raises:
        BlockingIOError: another process holds it.
    """
    handle = _locked(place)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _is_abandoned(place: Path, pid: int) -> bool:
    """Return whether the process that worked in a folder is gone, here and in other containers that share the folder."""
    if _alive(pid):
        return False
    try:
        handle = _locked(place)
    except BlockingIOError:
        return False
    if handle is not None:
        os.close(handle)
    return True


def _locked(place: Path) -> int | None:
    """Return a handle that holds a folder's lock; None where the system has none.

    Raises:
        BlockingIOError: another process holds it.
    """
    if not has_locks():
        return None
    import fcntl

    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        announce(
            f"{place.parent} is on a file system without locks ({error.strerror or error}): let no two processes of plait "
            "write there at the same time.",
            once="a file system without locks",
        )
        return None
    return handle


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 asks on POSIX only; elsewhere it would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _own(stem: Path) -> Path:
    """Return a name that begins like `stem` and tells whose it is, for when its process is gone."""
    return stem.with_name(f"{stem.name}-{os.getpid()}-{secrets.token_hex(3)}")


def _aside(stem: Path) -> Path:
    """Return where an old result waits until the new one has its place."""
    place = _own(stem)
    return place.with_name(f"{place.name}.old")


def _swap(place: Path, folder: Path, *, force: bool) -> None:
    """Rename; an old result is moved aside first, so that one of the two always has the name or is next to it.

    Raises:
        OutputError: another process has written there in the meantime, and nothing may be replaced.
    """
    aside = _aside(_working_folder(folder) / _stem(folder, "staging"))
    try:
        if force and folder.exists():
            if problem := _taken(folder, force=True):  # of another process, in the meantime
                raise OutputError(problem)
            folder.rename(aside)
        place.rename(folder)  # onto nothing, or onto an empty folder; the system refuses a full one
    except BaseException as error:  # a signal too, at any moment
        if aside.exists():
            _put_back(aside, folder)
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EBUSY, errno.EXDEV) and folder.is_dir():  # a mount point after all, or a layer of a container
            _fill(place, folder, force=force)
            return
        moved_away = error.errno == errno.ENOENT and place.is_dir() and folder.parent.is_dir()
        if moved_away or error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(_meanwhile(folder)) from None
        raise
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # not every file system can flush a folder
        _flush(folder.parent, deep=False)


def _put_back(aside: Path, folder: Path) -> None:
    """Give an old result its name again; where another process has put its own there, that one has replaced it.

    Raises:
        OutputError: the system refuses it.
    """
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            why = error.strerror or error
            raise OutputError(f"{folder} cannot be written ({why}). What was there is in {aside}. Rename that.") from error
        shutil.rmtree(aside, ignore_errors=True)


def _fill(place: Path, folder: Path, *, force: bool) -> None:
    """Move a finished folder's files into an existing one, in the place of an old result's.

    The old lock goes first and the new one comes last: what is under a lock is complete.

    Raises:
        OutputError: another process has written there in the meantime, and nothing may be replaced.
    """
    try:
        with held(folder):
            _fill_alone(place, folder, force=force)
    except BlockingIOError:
        raise OutputError(_meanwhile(folder)) from None


def _fill_alone(place: Path, folder: Path, *, force: bool) -> None:
    if _taken(folder, force=force):
        raise OutputError(_meanwhile(folder))
    names = _Names({*entries(place)}, {*_contents(folder)})
    aside = _aside(folder / _STAGING)
    try:
        _note(folder, names)
        for name in sorted(names.old, key=lambda n: n != LOCK):
            _move(folder / name, aside / name)
        _remove(folder, names.old)
        for name in sorted(names.new, key=lambda n: n == LOCK):
            _move(place / name, folder / name, draft=_own(folder / _MARK))
    except BaseException:  # a signal too, at any moment
        if any(entries(place)):
            _take_out(aside, folder, names)
        shutil.rmtree(aside, ignore_errors=True)
        (folder / _MARK).unlink(missing_ok=True)
        raise
    with suppress(OSError):
        _flush(folder, deep=False)
    (folder / _MARK).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)


def _take_out(aside: Path, folder: Path, names: _Names) -> None:
    """Take a half-written result out of a folder, and put the old one back, its lock last."""
    _remove(folder, {name for name in names.new if name not in names.old or (aside / name).exists()})
    for name in sorted(entries(aside), key=lambda n: n == LOCK):
        _move(aside / name, folder / name)
    (folder / _MARK).unlink(missing_ok=True)


def _meanwhile(folder: Path) -> str:
    return f"{folder} was written by another process in the meantime. Choose another output."


def _note(folder: Path, names: _Names) -> None:
    draft = _own(folder / _MARK)
    try:
        draft.write_text(json.dumps({what: sorted(found) for what, found in names._asdict().items()}), encoding="utf-8")
        draft.replace(folder / _MARK)
    finally:
        draft.unlink(missing_ok=True)


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, the lock first, and the folders that are empty then."""
    for name in sorted(names, key=lambda n: n != LOCK):
        (folder / name).unlink(missing_ok=True)
        for above in (folder / name).relative_to(folder).parents:
            with suppress(OSError):  # not empty
                if above.parts:
                    (folder / above).rmdir()


def _move(source: Path, target: Path, *, draft: Path | None = None) -> None:
    """Give a file another name; from another file system by way of `draft`, so that it is complete under that name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV or draft is None:
            raise
        shutil.copyfile(source, draft)
        _flush(draft, deep=False)
        draft.replace(target)
        source.unlink()


def _flush(folder: Path, *, deep: bool = True) -> None:
    targets = [p for p in folder.rglob("*") if p.is_file()] if deep else [folder]
    for path in targets:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            error.filename = str(path)  # the system does not say which
            raise
        finally:
            os.close(handle)
