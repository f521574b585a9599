"""What a user's terminal shows of commands that load libraries: plait's own lines, and no warning of any library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.language_models import WORDS, label, save_model, train_adapter, write_task

_WARNS = re.compile(r"warn|deprecat|will be removed|\[transformers|Traceback", re.IGNORECASE)
COMMANDS = {
    "eval": "eval a b --tasks tasks/sort.yaml tasks/rate.yaml --base-id base",
    "verify": "verify merged --parity prompts.txt --base-id base",
    "bake": "bake a b --base-id base -o baked",
    "report": "report merged -o page.html --figures figures",
    "sft": "sft --model_name_or_path base --dataset_name_or_path rows.jsonl --use_peft --max_steps 1 --output_dir run",
    "train": "train phases.yaml -o trained",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("terminal")
    save_model(folder / "base")
    for name, task in {"a": "sort", "b": "rate"}.items():
        train_adapter(folder / name, task, steps=1)
        write_task(folder / "tasks", task, splits={"train": "test.jsonl", "test": "test.jsonl"})
    rows = [{"prompt": f"sort {word} :", "completion": f" {label('sort', word)}"} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "phases.yaml").write_text(
        "base_model: ./base\nlora: {r: 2, targets: all-linear}\narguments: {max_steps: 1}\n"
        "phases: [tasks/sort.yaml, tasks/rate.yaml]\n"
    )
    (folder / "prompts.txt").write_text("sort w1 :\n")
    run("merge a b -o merged", folder)
    return folder


def run(line: str, folder: Path) -> str:
    """Run a command as a user does; return what it writes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "plait", *line.split()], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_no_library_warns(place, command):
    shown = run(COMMANDS[command], place)
    assert not [line for line in re.split(r"[\r\n]+", shown) if _WARNS.search(line)]
