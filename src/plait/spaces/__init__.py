"""The coordinates in which a merge happens: `delta`, `factors`, `knots`, `core`.

A space turns the deltas of one target module into a stack of arrays of one shape (a `Frame`), one per adapter, and lifts one
array of that shape back to a delta. It is independent of methods, names or files.
"""

from plait.spaces.base import Frame, Space
from plait.spaces.core import CORE
from plait.spaces.delta import DELTA
from plait.spaces.factors import FACTORS
from plait.spaces.knots import KNOTS

SPACES: dict[str, Space] = {space.name: space for space in (DELTA, CORE, KNOTS, FACTORS)}

__all__ = ["CORE", "DELTA", "FACTORS", "KNOTS", "SPACES", "Frame", "Space"]
