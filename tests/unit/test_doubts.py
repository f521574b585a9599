"""What looks wrong with an adapter: a configuration that contradicts the file, tensors that are lost, a second file."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file

import plait
from plait.adapters.adapter import Adapter
from plait.adapters.selection import unselected
from plait.errors import AdapterError
from plait.inspection.doubts import adapter_doubts
from tests.adapters_on_disk import PREFIX, layers, read_deltas, write_adapter

MODULES = layers(12, {"attn.q_proj": (4, 4), "attn.v_proj": (4, 4)})
TWO = layers(2, {"attn.q_proj": (4, 4), "attn.v_proj": (4, 4)})


def doubts(folder):
    return " ".join(adapter_doubts([Adapter.open(folder, "a")]))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["attn.q_proj", "model.layers.1.attn.v_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": r".*\.layers\.1[01]?\.attn\.(q|v)_proj"},
        {"target_modules": ".*q_proj|v_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 3},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    ],
)
def test_modules_that_peft_does_not_load(tmp_path, config):
    written = write_adapter(tmp_path / "a", MODULES, **config)
    settings = SimpleNamespace(**{**vars(LoraConfig()), **config})
    left = [path for path in sorted(MODULES) if not check_target_module_exists(settings, path)]
    adapter = Adapter.open(written.folder, "a")
    assert unselected(adapter) == left
    assert ("does not select" in doubts(written.folder)) is bool(left)


def test_keys_that_no_peft_has(tmp_path):
    """A later kind of LoRA may give its factors another meaning; what is off does not."""
    written = write_adapter(
        tmp_path / "a", TWO, use_later_kind=True, later_config={"groups": 4}, off=False, none=None, empty={}
    )
    assert "the configuration has 'later_config', 'use_later_kind', which no release of PEFT" in doubts(written.folder)
    trained = {
        "lora_dropout": 0.1,
        "inference_mode": True,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "use_rslora": True,
    }
    assert "no release of PEFT" not in doubts(write_adapter(tmp_path / "b", TWO, **trained).folder)


@pytest.mark.parametrize("selection", [["q_proj"], "(a+)+$", r"(q)\1", "(" * 3000, "a" * 10**6])
def test_a_merge_selects_all_that_it_holds(tmp_path, selection):
    """The sources' selection is written only where PEFT wraps every merged module for it."""
    pair = [write_adapter(tmp_path / n, TWO, seed=i, target_modules=selection) for i, n in enumerate("ab")]
    plait.merge([written.folder for written in pair], out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(TWO)
    found = read_deltas(tmp_path / "out", TWO)
    for path, delta in found.items():
        assert delta == pytest.approx(pair[0].deltas[path] + pair[1].deltas[path], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "extra", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save has 'lm_head'"),
        ({"modules_to_save": ["lm_head", "embed"]}, "model.embed.weight", "modules_to_save has 'lm_head'"),
        ({"modules_to_save": ["classifier", "score"]}, None, "modules_to_save has 'classifier', 'score'"),
        ({"modules_to_save": ["classifier", "score"]}, "score.weight", None),
        ({"modules_to_save": ["classifier"]}, None, "modules_to_save has 'classifier'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.weight", None),
        ({"trainable_token_indices": [1]}, None, "trainable_token_indices has rows"),
        ({"trainable_token_indices": {"embed": [1]}}, None, "trainable_token_indices has 'embed'"),
        ({"trainable_token_indices": [1]}, "model.embed.token_adapter.trainable_tokens_delta", None),
        ({"init_lora_weights": "of_tomorrow"}, None, "'of_tomorrow', which is not known here"),
        ({"init_lora_weights": "eva"}, None, None),
    ],
)
def test_what_the_configuration_names_and_the_file_lacks(tmp_path, config, extra, words):
    tensors = {extra: torch.ones(1, 4)} if extra else None
    written = write_adapter(tmp_path / "a", TWO, extra=tensors, **config)
    assert (words or "") in doubts(written.folder)
    assert words is not None or not doubts(written.folder)


def test_a_second_file_of_tensors(tmp_path):
    folder = write_adapter(tmp_path / "a", TWO).folder
    tensors = load_file(folder / "adapter_model.safetensors")
    for values, words in (
        (tensors, None),
        ({n: 2 * t for n, t in tensors.items()}, "it holds other tensors"),
        ({PREFIX + "x": torch.ones(1)}, "it holds other tensors"),
        ([object], "it cannot be compared"),
    ):
        torch.save(values, folder / "adapter_model.bin")
        assert (words or "") in doubts(folder)
        assert words is not None or not doubts(folder)
        assert words is None or words in " ".join(plait.inspect([folder]).adapters[0].warnings)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (["checkpoint-10/both", "checkpoint-5/both"], "has them in checkpoint-5, checkpoint-10: name one"),
        (["runs/final/adapter/both"], "has them in runs/final/adapter: name"),
        (["config", "checkpoint-3/tensors"], "adapter_model.bin either. It has them in checkpoint-3: name one"),
        (["config", "global_step10/x"], "what DeepSpeed saves"),
        (["config", "pytorch_model_fsdp_0/x"], "what FSDP saves"),
        (["config"], "Was the download cut short?"),
    ],
)
def test_folders_of_trainers(tmp_path, there, words):
    good = write_adapter(tmp_path / "good", TWO).folder
    for entry in there:
        place, _, what = f"{tmp_path}/run/{entry}".rpartition("/")
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        names = {"config": ["adapter_config.json"], "tensors": ["adapter_model.safetensors"], "x": []}
        for name in names.get(what, ["adapter_config.json", "adapter_model.safetensors"]):
            shutil.copy(good / name, place)
    with pytest.raises(AdapterError) as refusal:
        Adapter.open(tmp_path / "run", "a")
    assert words in str(refusal.value)
