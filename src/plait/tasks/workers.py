"""A process that does what a file from elsewhere asks for, and that the system may end.

Its script imports nothing of plait before it has heard where that is. Requests are frames (length, pickle) on its stdin;
answers are frames (kind, length, bytes) on its stdout, the last of which is `.`.
"""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any


class EndedError(Exception):
    """The process ended during a request; the text says why."""


class Worker:
    """The process, and the way to it.

    Args:
        script: that it runs, from the folder of this file.
        purpose: what it does, for messages: `renders templates`.
        why: exit code → why it ended, where that is known; an exit code below 0 is that of a signal.

    Raises:
        EndedError: it cannot be started.
    """

    def __init__(self, script: str, purpose: str, why: Callable[[int], str | None]) -> None:
        self._purpose, self._known = purpose, why
        words = [sys.executable, "-P", str(Path(__file__).with_name(script))]
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise EndedError(f"the process that {purpose} cannot be started ({error.strerror or error})") from None
        with suppress(BrokenPipeError):  # the first request reports it
            self._send(list(sys.path))

    def request(self, what: Any) -> Generator[tuple[bytes, bytes], None, None]:
        """Return the frames that answer a request, the last of which is `.`; a caller that takes fewer ends the process.

        Raises:
            EndedError: the process ended.
        """
        finished = False
        try:
            self._send(what)
            while not finished:
                head = self._read(9)
                kind, body = head[:1], self._read(struct.unpack("<Q", head[1:])[0])
                finished = kind == b"."
                yield kind, body
        except (BrokenPipeError, EOFError):
            raise EndedError(self._why()) from None
        finally:
            if not finished:  # an answer that was not read must not be taken for that of the next request
                self.close()

    @property
    def is_open(self) -> bool:
        """Whether requests can be made."""
        return self._process.stdin is not None and not self._process.stdin.closed

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _why(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        known = None if code is None else self._known(code)
        return known or f"the process that {self._purpose} ended (code {code})"

    def _send(self, what: Any) -> None:
        body, pipe = pickle.dumps(what, protocol=5), self._process.stdin
        if pipe is None:
            raise AssertionError("Popen was given no pipe")
        pipe.write(struct.pack("<Q", len(body)))
        pipe.write(body)
        pipe.flush()

    def _read(self, count: int) -> bytes:
        pipe = self._process.stdout
        if pipe is None:
            raise AssertionError("Popen was given no pipe")
        found = pipe.read(count)
        if len(found) < count:
            raise EOFError
        return found
