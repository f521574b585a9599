"""torch and numpy, imported when they are first used: plans, schemas and lists use neither.

`from plait.deferred import Tensor, torch` replaces `import torch`, which takes a second, and `from plait.deferred import np`
replaces `import numpy as np`; `Tensor` is for annotations alone. What defines layers of a model or autograd functions
(`mixture`, `tuning`) needs torch as soon as it is imported, and imports it itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Tensor", "collect_from_torch_on", "np", "torch"]

_WAITING = set[str]()  # "torch" while collections of garbage wait for its import


def collect_from_torch_on() -> None:
    """Have a process look for garbage from the import of torch on: before it nothing is made that is worth a look.

    Collections among what is imported take a tenth of the time of a command that computes nothing.
    """
    gc.disable()
    _WAITING.add("torch")


def _import_torch() -> ModuleType:
    """Import it without collections, which take a tenth of the time and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch
    finally:
        if _WAITING:
            _WAITING.clear()
            gc.freeze()
            was_enabled = True
        if was_enabled:
            gc.enable()
    return torch


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

    np, torch = _Deferred(_import_numpy), _Deferred(_import_torch)
