"""Merge adapters of DINOv2 that each sort pictures of one kind, and count what the merge keeps of each.

Needs no Hub: the base model comes in a Python package, and so do pictures (README.md says what to install).
"""

from __future__ import annotations

import argparse
import sys
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

from plait.hub.pretrained import load_image_processor

sys.path.insert(0, str(Path(__file__).parents[1]))
from recovery_table import print_recovery_table

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
        shown = {"measure": "accuracy", "examples": "pictures"}
        print_recovery_table(ADAPTERS, base, files, options.out, methods=METHODS, **shown)
        print(f"{time.perf_counter() - started:.0f} seconds, {time.process_time():.0f} of processor time")


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


if __name__ == "__main__":
    main()
