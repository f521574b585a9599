"""What a system may fail at while a command runs: a file that is there, and cannot be opened, read or looked at, or changes
meanwhile; a disk that takes no more, or cannot flush. The files themselves are whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

#: Its reading fails with EIO, which no other file can be made to do.
_UNREADABLE = "/proc/self/mem"
_REFUSED = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)


@contextlib.contextmanager
def failing(chosen: random.Random, target: Path, out: Path | None) -> Iterator[tuple[str, Path]]:
    """Let the system fail in the block.

    Args:
        chosen: from which the failure is drawn.
        target: a file that is read.
        out: what the command writes, which may fail too; None where it writes nothing.

    Yields:
        What fails, and the file that a refusal must name.
    """
    kind = chosen.choice(["opened", "read", "looked at", "gone", "cut short", "longer", *(["full", "flush"] if out else [])])
    if kind == "full":
        most = chosen.choice([0, 100, 1000, 10_000])
        with _no_file_beyond(most):
            yield f"no file may have more than {most} bytes", out or target
    elif kind == "flush":
        with mock.patch("os.fsync", _raising(errno.EIO, "")):
            yield "nothing can be flushed", out or target
    else:
        number, times = chosen.choice(_REFUSED), chosen.choice([0, 0, 1, 2, 4])
        with _Watched(target, kind, number, times).watching():
            yield f"{kind} ({errno.errorcode[number]}), after {times} times", target


@contextlib.contextmanager
def _no_file_beyond(most: int) -> Iterator[None]:
    """A file that would be larger is EFBIG, whoever writes it: what a full disk is, but for its number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _raising(number: int, name: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), *([name] if name else []))

    return fail


class _Watched:
    """One file, and what happens to it once Python has opened it, or looked at it, so many times."""

    def __init__(self, file: Path, kind: str, number: int, times: int) -> None:
        self._place, self._kind, self._number, self._left = os.path.realpath(file), kind, number, times
        self._swapped: set[int] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        patched = {name: getattr(self, f"_{name}") for name in ("stat", "fstat", "open")}
        self._real = {name: getattr(os, name) for name in patched} | {"io": io.open}
        with contextlib.ExitStack() as stack:
            for name, function in patched.items():
                stack.enter_context(mock.patch(f"os.{name}", function))
            stack.enter_context(mock.patch("io.open", self._io_open))
            stack.enter_context(mock.patch("builtins.open", self._io_open))
            yield

    def _is_meant(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.realpath(os.fspath(path)) == self._place

    def _is_due(self, path: Any) -> bool:
        self._left -= self._is_meant(path)
        return self._is_meant(path) and self._left < 0

    def _stat(self, path: Any, **more: Any) -> os.stat_result:
        if self._kind == "looked at" and self._is_due(path):
            _raising(self._number, os.fspath(path))()
        return self._real["stat"](path, **more)

    def _fstat(self, handle: int) -> os.stat_result:
        """Return the file's own state where something else was opened in its place."""
        return self._real["stat"](self._place) if handle in self._swapped else self._real["fstat"](handle)

    def _open(self, path: Any, flags: int, *more: Any, **others: Any) -> int:
        if self._kind != "looked at" and not flags & (os.O_WRONLY | os.O_RDWR) and self._is_due(path):
            if self._kind == "read":
                handle: int = self._real["open"](_UNREADABLE, flags, *more, **others)
                self._swapped.add(handle)
                return handle
            self._change(path)
        handle = self._real["open"](path, flags, *more, **others)
        self._swapped.discard(handle)
        return handle

    def _io_open(self, path: Any, mode: str = "r", *more: Any, **others: Any) -> Any:
        if not self._is_meant(path) or set(mode) & set("wax+"):
            file = self._real["io"](path, mode, *more, **others)
            if not isinstance(path, int):
                self._swapped.discard(file.fileno())  # the number may have been that of one that is closed
            return file
        handle = self._open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._real["io"](handle, mode, *more, **others)

    def _change(self, path: Any) -> None:
        if self._kind == "opened":
            _raising(self._number, os.fspath(path))()
        size = self._real["stat"](self._place).st_size
        if self._kind == "gone":
            Path(self._place).unlink()
        elif self._kind == "cut short":
            os.truncate(self._place, size // 2)
        elif self._kind == "longer":
            with self._real["io"](self._place, "ab") as file:
                file.write(b"\n" * 64)
        self._left = 1 << 30
