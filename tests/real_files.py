"""Adapters written again as other programs write them, bakes of them, and how far results are apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import plait
from tests.adapters_on_disk import Linear

LM = tf.AutoModelForCausalLM
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
MODULES = {Q: Linear(8, 8), V: Linear(4, 8)}
Tensors = dict[str, torch.Tensor]


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


def baked(adapters: list[Path], base: Path, out: Path, auto: Any = LM) -> tf.PreTrainedModel:
    """Bake, check that the checkpoint holds parameters of the model and no others, and load it."""
    plait.bake(adapters, base=base, out=out)
    model, report = auto.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def rewrite(
    source: Path, out: Path, name: Callable[[str], str] = str, keep: Callable[[str], bool] = bool, **config: Any
) -> Path:
    """Write an adapter again under other names, some tensors of it alone, with other settings."""
    out.mkdir(parents=True)
    tensors = {name(k): v for k, v in load_file(source / WEIGHTS).items() if keep(k)}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(json.loads((source / CONFIG).read_text()) | config))
    return out
