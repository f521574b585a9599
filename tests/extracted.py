"""Base models and their fine-tunes on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"model.layers.0.q_proj": (24, 16), "model.layers.0.up_proj": (40, 16), "model.layers.1.q_proj": (24, 16)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["model.norm.weight"] = torch.ones(16)
    made["model.embed_tokens.weight"] = torch.randn(12, 16, generator=generator)
    return made


def checkpoint(folder: Path, made: dict[str, torch.Tensor], *, shards: int = 1, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody-knows", **config}))
    if shards == 1:
        save_file(made, folder / "model.safetensors")
        return folder
    names = sorted(made)
    homes = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(homes.values()):
        save_file({n: made[n] for n in names if homes[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder
