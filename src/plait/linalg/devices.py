"""Which devices torch can compute on here."""

from __future__ import annotations

from plait.deferred import torch


def device_problem(name: str) -> str | None:
    """Return why nothing can be computed on a device, in a few words without a full stop; None where it can.

    Args:
        name: as torch takes it (`cpu`, `cuda:0`).
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return " ".join(str(error).split())[:200].rstrip(".")
    return "it holds no values" if device.type == "meta" else None
