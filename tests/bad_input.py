"""Two small adapters, and commands that refuse: code 2, a message, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import exit_code

MODULES = {"layers.0.q_proj": (8, 6), "layers.1.q_proj": (8, 6)}


def adapter(folder: Path, *, seed: int = 0, rank: int = 2, modules=None, **config) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_out, d_in) in (modules or MODULES).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    data = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the adapters `a` and `b` into a folder, and make it the working directory."""
    monkeypatch.chdir(folder)
    adapter(folder / "a", seed=1)
    adapter(folder / "b", seed=2)
    return folder


def change(folder: Path, name: str, edit) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name] = edit(tensors[name])
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(capsys, *arguments: object) -> str:
    """Run the command line; expect code 2, no traceback, no output folder; return its message."""
    before = sorted(Path().iterdir())
    code = exit_code(*arguments)
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert sorted(Path().iterdir()) == before, "nothing is written"
    return " ".join(printed.err.split())


def merge(capsys, *arguments: object) -> str:
    return refused(capsys, "merge", *arguments, "-o", "out")
