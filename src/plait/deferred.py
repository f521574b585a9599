"""torch and numpy, imported when they are first used: plans, schemas and lists use neither.

`from plait.deferred import Tensor, torch` replaces `import torch`, which takes a second, and `from plait.deferred import np`
replaces `import numpy as np`; `Tensor` is for annotations alone. What defines layers of a model or autograd functions
(`mixture`, `tuning`) needs torch as soon as it is imported, and imports it itself.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "np", "torch"]


def import_torch() -> ModuleType:
    """Import it without collections, which take a tenth of the time and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _existing_folder():
            import torch
    finally:
        if was_enabled:
            gc.enable()
    return torch


@contextmanager
def _existing_folder() -> Iterator[None]:
    """Work in the root folder where the working directory is gone: torch, imported there, ends the process as it computes."""
    try:
        Path.cwd()
    except FileNotFoundError:
        handle = os.open(".", os.O_RDONLY)
        os.chdir("/")
        try:
            yield
        finally:
            os.fchdir(handle)
            os.close(handle)
    else:
        yield


def _import_numpy() -> ModuleType:
    import numpy

    return numpy


if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    Tensor = Any

    class _Deferred:
        def __init__(self, imported: Callable[[], ModuleType]) -> None:
            self._imported = imported

        def __getattr__(self, name: str) -> Any:
            module = self._imported()
            self.__dict__ = vars(module)  # from now on its names are looked up as in the module itself
            return getattr(module, name)

    np, torch = _Deferred(_import_numpy), _Deferred(import_torch)
