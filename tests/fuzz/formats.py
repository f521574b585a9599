"""Tiny adapters as other programs write them, and what an independent reading finds in their files."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plait.cli.main import main

#: Paths of a pipeline → shape; the first is a convolution.
PIPELINE = {
    "unet.down_blocks.0.resnets.0.conv1": (6, 4, 3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (8, 6),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (6, 6),
}
_NUMBER = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
_RANK = 2


def build_formats(folder: Path) -> None:
    """Write `sd`, `sd2` (diffusers), `kohya`, `lycoris` (files), `mlx`, `gguf`, `numbered`; needs `first` and `base` there."""
    for seed, name in enumerate(("sd", "sd2")):
        _write_pipeline(folder / name, seed)
    for source, to, *more in (("sd", "kohya"), ("first", "mlx"), ("first", "gguf", "--base-id", "base")):
        with suppress(SystemExit):
            main(("convert", source, "--to", to, *more, "-o", f"{to}-made"))
    _with_settings(folder / "kohya-made" / "lora.safetensors", folder / "kohya.safetensors")
    _write_products(folder / "lycoris.safetensors")
    shutil.copytree(folder / "mlx-made", folder / "mlx")
    (folder / "gguf").mkdir()
    shutil.copyfile(folder / "gguf-made" / "adapter.gguf", folder / "gguf" / "adapter.gguf")
    shutil.copyfile(folder / "base" / "config.json", folder / "gguf" / "config.json")
    (folder / "numbered").mkdir()
    shutil.copyfile(folder / "first" / "adapter_config.json", folder / "numbered" / "adapter_config.json")
    tensors = load_file(folder / "first" / "adapter_model.safetensors")
    for i in (0, 1):
        held = {n: t for at, (n, t) in enumerate(sorted(tensors.items())) if at % 2 == i}
        save_file(held, folder / "numbered" / f"adapter_model-0000{i + 1}-of-00002.safetensors")


def deltas_of(place: Path) -> dict[str, np.ndarray]:
    """Read an adapter of mlx-lm, diffusers or kohya as their documentation has it: path with underscores → s · B A, float64."""
    if (place / "adapters.safetensors").is_file():
        scale = json.loads((place / "adapter_config.json").read_bytes())["lora_parameters"]["scale"]
        held = load_file(place / "adapters.safetensors")
        return {
            n[:-7].replace(".", "_"): scale * (t.double() @ held[n[:-1] + "b"].double()).mT.numpy()
            for n, t in held.items()
            if n.endswith(".lora_a")
        }
    file = place if place.is_file() else next(place.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    held, found = load_file(file), {}
    for name, up in held.items():
        if not (match := re.fullmatch(r"(.+)\.lora_(?:B|up)\.weight", name)):
            continue
        module = match[1]
        down = held[name.replace("lora_up", "lora_down").replace("lora_B", "lora_A")]
        product = up.double().flatten(1) @ down.double().flatten(1)
        alpha = held.get(f"{module}.alpha")
        scaling = 1.0 if alpha is None else float(alpha) / len(down)
        component, _, inner = module.partition(".")
        if f"{component}.r" in settings or f"{component}.lora_alpha" in settings:
            patterns = (settings.get(f"{component}.alpha_pattern") or {}).items()
            alpha = settings.get(f"{component}.lora_alpha", 8)
            scaling = next((v for p, v in patterns if re.match(rf"(.*\.)?({p})$", inner)), alpha) / len(down)
        path = module.replace(".", "_").replace("lora_unet_", "unet_").replace("lora_te_", "text_encoder_")
        found[path] = scaling * product.numpy()
    return found


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _write_pipeline(folder: Path, seed: int) -> None:
    folder.mkdir()
    tensors = {}
    for i, (path, (rows, *inputs)) in enumerate(PIPELINE.items()):
        tensors[f"{path}.lora_A.weight"] = _random(_RANK, *inputs, seed=10 * seed + i)
        tensors[f"{path}.lora_B.weight"] = _random(rows, _RANK, *(1 for _ in inputs[1:]), seed=10 * seed + i + 5)
    settings = {
        f"{c}.{k}": v
        for c in ("unet", "text_encoder")
        for k, v in {"r": _RANK, "lora_alpha": 3.0, "alpha_pattern": {"conv1": 1.5}, "target_modules": ["to_q"]}.items()
    }
    metadata = {"lora_adapter_metadata": json.dumps(settings), "software": "trainer 1.0"}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=metadata)


def _with_settings(made: Path, file: Path) -> None:
    """Write a file again with texts as kohya's scripts have them."""
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_scripts_commit_hash": "0123456789abcdef",
        "ss_tag_frequency": '{"a": {"b": 1}}',
        "modelspec.license": "MIT",
    }
    save_file(load_file(made), file, metadata=metadata)


def _write_products(file: Path) -> None:
    conv, query, text = (
        p.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te_").replace(".", "_") for p in PIPELINE
    )
    number = _NUMBER.replace("text_encoder.", "lora_te_").replace(".", "_")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        conv: {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (6, 2, 1, 1)},
        query: {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
        text: {"lokr_w1": (2, 3), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)},
        number: {"lora_down.weight": (2, 6), "lora_up.weight": (6, 2)},
    }
    tensors = {
        f"{module}.{part}": _random(*shape, seed=len(part) + at)
        for at, (module, parts) in enumerate(shapes.items())
        for part, shape in parts.items()
    }
    alphas = {f"{module}.alpha": torch.tensor(2.0) for module in shapes}
    save_file(tensors | alphas, file, metadata={"ss_network_module": "lycoris.kohya"})
