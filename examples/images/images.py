"""Merge adapters of DINOv2 that each sort pictures of one kind, and count what the merge keeps of each.

Needs no Hub: the base model comes in a Python package, and so do pictures (README.md says what to install).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base_model import PackageMissingError, base_model
from pictures import tasks
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel
from transformers.utils import logging

import plait
from plait.hub.pretrained import load_image_processor

ADAPTERS = Path(__file__).parent / "adapters"
#: Columns, with defaults: nothing was chosen on these pictures. The last method reads some of training, without their labels.
METHODS = ("linear", "ties", "iso_cts", "regmean")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emoji", type=Path, default=Path("/"), help="under which Debian's packages are unpacked")
    parser.add_argument("--out", type=Path, default=Path("out/images"), help="where answers and the page are kept")
    parser.add_argument("--prepare", action="store_true", help="only make the base model and the tasks, for `plait train`")
    parser.add_argument("--heads", action="store_true", help="only train heads on the base as it is, to see what adapters add")
    options = parser.parse_args()
    logging.set_verbosity_error()
    started = time.perf_counter()
    try:
        base, files = base_model(), tasks(options.emoji)
    except (FileNotFoundError, PackageMissingError) as error:
        raise SystemExit(str(error)) from None
    print(f"base: {base}\ntasks: {', '.join(map(str, files.values()))}")
    if options.heads:
        for name, file in files.items():
            print(f"{name}: {_head_alone(base, file):.2f}")
    elif not options.prepare:
        _compare(base, files, options.out)
        print(f"{time.perf_counter() - started:.0f} seconds, {time.process_time():.0f} of processor time")


def _compare(base: Path, files: dict[str, Path], out: Path) -> None:
    """Print accuracies and recoveries of all ways to merge; the last has learned from pictures without their labels."""
    adapters = {folder.name: str(folder) for folder in sorted(ADAPTERS.iterdir())}
    given = {"tasks": [files[name] for name in adapters], "base": base, "workspace": out, "batch_size": 64}
    found = {f"`{method}`": plait.evaluate(adapters, **given, method=method) for method in METHODS}
    tuned = plait.tune(
        adapters, tasks=given["tasks"], base_model=str(base), tune={"split": "validation"}, out=out / "tuned", force=True
    )
    found["`plait tune`, rank 8"] = plait.evaluate(tuned.folder, **given)
    print(f"\n| | base | own adapter | {' | '.join(found)} |\n|{'---|' * (3 + len(found))}")
    for i, first in enumerate(next(iter(found.values())).tasks):
        rates = [f"{first.base:.2f}", f"{first.single:.2f}", *(f"{one.tasks[i].merged:.2f}" for one in found.values())]
        print(f"| {first.task}, accuracy ({first.examples} pictures) | {' | '.join(rates)} |")
        print(f"| {first.task}, recovery | 0 | 1 | {' | '.join(_recovery(one.tasks[i]) for one in found.values())} |")
    print(f"| mean recovery | 0 | 1 | {' | '.join(_mean(one) for one in found.values())} |\n")


@torch.no_grad()
def _head_alone(base: Path, file: Path) -> float:
    """Return the accuracy of a logistic regression on what the base, as it is, makes of a task's pictures."""
    model, prepare = AutoModel.from_pretrained(base).eval(), load_image_processor(base)
    seen: dict[str, tuple[list[np.ndarray[Any, Any]], list[str]]] = {"train": ([], []), "test": ([], [])}
    for split, (features, labels) in seen.items():
        for picture in sorted((file.with_suffix("") / split).glob("*/*.png")):
            hidden = model(**prepare(Image.open(picture).convert("RGB"), return_tensors="pt")).last_hidden_state[0]
            features.append(torch.cat((hidden[0], hidden[1:].mean(dim=0))).numpy())  # what the head of an adapter reads
            labels.append(picture.parent.name)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)).fit(*seen["train"])
    return float(head.score(*seen["test"]))


def _recovery(task: plait.TaskResult) -> str:
    low, high = task.recovery_interval
    return f"{task.recovery:.2f} ({low:.2f} – {high:.2f})"


def _mean(found: plait.Evaluation) -> str:
    low, high = found.mean_interval
    return f"{found.mean_recovery:.2f} ({low:.2f} – {high:.2f})"


if __name__ == "__main__":
    main()
