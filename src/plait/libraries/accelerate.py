"""Uses of accelerate."""

from __future__ import annotations

#: Words for `device_map` by which accelerate spreads a model over devices; any other word is a device.
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
