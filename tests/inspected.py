"""Adapters on disk that inspections are tested on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from plait.adapters import Adapter

Q, V, UP = (f"model.layers.{{}}.{m}" for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))


def write(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/Base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


def key(path: str, part: str) -> str:
    return f"base_model.model.{path}.{part}" + ("" if "embedding" in part else ".weight")


def linear(path: str, d_out: int, d_in: int, rank: int, draw) -> dict[str, torch.Tensor]:
    return {key(path, "lora_A"): draw(rank, d_in), key(path, "lora_B"): draw(d_out, rank)}


def drawing(seed: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mixed(seed: int, ranks: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two layers of linear modules, a convolution with groups, an embedding, fused experts."""
    draw = drawing(seed, dtype)
    q, v, rest = ranks
    tensors = {}
    for layer in (0, 1):
        tensors |= linear(Q.format(layer), 12, 16, q, draw) | linear(V.format(layer), 6, 16, v, draw)
    tensors[key("model.embed_tokens", "lora_embedding_A")] = draw(rest, 30)
    tensors[key("model.embed_tokens", "lora_embedding_B")] = draw(16, rest)
    tensors[key("model.layers.1.conv", "lora_A")] = draw(4, 3, 5)  # 2 groups of rank 2
    tensors[key("model.layers.1.conv", "lora_B")] = draw(8, 2, 1)
    tensors[key("model.layers.1.mlp.experts", "lora_A")] = draw(3 * 4, 10)  # 3 experts of rank 4
    tensors[key("model.layers.1.mlp.experts", "lora_B")] = draw(7, 4 * 3)
    return tensors


EXPERTS = {"target_parameters": ["mlp.experts.down_proj"]}


def dense(folder: Path) -> dict[str, list[np.ndarray]]:
    """Read a file of `mixed` again, by its own means: path → the float64 matrices of each module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        k.removeprefix("base_model.model."): v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    result = {}
    for name, a in tensors.items():
        if ".lora_A" not in name and ".lora_embedding_A" not in name:
            continue
        path = name.split(".lora_")[0]
        b = tensors[name.replace("_A", "_B")]
        alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
        rank = config["r"] if path.endswith("experts") else a.shape[0]
        s = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if path.endswith("conv"):
            delta = [s * torch.einsum("or,rik->oik", b[4 * g : 4 * g + 4, :, 0], a[2 * g : 2 * g + 2]) for g in (0, 1)]
            result[path] = [d.flatten(1).numpy() for d in delta]
        elif path.endswith("experts"):
            delta = s * torch.einsum("ore,eri->eoi", b.view(7, 4, 3), a.view(3, 4, 10))
            result[path + ".down_proj"] = list(delta.numpy())
        else:
            result[path] = [(s * b @ a).numpy()]
    return result


def flat(modules: dict[str, list[np.ndarray]], like: dict[str, list[np.ndarray]]) -> np.ndarray:
    parts = [m.ravel() if path in modules else 0 * m.ravel() for path in like for m in modules.get(path, like[path])]
    return np.concatenate(parts)


def open_linear(folder: Path, shapes: dict[str, tuple[int, int]], *, rank: int = 4, seed: int = 0, **config) -> Adapter:
    draw = drawing(seed)
    tensors = {k: v for path, (m, n) in shapes.items() for k, v in linear(path, m, n, rank, draw).items()}
    return Adapter.open(write(folder, tensors, **{"r": rank, "lora_alpha": 2 * rank, **config}), folder.name)


def changed(adapter: Adapter, folder: Path, change, **config) -> Adapter:
    """Write an adapter again with (A, B) of every module changed; all are linear."""
    tensors = load_file(adapter.file.path)
    for name in [n for n in tensors if ".lora_A." in n]:
        twin = name.replace("lora_A", "lora_B")
        tensors[name], tensors[twin] = change(tensors[name], tensors[twin])
    return Adapter.open(write(folder, tensors, **{**adapter.config.raw, **config}), folder.name)


SHAPES = {p.format(i): s for i in range(3) for p, s in ((Q, (24, 32)), (V, (8, 32)), (UP, (40, 32)))}


def make_cohort(folder: Path) -> list[Adapter]:
    """Ranks, scaling rules and sets of modules all differ; "c" lacks the second layer's q_proj."""
    a = write(folder / "a", mixed(1, (4, 3, 2)), **EXPERTS)
    b = write(folder / "b", mixed(2, (2, 3, 5)), use_rslora=True, lora_alpha=3, **EXPERTS)
    tensors = {k: v for k, v in mixed(3, (4, 4, 4)).items() if Q.format(1) not in k}
    c = write(folder / "c", tensors, alpha_pattern={Q.format(0): 40, V.format(1): 1}, **EXPERTS)
    return [Adapter.open(place, place.name) for place in (a, b, c)]
