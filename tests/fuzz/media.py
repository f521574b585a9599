"""Tasks of pictures and of sounds, a file per row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import yaml
from PIL import Image

RATE = 16_000  # of sounds, per second
_LABELS = ["red", "blue"]


def build_media(folder: Path) -> None:
    """Write `seen/seen.yaml` (pictures) and `heard/heard.yaml` (sounds), with four rows each."""
    chosen = np.random.default_rng(0)
    pictures, sounds = folder / "seen", folder / "heard"
    for place, task, kind, ending in (
        (pictures, "seen", "image_classification", "png"),
        (sounds, "heard", "audio_classification", "wav"),
    ):
        place.mkdir()
        content = {"name": task, "kind": kind, "splits": {"test": {"rows": [0, 4]}}, "data": {"path": "rows.jsonl"}}
        (place / f"{task}.yaml").write_text(yaml.safe_dump(content | {"labels": _LABELS}))
        column = "image" if ending == "png" else "audio"
        rows = [{column: f"{i}.{ending}", "label": _LABELS[i % 2]} for i in range(4)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(4):
        Image.fromarray(chosen.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        soundfile.write(sounds / f"{i}.wav", chosen.normal(size=RATE // 20), RATE)
