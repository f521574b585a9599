"""How fast the processor multiplies matrices of one dtype compared with another: measured, since flags do not show it."""

from __future__ import annotations

import time
from functools import cache

from plait.deferred import torch

_ROWS, _WIDTH = 128, 1024  # of the matrices that are tried: as a batch of short texts in a small model
_TRIES = 3


@cache
def slowness(dtype: torch.dtype) -> float:
    """Return how many times the processor's time of a float32 product one of a narrower dtype takes.

    Below 1 where the processor has instructions for the dtype (bfloat16 with AMX or AVX-512 BF16), 4 to 40 where it has none.
    Counted is time on the processor, so that other work on the machine does not count. Takes a twentieth of a second or so.
    """
    return _seconds(dtype) / max(_seconds(torch.float32), 1e-9)


def fast_dtype() -> torch.dtype:
    """Return the dtype in which the processor computes faster with weights in bfloat16: that, or float32."""
    return torch.bfloat16 if slowness(torch.bfloat16) < 1 else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(2 * _WIDTH, _WIDTH, dtype=dtype)
    torch.nn.functional.linear(x, weight)  # what is made once, at the first product, does not count
    return min(_one(x, weight) for _ in range(_TRIES))


def _one(x: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.process_time()
    torch.nn.functional.linear(x, weight)
    return time.process_time() - started
