"""Tensors on disk: headers first, contents one at a time."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plait.adapters.header import TensorInfo, read_header
from plait.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class SafetensorsFile:
    """A safetensors file whose header was read and checked, against the format and the file's size (`header.py`).

    Attributes:
        path: of the file.
        tensors: name → what the header says of it.
        metadata: of the header.

    Raises:
        AdapterError: there is no such file, or it is damaged, cut off, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata

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
