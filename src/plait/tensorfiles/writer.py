"""Safetensors files written piece by piece, so that a file may be larger than memory and its bytes depend on contents only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from plait.deferred import Tensor, torch
from plait.tensorfiles.reader import DTYPES

_NAMES = {f"torch.{name}": short for short, name in DTYPES.items()}


class TensorEntry(NamedTuple):
    """One tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorWriter:
    """A safetensors file whose header is known and whose tensors arrive in any order, at once or by rows.

    Args:
        path: of the new file; it must not exist.
        entries: all tensors of the file.
        metadata: of the header; `format: pt` is always there.

    Use as a context manager; leaving it checks that every byte was written and flushes to disk.

    Attributes:
        sha256: hex digest of the complete file, once it is left.
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._places: dict[str, tuple[int, TensorEntry]] = {}
        offset = 0
        # Larger item sizes first keeps every tensor aligned, as safetensors itself orders them.
        for entry in sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name)):
            if entry.name in header:
                raise AssertionError(f"{entry.name!r} is to be written twice")
            size = entry.dtype.itemsize * math.prod(entry.shape)
            header[entry.name] = {
                "dtype": _NAMES[str(entry.dtype)],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + size],
            }
            self._places[entry.name] = (offset, entry)
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._expected = self._left = offset
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes from the start of the file
        self._file = path.open("x+b", buffering=0)
        try:
            self._put(struct.pack("<Q", len(text)) + text, 0)
            if offset and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, self._start + offset)  # a full disk is found now, not at the end
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor, *, row: int = 0) -> None:
        """Write a tensor, or some of its rows starting at `row`; converts to the entry's dtype."""
        offset, entry = self._places[name]
        data = tensor.detach().to(entry.dtype).contiguous()
        if tuple(data.shape[1:]) != entry.shape[1:] or row + (len(data) if data.ndim else 1) > (entry.shape or (1,))[0]:
            raise AssertionError(f"{name!r}: {tuple(data.shape)} at row {row} does not fit {entry.shape}")
        start = row * math.prod(entry.shape[1:]) * entry.dtype.itemsize
        payload = memoryview(data.reshape(-1).view(torch.uint8).numpy().data) if data.numel() else memoryview(b"")
        self._put(payload, self._start + offset + start)
        self._left -= len(payload)

    def _put(self, data: bytes | memoryview, position: int) -> None:
        self._file.seek(position)
        view = memoryview(data)
        if position == self._hashed:  # what comes in the order of the file is hashed while it is in the cache
            self._hash.update(view)
            self._hashed += len(view)
        while view:
            view = view[self._file.write(view) :]

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                if self._left:
                    raise AssertionError(f"{self._left} of {self._expected} bytes were never written")
                os.fsync(self._file.fileno())
                self._file.seek(self._hashed)
                while piece := self._file.read(1 << 20):
                    self._hash.update(piece)
                self.sha256 = self._hash.hexdigest()
        finally:
            self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    with TensorWriter(path, [TensorEntry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
