"""Tensors on disk: headers first, contents one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plait.deferred import Tensor, np, torch
from plait.errors import AdapterError
from plait.linalg.scratch import Scratch
from plait.tensorfiles.header import BITS, FileState, TensorInfo, read_header, state_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
_ARRAYS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of one that files name."""
    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


class TensorFile:
    """A file of tensors, each at its place in it.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        tensors: name → shape, dtype and place.
        state: of the file when its header was read, and values are read of no other; None where they are not bytes of it.

    Raises:
        AdapterError: there is no such file, or it is not of the format.
    """

    suffix: ClassVar[str]  #: of a file's name
    adapter_name: ClassVar[str]  #: the file of an adapter
    model_name: ClassVar[str]  #: the only file of a base model; shards and index are named after it
    model_files: ClassVar[str]  #: shell pattern of all files of a base model's tensors

    path: Path
    tensors: Mapping[str, TensorInfo]
    state: FileState | None = None

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    def is_in_order(self, name: str) -> bool:
        """Return whether a tensor's values follow each other in the file, so that its bytes can be copied."""
        return True

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Its bytes are read into memory of their own: opening the file through safetensors parses the complete header again for
        every tensor, and mapping it keeps pages of the file resident.

        Raises:
            AdapterError: the file has changed or cannot be read, or a dtype that plait does not read.
        """
        info = self.tensors[name]
        return self._values(name, info.start, info.nbytes).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension; errors as `read`."""
        info = self.tensors[name]
        row = info.nbytes // max(1, info.shape[0])
        return self._values(name, info.start + start * row, (stop - start) * row).reshape(stop - start, *info.shape[1:])

    def values(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` values of a tensor from the value `first` on, flat; errors as `read`."""
        info = self.tensors[name]
        size = info.nbytes // max(1, math.prod(info.shape))
        return self._values(name, info.start + first * size, count * size)

    def fill(self, out: Tensor, name: str, first: int, scratch: Scratch) -> None:
        """Put the values of a tensor from the value `first` on into `out`, flat, which says how many, in its dtype.

        Args:
            out: of any dtype.
            name: of the tensor.
            first: value of it.
            scratch: memory in which bytes may be read; `read` is what it keeps there.

        Raises:
            AdapterError: as `read`.
        """
        out.copy_(self.values(name, first, len(out)))

    def is_zero(self, name: str) -> bool:
        """Return whether every value of a tensor of floats is 0; errors as `read`."""
        return not bool(self.read(name).any())

    def _values(self, name: str, position: int, nbytes: int) -> Tensor:
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise AdapterError(f"{self.path}: {name!r} is stored as {info.dtype}; plait reads {', '.join(DTYPES)}.")
        return read_bytes(self, name, position, nbytes).view(torch_dtype(info.dtype))


def read_bytes(opened: TensorFile, name: str, position: int, count: int) -> Tensor:
    """Return bytes of a file, uint8 (count,).

    Args:
        opened: the file.
        name: of the tensor there, for messages.
        position: of the first byte.
        count: of bytes.

    Raises:
        AdapterError: the file has changed since its header was read, or cannot be read.
    """
    data = torch.empty(count, dtype=torch.uint8)
    _fill(data.numpy().data, opened, name, position)
    return data


def _fill(data: bytearray | memoryview, opened: TensorFile, name: str, position: int) -> None:
    """Read bytes of a file from a position on; errors as `read_bytes`."""
    view, path = memoryview(data), opened.path
    try:
        with path.open("rb", buffering=0) as file:  # straight into place, through no buffer
            check_unchanged(file.fileno(), opened)
            file.seek(position)
            while view:
                done = file.readinto(view)
                if not done:
                    raise AdapterError(f"{path}: {name!r} ends early. Did the file change while it was read?")
                view = view[done:]
    except OSError as error:
        raise AdapterError(f"{path}: {name!r} cannot be read ({error.strerror or error}). Fetch the file again.") from None


def check_unchanged(handle: int, opened: TensorFile) -> None:
    """Make sure that a file, opened again, is the one whose header was read.

    Raises:
        AdapterError: it has been changed, or another file is in its place.
    """
    if state_of(handle) != opened.state:
        raise AdapterError(f"{opened.path}: the file was changed while it was read. Run the command again.")


class SafetensorsFile(TensorFile):
    """A safetensors file whose header was read and checked, against the format and the file's size (`header.py`).

    Attributes:
        metadata: of the header.

    Raises:
        AdapterError: there is no such file, or it is damaged, cut off, or not safetensors.
    """

    suffix = ".safetensors"
    adapter_name = "adapter_model.safetensors"
    model_name = "model.safetensors"
    model_files = "*.safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.tensors = header.tensors
        self.metadata = header.metadata
        self.state = header.state

    def fill(self, out: Tensor, name: str, first: int, scratch: Scratch) -> None:
        """Put values of a tensor into `out`, without new memory; see `TensorFile.fill`."""
        info = self.tensors[name]
        if not self.is_in_order(name) or info.dtype not in DTYPES:
            super().fill(out, name, first, scratch)
            return
        data = scratch.take("read", torch_dtype(info.dtype), len(out))
        _fill(data.view(torch.uint8).numpy().data, self, name, info.start + first * data.itemsize)
        out.copy_(data)

    def array(self, name: str) -> NDArray[Any]:
        """Return a tensor of floats as numpy has them, bfloat16 as its bits in uint16, without torch; errors as `read`."""
        info = self.tensors[name]
        data = np.empty(info.nbytes, dtype=np.uint8)
        _fill(data.data, self, name, info.start)
        return data.view(_ARRAYS[info.dtype]).reshape(info.shape)

    def is_zero(self, name: str) -> bool:
        """Return whether every value of a tensor of floats is 0, which needs no torch; errors as `read`."""
        if not self.is_in_order(name):
            return super().is_zero(name)
        info = self.tensors[name]
        size = BITS[info.dtype] // 8
        data = bytearray(info.nbytes)
        _fill(data, self, name, info.start)
        ends = data[size - 1 :: size]  # where the sign is
        data[size - 1 :: size] = bytes(len(ends))
        return not data.strip(b"\x00") and not ends.strip(b"\x00\x80")
