"""What a change in the mixer costs: `python bench/mixer.py [--quick] [--markdown]`.

The demo's three adapters of SmolLM2-135M (r 8), `ties` on dense deltas and in `core`, merged in memory one after another,
as `plait mix` merges them: they share what has not changed. Every turn begins anew with a first merge, and makes one change
after the other; the fastest of the turns counts, in CPU time of all threads and in wall time. Results go to
`bench/results/mixer.json` too.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
from processes import HERE
from report import Row, Section

RESULTS = HERE / "results" / "mixer.json"
DEMO = HERE.parent / "examples" / "demo" / "adapters"
BAND = {"policy": "per_layer", "layers": {str(layer): {"langid": 0.7} for layer in range(10)}}
CHANGES: dict[str, dict[str, Any]] = {
    "the first merge": {},
    "another scale": {"scale": 0.5},
    "another weight in ten of thirty layers": {"weights": BAND},
    "another weight": {"weights": {"langid": 0.5}},
    "another density": {"density": 0.4},
}


def run(_: Path, rounds: int, raw: dict[str, Any]) -> list[Section]:
    """Measure everything."""
    sections = []
    for space in ("delta", "core"):
        turns = [_turn(space) for _ in range(rounds)]
        raw[space] = turns
        section = Section(f"`ties`, space {space}, three adapters of r 8", ("CPU time", "wall time"))
        for change in CHANGES:
            cpu, wall = (min(turn[change][kind] for turn in turns) for kind in (0, 1))
            section.rows.append(Row(change, (f"{cpu:.2f} s", f"{wall:.2f} s")))
        sections.append(section)
    return sections


def _turn(space: str) -> dict[str, tuple[float, float]]:
    """Return the CPU and wall seconds of every change."""
    from plait.merging.inventory import take_inventory
    from plait.merging.kept import UNWEIGHTED_BYTES, KeptResults
    from plait.mixture.merged import merged_modules
    from plait.recipes.request import read_request

    adapters, kept, found = {p.name: p for p in sorted(DEMO.iterdir())}, KeptResults(unweighted=UNWEIGHTED_BYTES), {}
    for change, settings in CHANGES.items():
        recipe, _ = read_request(None, adapters, {"method": "ties", "space": space, **settings})
        inventory = replace(take_inventory(recipe), kept=kept)
        cpu, wall = sum(os.times()[:2]), time.perf_counter()
        merged_modules(inventory)
        found[change] = (sum(os.times()[:2]) - cpu, time.perf_counter() - wall)
    return found


if __name__ == "__main__":
    report.take_turns(__doc__, run, RESULTS, rounds=3)
