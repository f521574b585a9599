"""Tiny transformers models of every shape that a bake must know, and adapters of them made by PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

IDS = torch.arange(24).reshape(2, 12) % 30
_SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def _llama(tied: bool) -> tf.PreTrainedModel:
    config = tf.LlamaConfig(**_SMALL, num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=32)
    return tf.LlamaForCausalLM(config)


def _gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def _qwen3_moe() -> tf.PreTrainedModel:
    config = tf.Qwen3MoeConfig(
        **_SMALL, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config)


def _mixtral() -> tf.PreTrainedModel:
    config = tf.MixtralConfig(**_SMALL, num_key_value_heads=1, num_local_experts=3, max_position_embeddings=32)
    return tf.MixtralForCausalLM(config)


def _bert() -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**_SMALL, max_position_embeddings=32, num_labels=3))


def _t5() -> tf.PreTrainedModel:
    config = tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config)


def _whisper() -> tf.PreTrainedModel:
    config = tf.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=12, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def _vit() -> tf.PreTrainedModel:
    small = {k: v for k, v in _SMALL.items() if k != "vocab_size"}
    return tf.ViTForImageClassification(tf.ViTConfig(**small, image_size=8, patch_size=4, num_labels=3))


MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: _llama(tied=False),
    "llama tied": lambda: _llama(tied=True),
    "gpt2": _gpt2,
    "qwen3 moe": _qwen3_moe,
    "mixtral": _mixtral,
    "bert": _bert,
    "t5": _t5,
    "whisper": _whisper,
    "vit": _vit,
}


def make_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """Return a model with random values everywhere, biases and norms too."""
    torch.manual_seed(seed)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype)


def save_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    make_model(kind, dtype=dtype).save_pretrained(folder, **options)
    return folder


def run(model: torch.nn.Module) -> torch.Tensor:
    """Return logits for fixed inputs, whatever the model takes."""
    kind = getattr(model, "config", None).model_type
    with torch.no_grad():
        if kind in ("vit", "dinov2"):
            return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)).logits.float()
        if kind == "wav2vec2":
            return model(input_values=torch.linspace(-9, 9, 2 * 400).sin().reshape(2, 400)).logits.float()
        if kind == "whisper":
            features = torch.linspace(-1, 1, 2 * 8 * 24).reshape(2, 8, 24).to(next(model.parameters()).dtype)
            return model(input_features=features, decoder_input_ids=IDS).logits.float()
        if kind == "t5":
            return model(input_ids=IDS, decoder_input_ids=IDS).logits.float()
        return model(input_ids=IDS).logits.float()


def make_adapter(base: Path, folder: Path, seed: int, auto: Any, **config: Any) -> Path:
    """Make an adapter with PEFT and random values everywhere, so that nothing is zero by initialization."""
    torch.manual_seed(seed)
    model = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), LoraConfig(**{"r": 3, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name or "modules_to_save.default" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def adapter_output(base: Path, adapters: dict[str, Path], weights: dict[str, float], auto: Any) -> torch.Tensor:
    """Return the logits of the base with all adapters active, their scalings times the weights."""
    names = list(adapters)
    model = PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), adapters[names[0]], names[0])
    for name in names[1:]:
        model.load_adapter(adapters[name], name)
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), torch.nn.Conv1d):
            module.stride = module.base_layer.stride  # Whisper reads it; PEFT's wrapper does not pass it on
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for name in names:
                if name in scaling:
                    scaling[name] *= weights[name]
    model.base_model.set_adapter(names)
    return run(model.eval().base_model.model)


def literal_output(base: Path, adapters: dict[str, Path], weights: dict[str, float], auto: Any) -> torch.Tensor:
    """Return the logits of W + Σ wₜ ΔWₜ in float64, layer by layer, no two of which share a parameter.

    ΔWₜ is what PEFT alone adds to a copy of its layer, so that DoRA, tied weights and repeated layers are PEFT's own.
    """
    models = [PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), path) for path in adapters.values()]
    layers = [{n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)} for model in models]
    found = copy.deepcopy(models[0].base_model.model).eval()
    for path in sorted(set().union(*layers)):
        total = None
        for own, weight in zip(layers, weights.values(), strict=True):
            if path not in own:
                continue
            merged = copy.deepcopy(own[path]).double()
            plain = copy.deepcopy(merged.base_layer)
            merged.merge()
            total = plain if total is None else total
            with torch.no_grad():
                total.weight = torch.nn.Parameter(total.weight + weight * (merged.base_layer.weight - plain.weight))
        owner, _, name = path.rpartition(".")
        setattr(found.get_submodule(owner), name, total)
    return run(found.double())
