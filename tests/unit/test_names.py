"""Tensor names and layers."""

from __future__ import annotations

import pytest

from plait.adapters.names import (
    LayerKey,
    clean_settings,
    foreign_tensors,
    is_flat,
    kohya_part,
    layer_key,
    parse_full_name,
    parse_lora_name,
    strip_prefix,
)
from tests.every import every

Q = "model.layers.0.self_attn.q_proj"


@every(
    "prefix",
    [
        "",
        "base_model.model.",
        "base_model.model.base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "_orig_mod.base_model.model.",
        "_fsdp_wrapped_module.base_model.model.",
        "_forward_module.module.base_model.model.",
        "base_model.model.module.",
        "base_model.model._fsdp_wrapped_module._checkpoint_wrapped_module.module._orig_mod.",
        "base_model.model._fsdp_wrapped_module._fpw_module.",
        "module.module._orig_mod.base_model.model.base_model.model.",
    ],
)
def test_wrappers_are_no_part_of_a_path(prefix):
    assert strip_prefix(f"{prefix}{Q}.lora_A.weight") == f"{Q}.lora_A.weight"


@every(
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
    assert parse_lora_name(name)[:2] == (module, part)


@pytest.mark.parametrize("name", ["base_model.model.head.weight", "base_model.model.lora_proj.weight", "x.bias"])
def test_other_names(name):
    assert parse_lora_name(name) is None


@every(
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


@every("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_module"])
@every("at", range(1, 6))
def test_wrappers_at_any_depth(wrapper, at):
    words = Q.split(".")
    wrapped = ".".join([*words[:at], wrapper, *words[at:]])
    assert parse_lora_name(f"base_model.model.{wrapped}.lora_A.weight").module == Q
    assert strip_prefix(f"{wrapped}.base_layer.bias") == f"{Q}.base_layer.bias"


def test_a_module_of_the_models_own_called_module_stays():
    """LeViT's layers are wrapped in a residual of the model's own; DDP's wrapper is around all layers."""
    own = "levit.encoder.stages.0.layers.1.module.queries_keys_values.linear"
    assert parse_lora_name(f"base_model.model.{own}.lora_B.weight").module == own
    assert parse_lora_name("base_model.model.model.module.layers.0.q_proj.lora_B.weight").module == "model.layers.0.q_proj"
    assert strip_prefix("layers.0._fsdp_wrapped_module.module.q_proj.weight") == "layers.0.q_proj.weight"


def test_a_peft_model_within_a_model():
    assert strip_prefix("language_model.base_model.model.model.layers.0.q.lora_A.weight") == (
        "language_model.model.layers.0.q.lora_A.weight"
    )


@every(
    ("name", "path", "owner", "is_copy", "is_untrained"),
    [
        ("lm_head.weight", "lm_head.weight", None, False, False),
        ("lm_head.modules_to_save.weight", "lm_head.weight", None, True, False),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight", "default", True, False),
        ("lm_head.modules_to_save.mine.weight", "lm_head.weight", "mine", True, False),
        ("lm_head.original_module.weight", "lm_head.weight", None, False, True),
        ("classifier.modules_to_save.default.dense.weight", "classifier.dense.weight", "default", True, False),
        ("classifier.modules_to_save.dense.weight", "classifier.dense.weight", None, True, False),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", None, None, False, False),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta.default", None, "default", False, False),
        ("model.embed_tokens.token_adapter.trainable_tokens_original.default", None, "default", False, True),
        ("model.embed_tokens.token_adapter.base_layer.weight", "model.embed_tokens.base_layer.weight", None, False, False),
    ],
)
def test_full_tensors_by_their_names_in_memory(name, path, owner, is_copy, is_untrained):
    found = parse_full_name(f"base_model.model.{name}", owners={"mine"})
    wanted = path or "model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert found == (wanted, owner, is_copy, is_untrained)


