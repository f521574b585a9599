"""What plait knows of PEFT's modules beyond their documented use."""

from __future__ import annotations

from typing import Any


def scalings(module: Any) -> dict[str, float] | None:
    """Return the scalings of a LoRA layer, adapter → s in s · B A, to be changed in place; None where it is no LoRA layer."""
    found = getattr(module, "scaling", None)
    return found if isinstance(found, dict) else None
