"""Do adapters share their initial A? Looked for in a few modules, before a merge that solves for its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from plait.adapters.adapter import Adapter
from plait.inspection.comparison import COLLAPSED
from plait.inspection.geometry import row_overlaps

_MODULES = 3  # a shared seed shows in all of them


def shared_init_pairs(adapters: Sequence[Adapter], paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of adapters whose A span nearly the same space, by the measure of `plait inspect`.

    Reads the factors of three modules, the first, the middle and the last, and nothing else.

    Args:
        adapters: at least one.
        paths: of the target modules, at least one.
    """
    found: dict[tuple[int, int], list[bool]] = defaultdict(list)
    for path in dict.fromkeys(paths[i * (len(paths) - 1) // (_MODULES - 1)] for i in range(_MODULES)):
        for overlap in row_overlaps(adapters, path):
            found[overlap.pair].append(overlap.median > max(COLLAPSED, overlap.chance))
    return [
        (adapters[i].name, adapters[j].name)
        for (i, j), collapsed in sorted(found.items())
        if 2 * sum(collapsed) > len(collapsed)
    ]
