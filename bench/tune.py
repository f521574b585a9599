"""A step of `plait tune` compared with a step of PEFT, in one run: `python bench/tune.py [--quick] [--markdown]`.

SmolLM2-135M with the demo's three adapters and a random one, all linear layers, r 8 each: the merged factors have r 32, as has
PEFT's one LoRA. Both run forward and backward to their factors on the same batch, with the same loss. Variants take turns in
one process; the fastest of their turns counts. CPU time of all threads is compared, which other work changes least.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import report
from mixture import SCRIPT, SHAPE, adapters, base_model
from processes import HERE, run_job
from report import Row, Section

RESULTS = HERE / "results" / "tune.json"
VARIANTS = ["learned", "PEFT", "PEFT, the base's dtype"]
MOST_TIME, MOST_MEMORY = 1.2, 1.1


def run(cache: Path, rounds: int, raw: dict[str, Any]) -> list[Section]:
    """Measure everything."""
    common: dict[str, Any] = {"base": str(base_model()), "adapters": adapters(cache)}
    section = Section(
        "Forward + backward of the factors, r 32, on SmolLM2-135M", ("plait tune", "PEFT", "CPU time", "wall time")
    )
    for dtype in ("bfloat16", "float32"):
        title = f"{dtype}, {SHAPE[0]} × {SHAPE[1]} tokens"
        raw[title] = found = run_job(
            "times", script=SCRIPT, **common, dtype=dtype, shape=SHAPE, rounds=rounds, variants=VARIANTS
        )
        section.rows += [_time(title, found["learned"]["step"], found[v]["step"], v) for v in VARIANTS[1:]]
        peaks = {
            v: run_job("memory", script=SCRIPT, **common, dtype=dtype, shape=SHAPE, variant=v)["all"]["peak_rss"]
            for v in VARIANTS
        }
        raw[f"memory {dtype}"] = peaks
        section.rows += [_memory(dtype, peaks["learned"], peaks[v], v) for v in VARIANTS[1:]]
    return [section]


def _time(title: str, ours: dict[str, float], theirs: dict[str, float], variant: str) -> Row:
    ratio = ours["cpu"] / theirs["cpu"]
    cells = (
        f"{ours['cpu'] * 1e3:.0f} ms", f"{theirs['cpu'] * 1e3:.0f} ms", f"{ratio:.2f}×", f"{ours['wall'] / theirs['wall']:.2f}×"
    )  # fmt: skip
    return Row(f"{title}, {variant}", cells, f"≤ {MOST_TIME:.2f}×", ratio <= MOST_TIME)


def _memory(dtype: str, ours: float, theirs: float, variant: str) -> Row:
    cells = (f"{ours / 1e6:.0f} MB", f"{theirs / 1e6:.0f} MB", f"{ours / theirs:.2f}×", "")
    return Row(f"{dtype}, peak memory, model included, {variant}", cells, f"≤ {MOST_MEMORY:.2f}×", ours / theirs <= MOST_MEMORY)


if __name__ == "__main__":
    report.take_turns(__doc__, run, RESULTS)
