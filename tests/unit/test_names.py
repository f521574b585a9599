"""Tensor names and layers."""

from __future__ import annotations

import pytest

from plait.adapters.names import LayerKey, is_conv1d, layer_key, parse_lora_name, strip_prefix

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "base_model.model.",
        "base_model.model.base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "_orig_mod.base_model.model.",
        "_fsdp_wrapped_module.base_model.model.",
    ],
)
def test_wrappers_are_no_part_of_a_path(prefix):
    assert strip_prefix(f"{prefix}{Q}.lora_A.weight") == f"{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        (f"base_model.model.{Q}.lora_A.weight", Q, "lora_A"),
        (f"base_model.model.{Q}.lora_B.default.weight", Q, "lora_B"),
        (f"base_model.model.{Q}.lora_B.bias", Q, "lora_B.bias"),
        (f"base_model.model.{Q}.lora_B.default.bias", Q, "lora_B.bias"),
        (f"base_model.model.{Q}.lora_magnitude_vector", Q, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", Q, "lora_magnitude_vector"),
        ("base_model.model.embed.lora_embedding_A", "embed", "lora_embedding_A"),
        ("base_model.model.lora_proj.lora_A.weight", "lora_proj", "lora_A"),
        ("base_model.model.experts.base_layer.lora_A.weight", "experts.base_layer", "lora_A"),
    ],
)
def test_lora_names(name, module, part):
    assert parse_lora_name(name) == (module, part)


@pytest.mark.parametrize("name", ["base_model.model.head.weight", "base_model.model.lora_proj.weight", "x.bias"])
def test_other_names(name):
    assert parse_lora_name(name) is None


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11"),
        ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0"),
        ("vit.encoder.layer.5.output.dense", "vit.encoder.layer.5"),
        ("blocks.7.mlp.fc1", "blocks.7"),
        ("model.encoder.layers.2.k_proj", "model.encoder.layers.2"),
        ("model.decoder.layers.2.k_proj", "model.decoder.layers.2"),
        ("encoder.block.3.layer.1.SelfAttention.q", "encoder.block.3"),
        ("model.layers.3.mlp.experts.5.w1", "model.layers.3"),
    ],
)
def test_layers_of_many_families(module, layer):
    assert str(layer_key(module)) == layer


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "score"])
def test_modules_outside_of_layers(module):
    assert layer_key(module) is None


def test_a_layer_is_meant_by_number_or_by_any_tail_of_its_tower():
    key = LayerKey("model.encoder.layers", 3)
    assert all(key.matches(name) for name in ("3", "layers.3", "encoder.layers.3", "model.encoder.layers.3"))
    assert not any(key.matches(name) for name in ("4", "decoder.layers.3", "ers.3", "model.encoder.layers", "13"))


def test_conv1d_needs_flag_and_name():
    assert is_conv1d("h.0.attn.c_attn", fan_in_fan_out=True)
    assert not is_conv1d("h.0.attn.c_attn", fan_in_fan_out=False)
    assert not is_conv1d("layers.0.q_proj", fan_in_fan_out=True)
