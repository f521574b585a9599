"""The standard streams of a command, wherever they lead: closed, full, a pipe without a reader, a terminal without Unicode."""

from __future__ import annotations

import codecs
import errno
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ERRORS = "plait"
_PLAIN = {
    "γ": "gamma", "λ": "lambda", "Λ": "Lambda", "Δ": "delta ", "δ": "delta", "α": "alpha", "β": "beta",
    "τ": "tau", "θ": "theta",
    "σ": "sigma", "Σ": "sum ", "μ": "mu", "ε": "eps", "ρ": "rho", "η": "eta", "π": "pi", "ω": "omega", "κ": "kappa",
    "√": "sqrt ",
    "→": "->", "←": "<-", "↓": "v", "↑": "^", "↦": "->", "⇒": "=>", "–": "-", "—": "-", "−": "-", "‑": "-", "·": "*", "•": "*",
    "×": "x", "÷": "/", "⊙": "*", "⊗": "(x)", "…": "...", "‖": "||", "∥": "||", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~",
    "±": "+-", "∈": "in", "∑": "sum ", "∏": "prod ", "∞": "inf", "⟨": "<", "⟩": ">", "⟦": "[[", "⟧": "]]", "‘": "'", "’": "'",
    "“": '"', "”": '"', "█": "#", "▇": "#", "▆": "#", "▅": "=", "▄": "=", "▃": "-", "▂": "-", "▁": "_", "░": ".", "▒": ":",
    "▓": "#", "━": "-", "─": "-", "│": "|", "┃": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "┌": "+", "┐": "+", "└": "+",
    "┘": "+", "├": "+", "┤": "+", "ᵀ": "^T", "⁻": "^-", "′": "'",
}  # fmt: skip


class StreamError(Exception):
    """Standard output cannot be written.

    Attributes:
        reason: the system's.
    """

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason.strerror or str(reason))
        self.reason = reason


class Stream:
    """A text stream whose write errors become `StreamError`, or are dropped.

    Args:
        file: where text goes.
        is_quiet: drop what cannot be written instead of raising.
    """

    def __init__(self, file: Any, *, is_quiet: bool) -> None:
        self._file, self._is_quiet = file, is_quiet

    def write(self, text: str) -> int:
        """Write text.

        Raises:
            StreamError: it cannot be written.
        """
        try:
            return int(self._file.write(text))
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered.

        Raises:
            StreamError: it cannot be written.
        """
        try:
            self._file.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if not self._is_quiet:
            raise StreamError(error) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Make stdout and stderr fit to be written while the block runs: no character and no closed file is a traceback."""
    _open_closed()
    codecs.register_error(_ERRORS, _in_plain_letters)
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        out, err = (nowhere if stream is None else stream for stream in before)  # None: it was closed when Python began
        for stream in (out, err):
            reconfigure = getattr(stream, "reconfigure", None)  # a caller may have put something else in its place
            if reconfigure is not None:
                reconfigure(errors=_ERRORS)
        sys.stdout, sys.stderr = Stream(out, is_quiet=False), Stream(err, is_quiet=True)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def give_up_stdout(error: StreamError) -> int:
    """Close stdout, report what was lost, and return the exit code."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.reason.errno == errno.EPIPE:
        return 141  # as a command that a closed pipe ends (SIGPIPE)
    sys.stderr.write(
        f"error: the output cannot be written to stdout: {error}. Files and folders that the command wrote are complete.\n"
    )
    return 1


def _open_closed() -> None:
    """Open the null device where a standard stream is closed: the next file opened would be taken for it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """Return what replaces characters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    simpler = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return simpler or character.encode("ascii", "backslashreplace").decode()
