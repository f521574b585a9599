"""Merge adapters of Whisper that each write down one language, and count what the merge keeps of each.

Needs no Hub: the base model comes in a Python package, the sounds come with Debian (README.md says what to install).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from base_model import PackageMissingError, base_model
from sounds import tasks
from transformers.utils import logging

import plait

ADAPTERS = Path(__file__).parent / "adapters"
#: Column → what is merged how, with defaults: nothing was chosen on these sounds.
METHODS = {"`linear`": {"method": "linear"}, "`ties`": {"method": "ties"}, "`dc_merge`": {"method": "dc_merge"}}


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sounds", type=Path, default=Path("/"), help="under which Debian's packages are unpacked")
    parser.add_argument("--out", type=Path, default=Path("out/speech"), help="where answers and the page are kept")
    parser.add_argument("--prepare", action="store_true", help="only make the base model and the tasks, for `plait train`")
    options = parser.parse_args()
    logging.set_verbosity_error()
    started = time.perf_counter()
    try:
        base, files = base_model(), tasks(options.sounds)
    except (FileNotFoundError, PackageMissingError) as error:
        raise SystemExit(str(error)) from None
    print(f"base: {base}\ntasks: {', '.join(map(str, files.values()))}")
    if not options.prepare:
        _compare(base, files, options.out)
        print(f"{time.perf_counter() - started:.0f} seconds")


def _compare(base: Path, files: dict[str, Path], out: Path) -> None:
    """Print error rates and recoveries of all ways to merge; the last has learned from sounds without their transcripts."""
    adapters = {folder.name: str(folder) for folder in sorted(ADAPTERS.iterdir())}
    given = {"tasks": [files[name] for name in adapters], "base": base, "workspace": out, "batch_size": 64}
    found = {column: plait.evaluate(adapters, **given, **method) for column, method in METHODS.items()}
    tuned = plait.tune(
        adapters, tasks=given["tasks"], base_model=str(base), tune={"split": "validation"}, out=out / "tuned", force=True
    )
    found["`plait tune`, rank 8"] = plait.evaluate(tuned.folder, **given)
    print(f"\n| | base | own adapter | {' | '.join(found)} |\n|{'---|' * (3 + len(found))}")
    for i, first in enumerate(next(iter(found.values())).tasks):
        rates = [f"{first.base:.2f}", f"{first.single:.2f}", *(f"{one.tasks[i].merged:.2f}" for one in found.values())]
        print(f"| {first.task}, errors per word ({first.examples} prompts) | {' | '.join(rates)} |")
        print(f"| {first.task}, recovery | 0 | 1 | {' | '.join(_recovery(one.tasks[i]) for one in found.values())} |")
    print(f"| mean recovery | 0 | 1 | {' | '.join(_mean(one) for one in found.values())} |\n")


def _recovery(task: plait.TaskResult) -> str:
    low, high = task.recovery_interval
    return f"{task.recovery:.2f} ({low:.2f} – {high:.2f})"


def _mean(found: plait.Evaluation) -> str:
    low, high = found.mean_interval
    return f"{found.mean_recovery:.2f} ({low:.2f} – {high:.2f})"


if __name__ == "__main__":
    main()
