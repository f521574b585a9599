"""Two phases to train, and what became of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import exit_code
from tests.language_models import save_model, write_task

SPLITS = {"train": "test.jsonl", "test": "test.jsonl"}
PHASES = """\
base_model: base
lora: {r: 4, alpha: 8, dropout: 0, targets: all-linear}
arguments: {learning_rate: 1e-2, lr_scheduler_type: constant, max_steps: 10, save_strategy: 'no'}
phases: [sort.yaml, rate.yaml]
merge: {method: {name: ties, space: core, density: 0.5}}
"""
#: A checkpoint takes as long as several steps.
CHECKPOINTS = (", save_strategy: 'no'", "")
#: Phases, and no merge of them.
MERGE = ("merge: {method: {name: ties, space: core, density: 0.5}}\n", "")


def lay_out(folder: Path, model: Path) -> None:
    """Write phases of a base, and their tasks, to a folder."""
    (folder / "base").symlink_to(model)
    for task in ("sort", "rate"):
        write_task(folder, task, splits=SPLITS)
    (folder / "phases.yaml").write_text(PHASES)


@pytest.fixture(scope="session")
def phase_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("phases") / "base")


@pytest.fixture
def phases(tmp_path: Path, phase_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out phases in the working directory, and return it."""
    lay_out(tmp_path, phase_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewrite(*changes: tuple[str, str], text: str = PHASES) -> None:
    """Write the phases anew, with changes of their text."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("phases.yaml").write_text(text)


def tensors(out: str | Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "phases" / name / "adapter" / "adapter_model.safetensors")


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = exit_code("train", *arguments)
    message = capsys.readouterr()
    return code, message.out, message.err


def states(result) -> dict[str, str]:
    return {p.name: p.state for p in result.phases}
