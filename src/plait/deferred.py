"""torch, imported when it is first used: that takes a second, and plans, schemas and lists use none of it.

`from plait.deferred import Tensor, torch` replaces `import torch`; `Tensor` is for annotations alone. What defines layers of a
model or autograd functions (`mixture`, `tuning`) needs torch as soon as it is imported, and imports it itself.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:
    Tensor = Any

    class _Deferred:
        def __getattr__(self, name: str) -> Any:
            module = _import_torch()
            self.__dict__ = vars(module)  # from now on its names are looked up as in the module itself
            return getattr(module, name)

    torch = _Deferred()


def _import_torch() -> Any:
    """Import it without collections of garbage, which take a tenth of the time and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch
    finally:
        if was_enabled:
            gc.enable()
    return torch
