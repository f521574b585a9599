"""Tensors under other names and in other orientation: what a format's files are in PEFT's terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from plait.deferred import Tensor
from plait.tensorfiles.header import BITS, TensorInfo
from plait.tensorfiles.reader import DTYPES, TensorFile


class View(NamedTuple):
    """A tensor that is made of others when it is read."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    make: Callable[[], Tensor]


class TranslatedFile(TensorFile):
    """A file of tensors under other names and in other orientation.

    Args:
        path: of the file.
        views: name → how the tensor is made.
    """

    def __init__(self, path: Path, views: Mapping[str, View]) -> None:
        self.path = path
        self._views = dict(views)
        self.tensors = {name: TensorInfo(v.shape, v.dtype, _bytes(v)) for name, v in views.items()}

    def is_in_order(self, name: str) -> bool:
        """Return that its bytes cannot be copied."""
        return False

    def read(self, name: str) -> Tensor:
        """Return one tensor; errors as the file's own."""
        return self._views[name].make().reshape(self._views[name].shape).contiguous()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor along its first dimension."""
        return self.read(name)[start:stop]

    def values(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` values of a tensor from the value `first` on, flat."""
        return self.read(name).flatten()[first : first + count]


def _bytes(view: View) -> int:
    size = BITS[view.dtype] // 8 if view.dtype in DTYPES else 1
    return size * math.prod(view.shape)


def same(file: TensorFile, name: str) -> View:
    """Return a tensor as it is."""
    info = file.tensors[name]
    return View(info.shape, info.dtype, lambda: file.read(name))


def transposed(file: TensorFile, name: str) -> View:
    """Return a matrix as its transpose."""
    info = file.tensors[name]
    return View(info.shape[::-1], info.dtype, lambda: file.read(name).mT)
