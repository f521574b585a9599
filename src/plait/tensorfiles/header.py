"""The header of a safetensors file, read by the rules of the format: what the safetensors library refuses is refused here.

The tensors follow each other from the end of the header to the end of the file, without a gap, and every byte belongs
to one tensor. The header is a JSON object in UTF-8; shapes and offsets are integers.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plait.errors import AdapterError
from plait.parsing import open_bytes, pointer_problem, shown

#: Bits of a value, by the name of its dtype.
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_LONGEST = 100_000_000  # bytes of a header: the limit of the format
_MOST_VALUES = 1 << 63  # of a shape, zeros aside: torch counts in 64 bits with a sign
_MOST_DIMENSIONS = 64  # numpy's limit
_ENTRY = {"dtype", "shape", "data_offsets"}
_MINUS_ZERO = re.compile(r"[\[,:\s]-0")
_FETCH_AGAIN = "Fetch the file again."


class TensorInfo(NamedTuple):
    """A tensor's entry in a header."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' names: F32, F16, BF16, …
    nbytes: int
    start: int = 0  # of its bytes in the file


class FileState(NamedTuple):
    """What a file is recognized by when it is opened again."""

    size: int
    changed: int  # in nanoseconds


class Header(NamedTuple):
    """A header that was checked against the format and the file's size."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    state: FileState


class _Invalid(ValueError):
    """What is wrong, as the end of a sentence."""


def state_of(handle: int) -> FileState:
    """Return the state of an open file."""
    found = os.fstat(handle)
    return FileState(found.st_size, found.st_mtime_ns)


def read_header(path: Path) -> Header:
    """Read and check the header of a file; nothing else of it is read.

    Raises:
        AdapterError: there is no such file, it is cut off, or it is not safetensors.
    """
    try:
        with open_bytes(path) as file:
            state = state_of(file.fileno())
            size = state.size
            lead = file.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
            if problem := pointer_problem(lead + file.read(64) if lead == b"version " else b""):
                raise AdapterError(f"{path}: {problem}")
            if not 2 <= length <= min(_LONGEST, max(0, size - 8)):
                raise AdapterError(
                    f"{path}: not a safetensors file, or cut off inside its header ({size} bytes). Fetch it again."
                )
            raw = file.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: it cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    try:
        header = _parsed(raw)
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = {name: _info(name, entry, 8 + length) for name, entry in header.items()}
    except _Invalid as error:
        raise AdapterError(f"{path}: the safetensors header is not valid: {error}. {_FETCH_AGAIN}") from None
    end = max((info.start + info.nbytes for info in tensors.values()), default=8 + length)
    if end > size:
        raise AdapterError(f"{path}: truncated: the header promises {end} bytes, the file has {size}. Fetch it again.")
    problem = _places(tensors, 8 + length, size)
    if problem:
        raise AdapterError(f"{path}: the safetensors header is not valid: {problem}. {_FETCH_AGAIN}")
    return Header(tensors, metadata, state)


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        header = json.loads(text)
        if not _is_plain(text, header):
            whole = _integer if _MINUS_ZERO.search(text) else None
            header = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_int=whole)
            "".join(header).encode()  # a surrogate by itself cannot be
    except UnicodeDecodeError as error:
        raise _Invalid(f"it is not text in UTF-8 (byte {8 + error.start})") from None
    except UnicodeEncodeError:
        raise _Invalid("a name holds half a character (a lone surrogate)") from None
    except RecursionError:
        raise _Invalid("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Invalid(f"it is not JSON ({error.msg}, byte {8 + error.pos})") from None
    except ValueError as error:
        raise error if isinstance(error, _Invalid) else _Invalid("a number has thousands of digits") from None
    if not isinstance(header, dict):
        raise _Invalid("it is not an object")
    return header


def _is_plain(text: str, header: Any) -> bool:
    """Return whether a header has no duplicate keys, escapes or unusual numbers, by a quick check of its text."""
    if not isinstance(header, dict):
        return True  # which is all that is wrong with it
    entries = len(header) - ("__metadata__" in header)
    counts = {text.count(word) for word in ('"dtype"', '"shape"', '"data_offsets"')}
    odd = "\\" in text or "NaN" in text or "Infinity" in text or _MINUS_ZERO.search(text) is not None
    return counts == {entries} and text.count('"__metadata__"') <= 1 and not odd


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Invalid(f"{shown(next(n for n in names if names.count(n) > 1))} is given twice")
    return found


def _no_constant(word: str) -> Any:
    raise _Invalid(f"it holds {word}")


def _integer(digits: str) -> int:
    if digits.startswith("-"):
        raise _Invalid(f"it holds the number {digits}")
    return int(digits)


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _Invalid("'__metadata__' is not a mapping of text to text")
    return found


def _info(name: str, entry: Any, data: int) -> TensorInfo:
    """Read one entry; `data` is where tensors begin. There may be a hundred thousand."""
    try:
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        bits = BITS[entry["dtype"]]
        whole = type(start) is type(end) is int and type(shape) is list and len(shape) <= _MOST_DIMENSIONS
        for length in shape if whole else ():
            whole = whole and type(length) is int and length >= 0
            bits *= length if whole else 0
        if whole and 0 <= start <= end and bits == (end - start) * 8 and (bits or is_countable(shape)):
            return TensorInfo(tuple(shape), entry["dtype"], end - start, data + start)
    except (KeyError, TypeError, ValueError):
        pass
    raise _Invalid(f"{shown(name)}: {_wrong_entry(entry)}")


def is_countable(shape: list[int]) -> bool:
    """Return whether torch can count the values of a shape, its zeros left out."""
    return math.prod(length or 1 for length in shape) < _MOST_VALUES


def _wrong_entry(entry: Any) -> str:
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
        return f"{shown(entry)} is not a mapping with dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"{shown(dtype)} is not a dtype of the format"
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not _are_counts(shape) or not is_countable(shape):
        return f"the shape is {shown(shape)}; it must hold integers from 0 up, with a product below 2^63"
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets) or offsets[0] > offsets[1]:
        return f"data_offsets is {shown(offsets)}; it must be [begin, end]"
    return f"{shown(shape)} of {dtype} does not fit its {shown(offsets[1] - offsets[0])} bytes"


def _are_counts(numbers: list[Any]) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _places(tensors: Mapping[str, TensorInfo], first: int, size: int) -> str | None:
    """Return what is wrong with the positions of tensors: they follow each other from the header to the end of the file."""
    here, before = first, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: item[1][3:1:-1]):
        if info.start > here:
            return f"{info.start - here} bytes between {before} and {shown(name)} belong to no tensor"
        if info.start < here:
            return f"{before} and {shown(name)} share bytes"
        here, before = here + info.nbytes, shown(name)
    return None if here == size else f"{size - here} bytes after {before} belong to no tensor"
