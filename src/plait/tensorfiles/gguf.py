"""GGUF files of plain tensors: header and values, read and written; of quantized tensors only the header is read.

A file is, in little-endian order: `GGUF`, version, counts of tensors and fields; the fields (name, type, value); per tensor its
name, dimensions from the fastest to the slowest, type and offset; then the values, each at a multiple of the alignment. Source:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.deferred import Tensor, torch
from plait.errors import AdapterError
from plait.parsing import open_bytes, shown
from plait.tensorfiles.header import BITS, TensorInfo, state_of
from plait.tensorfiles.reader import DTYPES, TensorFile, torch_dtype
from plait.tensorfiles.writer import TensorEntry

_MAGIC, _ALIGNMENT = b"GGUF", 32
_LONGEST_HEADER = 256 << 20  # bytes; that of a vocabulary of a million words is smaller
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY, _U32, _F32 = 8, 9, 4, 6
#: Number of a tensor's type → safetensors' name; all others are quantized.
_TYPES = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}


class GgufFile(TensorFile):
    """A GGUF file whose header was read and checked against the file's size.

    Attributes:
        fields: name → value.

    Raises:
        AdapterError: there is no such file, or it is damaged, cut off, or not GGUF.
    """

    suffix = ".gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_bytes(path) as file:
                self.state = state_of(file.fileno())
                data = file.read(min(self.state.size, _LONGEST_HEADER))
        except OSError as error:
            raise AdapterError(f"{path}: it cannot be read ({error.strerror or error}).") from None
        if data[:4] != _MAGIC:
            raise AdapterError(f"{path}: not a GGUF file. Fetch it again.")
        try:
            self.fields, self.tensors = _header(data, self.state.size)
        except _Unread as error:
            raise AdapterError(f"{path}: {error}.") from None
        except (struct.error, ValueError, KeyError, UnicodeDecodeError, OverflowError) as error:
            raise AdapterError(f"{path}: its header is damaged or cut off ({error}). Fetch it again.") from None


class _Unread(Exception):
    """A file is of a kind that is not read; the text says which."""


class _Cursor:
    """Values of a header, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        count = self.take("<Q")
        if count > len(self._data) - self.at:
            raise ValueError("a text is longer than the file")
        self.at += count
        return self._data[self.at - count : self.at].decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("<I"), self.take("<Q")
        if count > len(self._data) - self.at or depth > 3:
            raise ValueError("an array is longer than the file")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _header(data: bytes, size: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    cursor.at = len(_MAGIC)
    version = cursor.take("<I")
    if version not in (2, 3):
        big = int.from_bytes(
            version.to_bytes(4, "little"), "big"
        )  # the same four bytes as machines of the other order have them
        what = f"a big-endian GGUF file (version {big})" if big in (1, 2, 3) else f"a GGUF file of version {version}"
        raise _Unread(f"{what}; versions 2 and 3 are read, little-endian. Convert it again with a present llama.cpp")
    count, fields_count = cursor.take("<Q"), cursor.take("<Q")
    fields: dict[str, Any] = {}
    for _ in range(fields_count):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"the field {shown(name)} is there twice")
        fields[name] = cursor.value(cursor.take("<I"))
    found = []
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.take("<I")
        if dimensions > 4:
            raise ValueError(f"{shown(name)} has {dimensions} dimensions")
        shape = tuple(cursor.take("<Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, cursor.take("<I"), cursor.take("<Q")))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {shown(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        dtype = _TYPES.get(kind, f"quantized (type {kind})")
        nbytes = math.prod(shape) * (BITS[dtype] // 8) if dtype in DTYPES else 0
        if start + offset + nbytes > size or name in tensors:
            raise ValueError(f"{shown(name)} ends after the file, or is there twice")
        tensors[name] = TensorInfo(shape, dtype, nbytes, start + offset)
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start < end:
            raise ValueError(f"{shown(name)} shares bytes with another tensor")
        end = info.start + info.nbytes
    return fields, tensors


def write_gguf(
    path: Path,
    fields: Mapping[str, str | int | float],
    entries: Sequence[TensorEntry],
    tensors: Iterator[tuple[str, Tensor]],
) -> str:
    """Write a file.

    Args:
        path: of the new file.
        fields: its fields: texts, integers (u32) and numbers (f32).
        entries: all tensors of the file, of dtype float32, float16 or bfloat16.
        tensors: each of them, in any order.

    Returns:
        The sha256 of the file.
    """
    kinds = {name: number for number, name in _TYPES.items()}
    head = [_MAGIC, struct.pack("<IQQ", 3, len(entries), len(fields))]
    for key, value in fields.items():
        head += [_text(key), *_field(value)]
    places: dict[str, tuple[int, TensorEntry]] = {}
    offset = 0
    for entry in entries:
        head += [_text(entry.name), struct.pack("<I", len(entry.shape)), *(struct.pack("<Q", n) for n in entry.shape[::-1])]
        head.append(struct.pack("<IQ", kinds[entry.stored_dtype], offset))
        places[entry.name] = (offset, entry)
        offset += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    lead = b"".join(head)
    lead += bytes(-len(lead) % _ALIGNMENT)
    with path.open("x+b") as file:
        file.write(lead)
        file.truncate(len(lead) + offset)
        for name, tensor in tensors:
            at, entry = places.pop(name)
            data = tensor.detach().to(torch_dtype(entry.stored_dtype)).contiguous()
            if tuple(data.shape) != entry.shape:
                raise AssertionError(f"{name!r}: {tuple(data.shape)} does not fit {entry.shape}")
            file.seek(len(lead) + at)
            file.write(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        if places:
            raise AssertionError(f"{len(places)} tensors were never written, such as {next(iter(places))!r}")
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _field(value: str | float) -> tuple[bytes, bytes]:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT), _text(value)
    if isinstance(value, int):
        return struct.pack("<I", _U32), struct.pack("<I", value)
    return struct.pack("<I", _F32), struct.pack("<f", value)