def test_an_untrained_copy_tells_an_adapters_name_from_a_modules():
    before = {"head.original_module.default.weight"}
    assert parse_full_name("head.modules_to_save.default.weight", (), before).path == "head.default.weight"
    assert parse_full_name("head.modules_to_save.odd.weight", (), {"head.original_module.weight"}).path == "head.weight"


@every(
    ("name", "what"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "kohya"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "kohya"),
        (f"{Q}.lora_mid.weight", "kohya"),
        (f"{Q}.dora_scale", "kohya"),
        (f"{Q}.lora_a", "mlx"),
        (f"{Q}.lora_b.weight", "torchtune"),
        ("unet.mid_block.attn1.to_q.lora.down.weight", "diffusers"),
        ("unet.mid_block.attn1.processor.to_q_lora.up.weight", "diffusers"),
        (f"{Q}.hada_w1_a", "LyCORIS"),
        (f"{Q}.lokr_w2.default", "LyCORIS"),
        (f"{Q}.oft_R.weight", "LyCORIS"),
        (f"{Q}.lora_E", "AdaLoRA"),
        (f"{Q}.ia3_l.default", "IA3"),
        (f"{Q}.vera_lambda_b", "VeRA"),
        ("base_model.vera_A", "VeRA"),
        ("prompt_embeddings", "prompt"),
        (f"{Q}.fourierft_spectrum", "another method"),
        (f"{Q}.base_layer.weight.absmax", "quantized"),
        ("_fsdp_wrapped_module._flat_param", "FSDP"),
        (f"{Q}.adapter.linear_in.weight", "NeMo"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_out.weight", "NeMo"),
        (f"{Q}.LORA_A.WEIGHT", "not known"),
        (f"{Q.replace('.', '/')}/lora_A/weight", "not known"),
        (f"{Q}.kernel_lora_b", "not known"),
        (f"{Q}.lora_A.bias", "not known"),
        (f"{Q}.lora_A0.weight", "not known"),
        (f"{Q}.lora_A.default.inner.weight", "not known"),
    ],
)
def test_what_other_methods_and_programs_write_is_no_head(name, what):
    name = f"base_model.model.{name}"
    assert parse_lora_name(name) is None
    assert [w for w in foreign_tensors([name]) if what in w], foreign_tensors([name])


@every("name", ["score.weight", "lora_proj.weight", "head.alpha", "x.bias", "model.loraine.weight"])
def test_heads_are_not_foreign(name):
    assert foreign_tensors([f"base_model.model.{name}"]) == {}


def test_kohyas_names_are_read_where_they_hold_the_modules_path():
    assert kohya_part(f"{Q}.lora_down.weight") == (Q, "lora_A", None)
    assert kohya_part(f"base_model.model.{Q}.lora_up.weight") == (Q, "lora_B", None)
    assert kohya_part(f"{Q}.alpha") == (Q, "alpha", None)


@every(
    ("module", "flat"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", True),
        ("lycoris_model_layers_0_self_attn_q_proj", True),
        ("model_layers_0_self_attn_q_proj", True),
        ("transformer_h_11_attn_c_attn", True),
        ("layer_0_proj", False),
        (Q, False),
        ("lm_head", False),
        ("lora_proj.q", False),
    ],
)
def test_paths_with_underscores_in_place_of_dots(module, flat):
    assert is_flat(module) is flat


def test_names_in_the_configuration_are_cleaned_alike():
    found = clean_settings(
        {
            "target_modules": ["model.layers.0._checkpoint_wrapped_module.self_attn.q_proj", "v_proj"],
            "alpha_pattern": {r".*\.0\._checkpoint_wrapped_module\.mlp\.up_proj": 3},
            "rank_pattern": {"_orig_mod.model.layers.1.mlp.up_proj": 4},
            "base_model_name_or_path": "a/_orig_mod.b",
            "modules_to_save": None,
        }
    )
    assert found == {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "alpha_pattern": {r".*\.0\.mlp\.up_proj": 3},
        "rank_pattern": {"model.layers.1.mlp.up_proj": 4},
        "base_model_name_or_path": "a/_orig_mod.b",
        "modules_to_save": None,
    }
