"""Tensors on disk: headers first, contents one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import AdapterError
from plait.tensorfiles.header import TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class TensorFile:
    """A file of tensors, each at its place in it.

    Attributes:
        path: of the file.
        tensors: name → shape, dtype and place.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Its bytes are read into memory of their own: opening the file through safetensors parses the whole header again for
        every tensor, and mapping it keeps pages of the file resident.
        """
        shape = self.tensors[name].shape
        return self._values(name, self.tensors[name].start, self.tensors[name].nbytes).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension."""
        info = self.tensors[name]
        row = info.nbytes // max(1, info.shape[0])
        return self._values(name, info.start + start * row, (stop - start) * row).reshape(stop - start, *info.shape[1:])

    def _values(self, name: str, place: int, nbytes: int) -> Tensor:
        import torch

        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise AdapterError(f"{self.path}: {name!r} is stored as {info.dtype}; plait reads {', '.join(DTYPES)}.")
        data = torch.empty(nbytes, dtype=torch.uint8)
        left = memoryview(data.numpy())  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:  # straight into place, through no buffer
            file.seek(place)
            while left:
                count = file.readinto(left)
                if not count:
                    raise AdapterError(
                        f"{self.path}: {name!r} cannot be read to its end. Did the file change while it was read?"
                    )
                left = left[count:]
        return data.view(getattr(torch, DTYPES[info.dtype]))


class SafetensorsFile(TensorFile):
    """A safetensors file whose header was read and checked, against the format and the file's size (`header.py`).

    Attributes:
        metadata: of the header.

    Raises:
        AdapterError: there is no such file, or it is damaged, cut off, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.tensors = header.tensors
        self.metadata = header.metadata
