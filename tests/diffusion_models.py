"""Tiny pipelines of diffusers, adapters on them, and what they compute."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from plait.adapters import Adapter

Tensors = dict[str, torch.Tensor]
WEIGHTS = (0.7, -0.4)
LORA = "pytorch_lora_weights.safetensors"
OF_UNET = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
OF_TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(*, cross: int = 8, layers: int | tuple[int, ...] = 1, **more: Any) -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=2, sample_size=8, norm_num_groups=2, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=2, transformer_layers_per_block=layers, **more,
    ).eval()  # fmt: skip


def tiny_text(kind: str = "CLIPTextModel", width: int = 8) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=width, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width, eos_token_id=39, bos_token_id=38, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def tiny_pipeline() -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=tiny_unet(), text_encoder=tiny_text(), vae=vae, tokenizer=None, safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip


def loaded(folder: Path) -> Any:
    """Return the pipeline of a folder, without the components that it was saved without."""
    import diffusers

    none = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, **none)


def random_adapter(model: Any, modules: list[str], seed: int) -> Tensors:
    """Return the factors of an adapter that PEFT puts on a model, with random values; the model stays as it was."""
    with_lora = adapted(model, {"it": seed}, modules)
    held = {n: p for n, p in with_lora.named_parameters() if ".it." in n}
    return {n.replace(".it.", "."): p.detach().clone() for n, p in held.items()}


def adapted(model: Any, adapters: dict[str, int], modules: list[str], weights: tuple[float, ...] = (1.0,)) -> Any:
    """Return a copy of a model with some adapters of random values active: name → seed."""
    from peft import LoraConfig, inject_adapter_in_model

    model = deepcopy(model)
    for name, seed in adapters.items():
        inject_adapter_in_model(LoraConfig(r=2 + seed, lora_alpha=2 + seed, target_modules=modules), model, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(list(adapters))
            for name, weight in zip(adapters, weights, strict=True):
                layer.scaling[name] *= weight
    return model


def save_sd(folder: Path) -> SimpleNamespace:
    """Save a tiny pipeline of SD 1 on disk, its UNet in numbered files, and two adapters as diffusers saves them."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "base")
    shutil.rmtree(folder / "base" / "unet")
    pipeline.unet.save_pretrained(folder / "base" / "unet", max_shard_size="20KB")
    adapters = [folder / f"lora{i}" for i in (0, 1)]
    for i, place in enumerate(adapters):
        unet, text = random_adapter(pipeline.unet, OF_UNET, i), random_adapter(pipeline.text_encoder, OF_TEXT, i)
        pipeline.save_lora_weights(place, unet_lora_layers=unet, text_encoder_lora_layers=text)
    return SimpleNamespace(base=folder / "base", adapters=adapters, pipeline=pipeline)


def outputs(unet: Any, text: Any) -> list[torch.Tensor]:
    """Return what a UNet and a text encoder compute, in float64."""
    unet, text = unet.double(), text.double()
    with torch.no_grad():
        noise = unet(random(1, 4, 8, 8).double(), 7, random(1, 5, 8).double()).sample
        return [noise, text(torch.arange(8)[None] + 3).last_hidden_state]


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def merged_deltas(places: list[Path], weights: Sequence[float]) -> Tensors:
    total: Tensors = {}
    for place, weight in zip(places, weights, strict=True):
        adapter = Adapter.open(place, "it")
        for path, target in adapter.targets.items():
            delta = weight * target.scaling * adapter.read(path, torch.float64)[0].dense()
            total[path] = total.get(path, 0) + delta
    return total


def tensors_of(folder: Path) -> Tensors:
    return {f"{p.relative_to(folder)}:{n}": t for p in folder.rglob("*.safetensors") for n, t in load_file(p).items()}
