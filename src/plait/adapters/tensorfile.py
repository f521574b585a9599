"""Tensors on disk: headers first, contents one at a time."""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plait.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_MAX_HEADER = 100_000_000  # the limit of the safetensors format


class TensorInfo(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' names: F32, F16, BF16, …
    nbytes: int
    start: int = 0  # of its bytes in the file


class SafetensorsFile:
    """A safetensors file whose header was read and checked against the file's size.

    Raises:
        AdapterError: the file is truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = _read_header(path)

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Its bytes are read into memory of their own: opening the file through safetensors parses the whole header again for
        every tensor, and mapping it keeps pages of the file resident.
        """
        shape = self.tensors[name].shape
        return self._read(name, 0, self.tensors[name].nbytes).reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension."""
        info = self.tensors[name]
        row = info.nbytes // max(1, info.shape[0])
        return self._read(name, start * row, (stop - start) * row).reshape(stop - start, *info.shape[1:])

    def _read(self, name: str, offset: int, nbytes: int) -> Tensor:
        import torch

        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise AdapterError(f"{self.path}: {name!r} is stored as {info.dtype}; plait reads {', '.join(DTYPES)}.")
        data = torch.empty(nbytes, dtype=torch.uint8)
        left = memoryview(data.numpy())  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:  # straight into place, through no buffer
            file.seek(info.start + offset)
            while left:
                count = file.readinto(left)
                if not count:
                    raise AdapterError(
                        f"{self.path}: {name!r} cannot be read to its end. Did the file change while it was read?"
                    )
                left = left[count:]
        return data.view(getattr(torch, DTYPES[info.dtype]))


class PickleFile:
    """A legacy `.bin` file, read by torch with `weights_only`: tensors, never code.

    Raises:
        AdapterError: the file is broken, or unpickling it would run code.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about pickle protocols; what matters is raised
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise AdapterError(
                f"{path}: this pickle holds more than tensors ({str(error).splitlines()[0]}). plait never runs code from a "
                "file: load it where you trust it and save it as adapter_model.safetensors."
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise AdapterError(f"{path}: not a file that torch.load can read ({error}). Download or save it again.") from None
        if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
            raise AdapterError(f"{path}: expected a mapping of names to tensors, found {type(loaded).__name__}.")
        self._loaded: dict[str, Tensor] = loaded
        names = {getattr(torch, name): short for short, name in DTYPES.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            k: TensorInfo(tuple(v.shape), names.get(v.dtype, str(v.dtype)), v.nbytes) for k, v in loaded.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._loaded[name]


TensorFile = SafetensorsFile | PickleFile


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        lead = file.read(8)
        length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, max(0, size - 8)):
            raise AdapterError(f"{path}: not a safetensors file, or cut off inside its header ({size} bytes). Fetch it again.")
        try:
            header = json.loads(file.read(length))
            infos = {name: _info(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise AdapterError(f"{path}: the safetensors header is not valid. Fetch the file again.") from None
    end = max((info.start + info.nbytes for info in infos.values()), default=8 + length)
    if end != size:
        raise AdapterError(f"{path}: truncated: the header promises {end} bytes, the file has {size}. Fetch it again.")
    return infos


def _info(entry: Mapping[str, Any], data: int) -> TensorInfo:
    """Read one entry of a header; `data` is where tensors begin. A ValueError means that it contradicts itself."""
    shape, dtype, (start, end) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
    itemsize = _ITEMSIZE.get(dtype)
    if min((start, end - start, *shape)) < 0 or (itemsize is not None and math.prod(shape) * itemsize != end - start):
        raise ValueError(f"{shape} of {dtype} in {end - start} bytes")
    return TensorInfo(shape, dtype, end - start, data + start)
