"""Tensors on disk: headers first, contents one at a time."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plait.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER = 100_000_000  # the limit of the safetensors format


class TensorInfo(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' names: F32, F16, BF16, …
    nbytes: int


class SafetensorsFile:
    """A safetensors file whose header was read and checked against the file's size.

    Raises:
        AdapterError: the file is truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = _read_header(path)

    def read(self, name: str) -> Tensor:
        """Return one tensor. The file is mapped for the length of the call, so memory holds what was asked for."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


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
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
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
            infos = {
                name: TensorInfo(tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise AdapterError(f"{path}: the safetensors header is not valid. Fetch the file again.") from None
    if 8 + length + end != size:
        raise AdapterError(
            f"{path}: truncated: the header promises {8 + length + end} bytes, the file has {size}. Fetch it again."
        )
    return infos
