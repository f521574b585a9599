"""What plait knows of TRL's configurations beyond their documented use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def trusts_code(config: Any, model: Mapping[str, Any]) -> bool:
    """Return whether code beside the weights may be run; releases have it in `SFTConfig` or in `ModelConfig`.

    Args:
        config: an `SFTConfig`.
        model: values of a `ModelConfig`.
    """
    return bool(getattr(config, "trust_remote_code", False) or model.get("trust_remote_code", False))
