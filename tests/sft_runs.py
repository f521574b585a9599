"""Small trainings with `plait sft`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from plait.training import causal
from plait.training.arguments import read_keywords
from plait.training.sft import plan_sft, run_sft
from tests.chat_models import questions, save_chat_model, write_rows
from tests.command_line import exit_code

QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
IDS = torch.tensor([[10, 20, 30, 40, 50, 60]])


def make_place(folder):
    """Write a base and rows."""
    save_chat_model(folder / "base")
    write_rows(folder / "rows.jsonl", questions())
    return folder


def kept_trainers(monkeypatch):
    """Return a list to which the trainers are added that are made."""
    made = []
    make = causal.make_trainer
    monkeypatch.setattr(causal, "make_trainer", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    return made


def flags(place, out, **changes):
    given = {
        "model_name_or_path": str(place / "base"), "dataset_name_or_path": str(place / "rows.jsonl"), "output_dir": str(out),
        **QUICK, **LORA, **changes,
    }  # fmt: skip
    return read_keywords(given)


def train(place, out, **changes):
    """Train; a checkpoint takes as long as several steps, so that there are none unless `save_steps` are given."""
    saving = {} if "save_steps" in changes else {"save_strategy": "no"}
    return run_sft(plan_sft(flags(place, out, **saving, **changes)))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def base_model(place):
    return AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def main_ok(words):
    assert exit_code(*words) == 0
