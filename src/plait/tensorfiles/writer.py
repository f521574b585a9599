"""Safetensors files written piece by piece, so that a file may be larger than memory and its bytes depend on contents only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plait.deferred import Tensor, np, torch
from plait.tensorfiles.flushing import Flusher
from plait.tensorfiles.header import BITS
from plait.tensorfiles.reader import DTYPES, torch_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMES = {name: short for short, name in DTYPES.items()}


class TensorEntry(NamedTuple):
    """One tensor to come; its dtype is one of torch's, or the name of one: `float32`, which needs no torch."""

    name: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]

    @property
    def stored_dtype(self) -> str:
        """The dtype as the file names it: `F32`."""
        return _NAMES[str(self.dtype).removeprefix("torch.")]

    @property
    def nbytes(self) -> int:
        """Size of its values in the file."""
        return math.prod(self.shape) * BITS[self.stored_dtype] // 8


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
        for entry in sorted(entries, key=lambda e: (-BITS[e.stored_dtype], e.name)):
            if entry.name in header:
                raise AssertionError(f"{entry.name!r} is to be written twice")
            end = offset + entry.nbytes
            header[entry.name] = {"dtype": entry.stored_dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
            self._places[entry.name] = (offset, entry)
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._expected = self._left = offset
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes from the start of the file
        self._file = path.open("x+b", buffering=0)
        self._flusher = Flusher(self._file.fileno())
        try:
            self._put(struct.pack("<Q", len(text)) + text, 0)
            if offset and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, self._start + offset)  # a full disk is found now, not at the end
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, values: Tensor | NDArray[Any], *, row: int = 0) -> None:
        """Write a tensor, or some of its rows starting at `row`.

        Args:
            name: of the tensor.
            values: converted to the entry's dtype where they are torch's; numpy's have its size, and are written as they are.
            row: the first of them.
        """
        offset, entry = self._places[name]
        if not isinstance(values, np.ndarray):
            values = values.detach().to(torch_dtype(entry.stored_dtype)).contiguous()
            data = values.reshape(-1).view(torch.uint8).numpy() if values.numel() else np.empty(0, np.uint8)
        else:
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        shape, whole = tuple(values.shape), entry.shape
        size = BITS[entry.stored_dtype] // 8
        if shape[1:] != whole[1:] or row + (shape or (1,))[0] > (whole or (1,))[0] or data.nbytes != math.prod(shape) * size:
            raise AssertionError(f"{name!r}: {shape} at row {row} does not fit {whole}")
        self._put(data.data, self._start + offset + row * math.prod(whole[1:]) * size)
        self._left -= data.nbytes

    def _put(self, data: bytes | memoryview, position: int) -> None:
        self._file.seek(position)
        view = memoryview(data)
        if position == self._hashed:  # what comes in the order of the file is hashed while it is in the cache
            self._hash.update(view)
            self._hashed += len(view)
        while view:
            view = view[self._file.write(view) :]
        self._flusher.wrote(len(data))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                if self._left:
                    raise AssertionError(f"{self._left} of {self._expected} bytes were never written")
                self._flusher.begin()
                self._file.seek(self._hashed)
                while piece := self._file.read(1 << 20):
                    self._hash.update(piece)
                self._flusher.finish()
                self.sha256 = self._hash.hexdigest()
        finally:
            self._flusher.close()
            self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    with TensorWriter(path, [TensorEntry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
