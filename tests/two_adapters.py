"""Kinds of models with two adapters each, `one` and `two`, of tasks of these names that differ in their labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model

NAMES = ("one", "two")


class Folder:
    """For every kind of model: `KIND/one` and `KIND/two`, adapters, and `KIND/tasks` with both tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def adapters(self, kind: str) -> dict[str, Path]:
        return {name: self.folder / kind / name for name in NAMES}

    def tasks(self, kind: str) -> list[Path]:
        return [self.folder / kind / "tasks" / f"{name}.yaml" for name in NAMES]


def save_drawn(folder: Path, plain: Any, seed: int, **config: Any) -> None:
    """Write an adapter of rank 2 for a model, whose factors and head are as drawn."""
    torch.manual_seed(seed)
    model = get_peft_model(plain, LoraConfig(r=2, init_lora_weights=False, **config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def redrawn(model: Any, deviation: float = 0.3) -> Any:
    """Draw a model's matrices anew, and no biases: versions of transformers draw other ones from the same seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1 and "parametrizations" not in name:
                parameter.normal_(0, deviation, generator=generator)
    return model


def write_yaml(folder: Path, name: str, content: dict[str, Any]) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def write_labeled_files(
    folder: Path, name: str, kind: str, contents: Sequence[bytes], labels: Sequence[str], **changes: Any
) -> Path:
    """Write a task of images or sounds, a file per row; its labels go round, for `two` the other way."""
    folder.mkdir(parents=True, exist_ok=True)
    column, ending = {"image_classification": ("image", "png"), "audio_classification": ("audio", "wav")}[kind]
    turn = 2 if name == "two" else 1
    rows = [{column: f"{name}{i}.{ending}", "label": labels[(i * turn) % len(labels)]} for i in range(len(contents))]
    for row, content in zip(rows, contents, strict=True):
        (folder / row[column]).write_bytes(content)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": kind, "data": {"path": f"{name}.jsonl"}, "splits": {"test": {"rows": [0, len(rows)]}}, "labels": [*labels]}
    return write_yaml(folder, name, {"name": name, **task, **changes})
