"""Calibrations of two small adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import plait
from plait.calibration.pipeline import CalibrateResult
from plait.linalg.inputs import InputRows
from tests.language_models import WORDS, train_pair, write_task

SEEN, JUDGED = WORDS[:16], WORDS[16:]


def make_place(folder: Path) -> Path:
    """Write a base, two adapters of it, and their tasks, calibrated on other words than they are judged on."""
    train_pair(folder, steps=20)
    for task in ("sort", "rate"):
        write_split_task(folder, task)
    return folder


def write_split_task(folder: Path, task: str, **changes: Any) -> Path:
    splits = {"calibration": "calibration.jsonl", "test": "test.jsonl"}
    file = write_task(folder, task, rows=JUDGED, **{"splits": splits, **changes})
    rows = [json.dumps({"word": word, "label": "never read"}) for word in SEEN]
    (folder / task / "calibration.jsonl").write_text("\n".join(rows) + "\n")
    return file


def calibrate(place: Path, out: Path, **settings: Any) -> CalibrateResult:
    settings = {"tasks": [place / "sort.yaml", place / "rate.yaml"], "base_model": place / "base", **settings}
    return plait.calibrate([place / "sort", place / "rate"], out=out, **settings)


def dense(found: torch.Tensor | InputRows | None) -> torch.Tensor:
    assert found is not None
    return found.dense() if isinstance(found, InputRows) else found.double()


def merge(place: Path, out: Path, **settings: Any) -> plait.MergeResult:
    settings = {"method": "regmean", "tasks": [place / "sort.yaml", place / "rate.yaml"], **settings}
    return plait.merge([place / "sort", place / "rate"], base_model=str(place / "base"), out=out, **settings)
