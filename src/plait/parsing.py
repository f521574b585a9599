"""Text and JSON from outside, read under limits: whatever cannot be read is a refusal that names the file, and the place in it.

A file may be damaged, or made to do harm. So size and depth are bounded, numbers fit a float, names can be written as UTF-8,
and no key has two values. `plait.recipes.documents` reads YAML under the same limits, `plait.tensorfiles.header` safetensors.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import select
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from plait.errors import PlaitError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

#: What Git puts in the place of a file that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"
_GZIP = b"\x1f\x8b\x08"
#: Ends of names of files that are YAML or JSON: recipes, tasks, phases.
DOCUMENT_SUFFIXES = (".yaml", ".yml", ".json")
MAX_TEXT_BYTES = 64 << 20  # of a text that is read completely; the largest index of a model has 20 MB
_PATIENCE = 15  # seconds that the writer of a pipe may be silent
MOST_LEVELS = 100  # of lists and mappings in each other
MOST_BITS = 1023  # of an integer: it is still a float
_SHOWN = 60
_HEAD = 1 << 16  # bytes of a file whose kind is asked
_FIRST_KEY = re.compile(rb"""\s*(?:\{|["']?[A-Za-z_][\w-]*["']?\s*:(?:\s|$))""")

# What is looked at one by one, since a text without any of it is fine: numbers that no float holds, surrogates, NUL, constants.
_SUSPECT = re.compile(r"\d{309}|[eE]\+?\d{3}|\\u(?:[dD][89a-fA-F]|0000)|NaN|Infinity")


class _Unreadable(ValueError):
    """Why a text cannot be read; the sentence follows the file's name."""


def read_text(path: Path, error: type[PlaitError], *, advice: str = "", most: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file; a byte order mark at its beginning is dropped.

    Args:
        path: of a file, or of a pipe that its user named.
        error: what a refusal raises.
        advice: the last sentence of a refusal: what to do.
        most: bytes that it may have.

    Raises:
        PlaitError: (`error`) there is no such file, it cannot be read, is too large, or is not UTF-8.
    """
    try:
        data = _contents(path, most)
        if problem := _packed_problem(data):
            raise error(f"{path}: {problem}")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as found:
        raise error(f"{path}: this is not text in UTF-8 (byte {found.start}).{_then(advice)}") from None
    except OSError as found:
        if isinstance(found, PlaitError):
            raise
        raise error(f"{path}: {found.strerror or found}.{_then(advice)}") from None
    except ValueError as found:  # a path with NUL in it
        if isinstance(found, PlaitError):
            raise
        raise error(f"{str(path)!r}: {found}.{_then(advice)}") from None


def read_lines(path: Path, error: type[PlaitError], *, longest: int = MAX_TEXT_BYTES) -> Iterator[str]:
    """Yield the lines of a file with their ends, one at a time; a byte order mark at its beginning is dropped.

    Args:
        path: of a file.
        error: what a refusal raises.
        longest: bytes that a line may have.

    Raises:
        PlaitError: (`error`) there is no such file, it cannot be read, a line is too long or is not UTF-8.
    """
    start, number = 0, 1
    try:
        with open_bytes(path) as file:
            if problem := _packed_problem(file.peek(len(_POINTER))):
                raise error(f"{path}: {problem}")
            while line := file.readline(longest + 1):
                if len(line) > longest:
                    raise error(f"{path}:{number}: a line of more than {longest >> 20} MB, the limit for one.")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                start, number = start + len(line), number + 1
    except UnicodeDecodeError as found:
        raise error(f"{path}: this is not text in UTF-8 (byte {start + found.start}).") from None
    except OSError as found:
        if isinstance(found, PlaitError):
            raise
        raise error(f"{path}: {found.strerror or found}.") from None


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, without their ends; a separator that only Unicode has, such as U+2028, is part of a line."""
    return re.split("\r\n|\r|\n", text)


def is_document(path: Path) -> bool:
    """Return whether a file looks like YAML or JSON: a mapping whose first line has a key. One that cannot be read does not."""
    try:
        with open_bytes(path) as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    lines = [
        line for line in head.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip() and not line.lstrip().startswith(b"#")
    ]
    first = next((line for line in lines if not line.startswith((b"---", b"%"))), b"")
    return b"\0" not in head and bool(_FIRST_KEY.match(first))


def is_there(path: Path, error: type[PlaitError]) -> bool:
    """Return whether there is a file of this name; what is there and is not a file does not count as missing.

    Args:
        path: of a file that may be missing.
        error: what a refusal raises.

    Raises:
        PlaitError: (`error`) it is a folder, a pipe, a device, or a link that leads nowhere.
    """
    try:
        if path.is_file():
            return True
    except OSError as found:  # of a folder that may not be searched
        raise error(f"{path}: {found.strerror or found}.") from None
    if os.path.lexists(path):
        raise error(f"{path}: a folder, a pipe, a device or a link that leads nowhere, not a file. Put the file itself there.")
    return False


def open_bytes(path: Path) -> BufferedReader:
    """Open a file to be read, and nothing that one might wait for.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe or a device.
    """
    return opened(_handle(path), path)


def opened(handle: int, path: Path) -> BufferedReader:
    """Return an open regular file for reading; where that fails, then or later, the error names the file.

    Args:
        handle: of the file, closed where it cannot be read.
        path: of the file.

    Raises:
        OSError: it is a folder, a pipe or a device, or the system cannot say.
    """
    try:
        with _naming(path):
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "a folder, a pipe or a device, not a file")
            file = _NamedFile(handle, path)
    except BaseException:
        os.close(handle)
        raise
    return BufferedReader(file)


class _NamedFile(io.FileIO):
    """A file whose failures name it: the system does so for those of opening alone."""

    def __init__(self, handle: int, path: Path) -> None:
        super().__init__(handle)
        self._path = path

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        with _naming(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _naming(self._path):
            return super().readall() or b""

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        with _naming(self._path):
            return super().seek(position, whence)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _handle(path: Path) -> int:
    wanted = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # as far as the system has them
    return os.open(path, os.O_RDONLY | sum(getattr(os, name, 0) for name in wanted))


def _contents(path: Path, most: int) -> bytes:
    """Return the bytes of a file, or of a pipe that another process writes to (`<(command)` of a shell).

    Raises:
        OSError: it cannot be read, or has more bytes than `most`.
    """
    too_large = OSError(errno.EFBIG, f"larger than {most >> 20} MB, the limit for such a file")
    handle = _handle(path)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISFIFO(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open_bytes(path) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise too_large
            return file.read()
    with os.fdopen(handle, "rb", buffering=0) as pipe:
        data = bytearray()
        while (more := pipe.read(1 << 16)) != b"":  # at its end, or where there is no writer; None while the writer is silent
            if more is None and not select.select([pipe], [], [], _PATIENCE)[0]:
                raise TimeoutError(errno.ETIMEDOUT, f"nothing was written to this pipe for {_PATIENCE} s")
            data += more or b""
            if len(data) > most:
                raise too_large
        return bytes(data)


def pointer_problem(head: bytes) -> str | None:
    """Report that a file begins as a Git LFS pointer does, and what to do; None where it does not.

    Args:
        head: 40 bytes or more.
    """
    if not head.startswith(_POINTER):
        return None
    return "a Git LFS pointer in place of the file itself. Fetch that: git lfs pull."


def _packed_problem(head: bytes) -> str | None:
    """Report that a file begins as no text does, but as what a text is packed into, or what Git puts in its place."""
    if head.startswith(_GZIP):
        return "this is packed by gzip. Unpack it: gunzip."
    return pointer_problem(head)


def read_json(path: Path, error: type[PlaitError], *, advice: str = "", constants: bool = False, nul: bool = False) -> Any:
    """Return what a JSON file holds; arguments as `read_text` and `parse_json` have them.

    Raises:
        PlaitError: (`error`) it cannot be read.
    """
    return parse_json(read_text(path, error, advice=advice), str(path), error, advice=advice, constants=constants, nul=nul)


def read_object(
    path: Path, error: type[PlaitError], *, advice: str = "", constants: bool = False, nul: bool = False
) -> dict[str, Any]:
    """Return the JSON object that a file holds; arguments as `read_text` and `parse_json` have them.

    Raises:
        PlaitError: (`error`) it cannot be read, or holds something else.
    """
    found = read_json(path, error, advice=advice, constants=constants, nul=nul)
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, found {kind_of(found)}.{_then(advice)}")
    return found


def read_record(kind: type[Model], path: Path, error: type[PlaitError], *, what: str, advice: str = "") -> Model:
    """Return a record that plait has written as JSON; texts of models in it may hold U+0000.

    Args:
        kind: of record.
        path: of the file.
        error: what a refusal raises.
        what: it should be, with its article: `a lock`.
        advice: the last sentence of a refusal.

    Raises:
        PlaitError: (`error`) it cannot be read, or is none.
    """
    return as_record(kind, read_json(path, error, advice=advice, nul=True), str(path), error, what=what, advice=advice)


def as_record(kind: type[Model], data: Any, source: str, error: type[PlaitError], *, what: str, advice: str = "") -> Model:
    """Return a record from plain data; arguments as `read_record` has them.

    Raises:
        PlaitError: (`error`) it is none; the first field that is wrong is named.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate(data)
    except ValidationError as found:
        first = found.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise error(f"{source}: not {what} that can be read ({place or 'the file'}: {first['msg']}).{_then(advice)}") from None


def parse_json(
    text: str,
    source: str,
    error: type[PlaitError],
    *,
    at: int | None = None,
    advice: str = "",
    constants: bool = False,
    nul: bool = False,
) -> Any:
    """Return what a JSON text holds.

    Args:
        text: JSON.
        source: the file that a refusal names.
        error: what a refusal raises.
        at: the line of the file that the text is; None where it is the complete file.
        advice: the last sentence of a refusal.
        constants: take NaN and Infinity, as Python's own JSON has them.
        nul: take texts with U+0000 in them, which no file's name may have.

    Raises:
        PlaitError: (`error`) it is not JSON, nested too deeply, holds a number too large for a float, half a character, or a
            key with two values.
    """
    place = source if at is None else f"{source}:{at}"
    try:
        found = json.loads(text, object_pairs_hook=_mapping)
        check_levels(found)
        if _SUSPECT.search(text):
            _look_through(found, constants=constants, nul=nul)
    except json.JSONDecodeError as wrong:
        raise error(
            f"{source}:{at or wrong.lineno}: this is not JSON: {wrong.msg} (column {wrong.colno}).{_then(advice)}"
        ) from None
    except RecursionError:
        raise error(f"{place}: nested too deeply, more than {MOST_LEVELS} levels.{_then(advice)}") from None
    except _Unreadable as wrong:
        raise error(f"{place}: {wrong}.{_then(advice)}") from None
    except ValueError:  # of int(): Python converts no more than 4,300 digits
        raise error(f"{place}: it holds a number of thousands of digits.{_then(advice)}") from None
    return found


def check_levels(value: Any) -> None:
    """Make sure that lists and mappings are not nested too deeply for whoever walks them by recursion.

    Raises:
        RecursionError: they are.
    """
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [v for v in level if isinstance(v, (dict, list))]
        if not level:
            return
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    raise RecursionError


def kind_of(value: object) -> str:
    """Return what a value of JSON is called."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: object) -> str:
    """Return a value as a message shows it: on one line, short."""
    try:
        text = repr(value if not isinstance(value, str) else value[: 2 * _SHOWN])
    except ValueError:  # Python converts no more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and seen[key] != value:
                raise _Unreadable(f"the key {shown(key)} is given twice, with different values")
            seen[key] = value
    return found


def _look_through(value: Any, *, constants: bool, nul: bool) -> None:
    for path, leaf in _leaves(value, ()):
        why = text_problem(leaf, nul=nul) if isinstance(leaf, str) else None if constants else _wrong_number(leaf)
        if type(leaf) is int and leaf.bit_length() > MOST_BITS:
            why = "an integer too large for a float"
        if why:
            raise _Unreadable(f"{shown('.'.join(map(str, path)))} is {why}" if path else why)


def text_problem(text: str, *, nul: bool = False) -> str | None:
    """Return what a text holds that no file can be named by, or that cannot be written; NUL may be allowed (`nul`)."""
    if "\0" in text and not nul:
        return "a text with the character NUL"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a text with half a character (a lone surrogate)"
    return None


def _wrong_number(value: Any) -> str | None:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"{value}, not a finite number"
    return None


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield keys, as texts at the place of their mapping, and scalars."""
    inside: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        yield from ((path, key) for key in value)
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    else:
        yield path, value
    for key, inner in inside:
        yield from _leaves(inner, (*path, key))


def _then(advice: str) -> str:
    return f" {advice}" if advice else ""
