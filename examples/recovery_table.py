"""What the examples of images and of speech share: base, own adapters, merges and a tuned merge, side by side, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import plait


def print_recovery_table(
    adapters: Path, base: Path, tasks: Mapping[str, Path], out: Path, *, methods: Sequence[str], measure: str, examples: str
) -> None:
    """Print what every way to merge scores, with defaults; the last has learned from examples without their labels.

    Args:
        adapters: a folder of adapters, each called as its task.
        base: the base model.
        tasks: name → file.
        out: where answers and the tuned merge are kept.
        methods: the other ways.
        measure: what the tasks' metric is called in the table.
        examples: what an example is called there, in the plural.
    """
    folders = {folder.name: str(folder) for folder in sorted(adapters.iterdir())}
    given = {"tasks": [tasks[name] for name in folders], "base": base, "workspace": out, "batch_size": 64}
    found = {f"`{method}`": plait.evaluate(folders, **given, method=method) for method in methods}
    tuned = plait.tune(
        folders, tasks=given["tasks"], base_model=str(base), tune={"split": "validation"}, out=out / "tuned", force=True
    )
    found["`plait tune`, rank 8"] = plait.evaluate(tuned.folder, **given)
    print(f"\n| | base | own adapter | {' | '.join(found)} |\n|{'---|' * (3 + len(found))}")
    for i, first in enumerate(next(iter(found.values())).tasks):
        tried = [one.tasks[i] for one in found.values()]
        rates = [f"{first.base:.2f}", f"{first.single:.2f}", *(f"{task.merged:.2f}" for task in tried)]
        print(f"| {first.task}, {measure} ({first.examples} {examples}) | {' | '.join(rates)} |")
        kept = [_with_interval(task.recovery, task.recovery_interval) for task in tried]
        print(f"| {first.task}, recovery | 0 | 1 | {' | '.join(kept)} |")
    means = [_with_interval(one.mean_recovery, one.mean_interval) for one in found.values()]
    print(f"| mean recovery | 0 | 1 | {' | '.join(means)} |\n")


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} – {interval[1]:.2f})"
