"""Cards, closing lines and `plait inspect` name the programs that are known to load an adapter, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.adapters.adapter import Adapter
from plait.merging.card import loader_of_model
from tests.adapters_on_disk import Linear, write_adapter
from tests.command_line import exit_code
from tests.every import every

TEXTS = "transformers.models.llama.modeling_llama", "LlamaForCausalLM"
IMAGES = "transformers.models.vit.modeling_vit", "ViTForImageClassification"
SPEECH = "transformers.models.whisper.modeling_whisper", "WhisperForConditionalGeneration"


def note(module: str, name: str) -> dict[str, Any]:
    return {"task_type": None, "auto_mapping": {"parent_library": module, "base_model_class": name}}


def pair(folder: Path, config: dict[str, Any], path: str = "model.layers.0.self_attn.q_proj") -> dict[str, Path]:
    modules = {path: Linear(8, 8)}
    return {n: write_adapter(folder / n, modules, seed=i, **config).folder for i, n in enumerate("ab")}


@every(
    ("config", "path", "loader"),
    [
        (note(*IMAGES), "vit.encoder.layer.0.attention.attention.query", "ViTForImageClassification"),
        (note(*SPEECH), "model.encoder.layers.0.self_attn.q_proj", "WhisperForConditionalGeneration"),
        (note("transformers.models.clip.modeling_clip", "CLIPModel"), "vision_model.layers.0.mlp.fc1", "CLIPModel"),
        ({"task_type": "SEQ_CLS"}, "bert.encoder.layer.0.attention.self.query", "AutoModelForSequenceClassification"),
        ({"task_type": "TOKEN_CLS"}, "bert.encoder.layer.0.attention.self.query", "AutoModelForTokenClassification"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "encoder.block.0.layer.0.SelfAttention.q", "AutoModelForSeq2SeqLM"),
        ({"task_type": "FEATURE_EXTRACTION"}, "encoder.layer.0.attention.self.query", "AutoModel"),
        ({"task_type": "CAUSAL_LM"}, "model.visual.blocks.0.attn.qkv", "AutoModelForCausalLM"),
        ({}, "encoder.layers.0.q", "AutoModel"),
    ],
)
def test_other_kinds_of_models_are_loaded_by_peft(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    path: str,
    loader: str,
) -> None:
    folder = tmp_path_factory.mktemp("other")
    adapters = pair(folder, config, path)
    assert exit_code("merge", *adapters.values(), "-o", folder / "out") == 0
    shown, card = capsys.readouterr().out, (folder / "out" / "README.md").read_text()
    assert "vLLM" not in shown + card
    assert "Unsloth" not in card
    assert f"from transformers import {loader}\n" in card
    assert "PeftModel.from_pretrained" in card
    assert exit_code("merge", *adapters.values(), "--dry-run") == 0
    assert exit_code("inspect", *adapters.values()) == 0
    shown = capsys.readouterr().out
    assert "max-lora-rank" not in shown
    assert "Settings are known for language models" in shown
    # what is merged says of what it is, and so does a merge of it
    merged = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert merged.get("auto_mapping") == config.get("auto_mapping")
    again = plait.compress(folder / "out", rank=1, out=folder / "small").folder
    assert f"from transformers import {loader}\n" in (again / "README.md").read_text()


@every("config", [{"task_type": "CAUSAL_LM"}, note(*TEXTS), {}])
def test_adapters_of_language_models_are_served(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], config: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    assert exit_code("merge", *pair(folder, config).values(), "-o", folder / "out") == 0
    assert "vLLM: --max-lora-rank 8" in capsys.readouterr().out
    card = (folder / "out" / "README.md").read_text()
    assert "--max-lora-rank 8" in card
    assert "Unsloth" in card


def test_what_vllm_does_not_read_has_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = pair(tmp_path, {"task_type": "CAUSAL_LM"})
    assert exit_code("merge", *adapters.values(), "--to", "mlx", "-o", tmp_path / "mlx") == 0
    assert "vLLM" not in capsys.readouterr().out


def test_a_note_is_taken_of_transformers_alone(tmp_path: Path) -> None:
    for number, (module, name) in enumerate(
        [("os.path", "LlamaForCausalLM"), ("transformers.x", "a b"), ("transformers.;", "A")]
    ):
        folder = pair(tmp_path / str(number), note(module, name))["a"]
        assert Adapter.open(folder, "a").config.noted_class is None


@every(
    ("config", "task", "loader"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, "AutoModelForCausalLM"),
        ({"architectures": ["BertModel"]}, "SEQ_CLS", "AutoModelForSequenceClassification"),
        ({"architectures": ["ViTForImageClassification"]}, None, "ViTForImageClassification"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, None, "Wav2Vec2ForCTC"),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "SEQ_2_SEQ_LM", "WhisperForConditionalGeneration"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "CAUSAL_LM", "Qwen2VLForConditionalGeneration"),
        ({"architectures": ["OwnForImageClassification"], "auto_map": {}}, None, "AutoModel"),
        ({"architectures": ["ViTModel"]}, None, "AutoModel"),
        ({}, None, "AutoModel"),
    ],
)
def test_full_models(config: dict[str, Any], task: str | None, loader: str) -> None:
    assert loader_of_model(config, task) == loader
