"""Adapters and bases that cannot be merged: exit code 2; a message that says where, what and what to do; nothing written."""

from __future__ import annotations

import json
import math
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input import MODULES, adapter, change, merge, refused, work_in
from tests.command_line import exit_code


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    return work_in(tmp_path, monkeypatch)


def test_wrong_shapes(place, capsys):
    adapter(place / "c", modules={"layers.0.q_proj": (8, 7), "layers.1.q_proj": (8, 6)})
    printed = merge(capsys, "a", "c")
    assert "layers.0.q_proj" in printed
    assert "8" in printed
    assert "7" in printed
    assert f"'wide' is {place / 'c'}" in merge(capsys, "a", "wide=./c"), "a name says nothing of where its adapter is"


def test_factors_that_do_not_fit_each_other(place, capsys):
    change(place / "b", "base_model.model.layers.0.q_proj.lora_A.weight", lambda t: torch.randn(3, 6))
    printed = merge(capsys, "a", "b")
    assert "'layers.0.q_proj': A is [3, 6] and B is [8, 2]; the rank must be A's first and B's second dimension" in printed


def test_other_base(place, capsys):
    adapter(place / "c", base_model_name_or_path="org/other")
    printed = merge(capsys, "a", "c")
    assert "org/base" in printed
    assert "org/other" in printed
    assert "--base-id" in printed


def test_other_base_is_overridden_by_a_given_one(place):
    adapter(place / "c", base_model_name_or_path="org/other")
    assert exit_code("merge", "a", "c", "--base-id", "org/base", "-o", "out") == 0
    assert json.loads((place / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_tensor(place, capsys, value):
    name = "base_model.model.layers.1.q_proj.lora_B.weight"
    change(place / "b", name, lambda t: t.index_fill(0, torch.tensor([2]), value))
    printed = merge(capsys, "a", "b")
    assert f"adapter 'b': tensor '{name}'" in printed
    assert "2 NaN or infinite values" in printed


@pytest.mark.parametrize("length", [0, 5, 60, 400])
def test_truncated_safetensors(place, capsys, length):
    file = place / "b" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    printed = merge(capsys, "a", "b")
    assert "b/adapter_model.safetensors" in printed
    assert "truncated" in printed or "cut off" in printed


def test_header_that_is_no_json(place, capsys):
    file = place / "b" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[9:20] = b"\xff" * 11
    file.write_bytes(data)
    assert "the safetensors header is not valid" in merge(capsys, "a", "b")


def test_missing_config(place, capsys):
    (place / "b" / "adapter_config.json").unlink()
    printed = merge(capsys, "a", "b")
    assert "b/adapter_config.json: no such file" in printed
    assert "holds adapter_model.safetensors" in printed


def test_missing_config_with_checkpoints_below(place, capsys):
    adapter(place / "run" / "checkpoint-10")
    printed = merge(capsys, "a", "run")
    assert "run/adapter_config.json: no such file" in printed
    assert "checkpoint-10" in printed


def test_missing_tensors(place, capsys):
    (place / "b" / "adapter_model.safetensors").unlink()
    assert "b/adapter_model.safetensors: no such file" in merge(capsys, "a", "b")


def test_config_that_is_no_json(place, capsys):
    (place / "b" / "adapter_config.json").write_text("{")
    assert "b/adapter_config.json:1: this is not JSON" in merge(capsys, "a", "b")


def test_pickle_with_code(place, capsys):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(place / "bombed"),))

    file = place / "b" / "adapter_model.safetensors"
    torch.save({"base_model.model.x.lora_A.weight": Bomb()}, place / "b" / "adapter_model.bin")
    file.unlink()
    printed = merge(capsys, "a", "b")
    assert "holds more than tensors" in printed
    assert "safetensors" in printed
    assert not (place / "bombed").exists()


def test_pickle_that_is_none(place, capsys):
    (place / "b" / "adapter_model.safetensors").unlink()
    (place / "b" / "adapter_model.bin").write_bytes(pickle.dumps([1, 2])[:-1])
    assert "adapter_model.bin" in merge(capsys, "a", "b")


def test_a_pickle_of_tensors_is_fine(place):
    torch.save(load_file(place / "b" / "adapter_model.safetensors"), place / "b" / "adapter_model.bin")
    (place / "b" / "adapter_model.safetensors").unlink()
    assert exit_code("merge", "a", "b", "-o", "out") == 0


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_unconverted_initializations(place, capsys, init):
    adapter(place / "c", init_lora_weights=init)
    printed = merge(capsys, "a", "c")
    assert f"init_lora_weights is '{init}'" in printed
    assert "path_initial_model_for_weight_conversion" in printed


@pytest.mark.parametrize("kind", ["ADALORA", "IA3", "LOHA"])
def test_other_kinds_of_adapter(place, capsys, kind):
    adapter(place / "c", peft_type=kind)
    printed = merge(capsys, "a", "c")
    assert kind in printed
    assert "convert_to_lora" in printed


def test_dora_without_the_base(place, capsys):
    folder = adapter(place / "c", use_dora=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{module}.lora_magnitude_vector": torch.ones(8) for module in MODULES}
    save_file(tensors, folder / "adapter_model.safetensors")
    printed = merge(capsys, "a", "c")
    assert "DoRA in 'c': it rescales the rows of the base model's weights" in printed
    assert "--base-id" in printed


def test_all_broken_adapters_at_once(place, capsys):
    (place / "a" / "adapter_config.json").unlink()
    printed = merge(capsys, "a", "b", "./nowhere")
    assert "2 problems" in printed
    assert "a/adapter_config.json" in printed
    assert "nowhere" in printed


def test_lora_bias_beside_an_embedding(place, capsys):
    for name, part in (("c", "lora_B.bias"), ("d", "lora_embedding")):
        folder = adapter(place / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        if part == "lora_B.bias":
            tensors |= {f"base_model.model.{m}.lora_B.bias": torch.ones(8) for m in MODULES}
        else:
            tensors |= {"base_model.model.embed.lora_embedding_A": torch.ones(2, 9)}
            tensors |= {"base_model.model.embed.lora_embedding_B": torch.ones(6, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
    printed = merge(capsys, "c", "d")
    assert "lora_bias applies to all of an adapter" in printed
    assert "'embed'" in printed


def test_keys_that_decide_for_the_whole_adapter(place, capsys):
    adapter(place / "c", alora_invocation_tokens=[5])
    assert "alora_invocation_tokens differs (a None, c [5])" in merge(capsys, "a", "c")


def test_one_weight_as_module_and_as_parameter(place, capsys):
    adapter(place / "c", modules={"gate": (8, 6)})
    adapter(place / "d", modules={"gate": (8, 6)}, target_parameters=["gate.weight"])
    assert "'gate.weight' is adapted as a parameter" in merge(capsys, "c", "d")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: '(': not a regular expression"),
        ({"alpha_pattern": {"(q)\\1": 3}}, "alpha_pattern: '(q)\\\\1': it has groupref"),
        ({"alpha_pattern": {"((((a?){99}){99}){99}){99}" + "q_proj": 3}}, "it takes too long to match"),
        ({"rank_pattern": {"q": 2.5}}, "rank_pattern['q'] is 2.5; it must be an integer from 1"),
        ({"alpha_pattern": {"q": 10**400}}, "c/adapter_config.json: 'alpha_pattern.q' is an integer too large for a float"),
        ({"r": 10**400}, "'r' is an integer too large for a float"),
        ({"r": 10**20}, "r is 100000000000000000000; it must be an integer from 1 to 2147483647"),
        ({"r": 2.0}, "r is 2.0; it must be an integer"),
        ({"r": True}, "r is True; it must be an integer"),
        ({"r": None}, "r is None; it must be an integer"),
        ({"lora_alpha": [8]}, "lora_alpha is [8]; it must be a number"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; it must be true or false"),
        ({"use_dora": 2}, "use_dora is 2; it must be true or false"),
        ({"fan_in_fan_out": []}, "fan_in_fan_out is []; it must be true or false"),
        ({"lora_bias": "no"}, "lora_bias is 'no'; it must be true or false"),
        ({"target_modules": {"q": 1}}, "target_modules is {'q': 1}; it must be a text or a list of names"),
        ({"target_modules": [["q"]]}, "target_modules is [['q']]; it must be a text or a list of names"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'; it must be a list of names"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform is [1.5]; it must be an integer, or a list"),
        ({"trainable_token_indices": {"embed": 1}}, "trainable_token_indices is {'embed': 1}"),
        ({"task_type": 3}, "task_type is 3; it must be a text"),
        ({"revision": ["main"]}, "revision is ['main']; it must be a text"),
        ({"peft_type": ["LORA"] * 99}, "peft_type is"),
        ({"bias": {}}, "bias is {}; it must be 'none', 'all' or 'lora_only'"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices is [1, 1]; it must be a list of different integers"),
        ({"trainable_token_indices": {"embed": [-1]}}, "trainable_token_indices is {'embed': [-1]}; it must be a list of"),
        ({"task_type": "a" * 20_000}, "it must be a text of up to 10000 letters"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication is [[0, 1, 2]]; it must be a list of pairs"),
        ({"init_lora_weights": "LoRA-GA"}, "init_lora_weights is 'LoRA-GA' and was not converted"),
        ({"lora_alpha": 1e308}, "adapter 'c' has values of the order of"),
        ({"r": 0, "lora_alpha": None}, "values that cannot be read: 2 problems"),
        ({"alpha_pattern": ["a"]}, "alpha_pattern is ['a']; it must map"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern['q'] is None; it must be a number"),
        ({"alpha_pattern": {"q": math.nan}}, "alpha_pattern['q'] is nan; it must be a number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is ['x']"),
        ({"r": 0}, "r is 0; it must be an integer from 1"),
        ({"r": -4}, "r is -4"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'; it must be a list"),
    ],
)
def test_configurations_that_say_nonsense(place, capsys, config, words):
    adapter(place / "c")
    file = place / "c" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    assert words in merge(capsys, "a", "c")


def test_config_that_is_nested_without_end(place, capsys):
    (place / "b" / "adapter_config.json").write_text("[" * 100_000)
    assert "b/adapter_config.json: nested too deeply" in merge(capsys, "a", "b")


def test_factors_that_are_no_floats(place, capsys):
    change(place / "b", "base_model.model.layers.0.q_proj.lora_A.weight", lambda t: t.int())
    assert "lora_A is stored as I32; factors are read as" in refused(capsys, "merge", "a", "b", "--dry-run")


def test_adapters_without_lora(place, capsys):
    folder = adapter(place / "c")
    save_file({"base_model.model.head.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    assert "no adapter has a LoRA tensor" in merge(capsys, "c", "x=c")


@pytest.mark.parametrize("words", [("bake", "a"), ("merge", "dora")])
def test_base_without_tensors(place, capsys, words):
    tensors = load_file(adapter(place / "dora", use_dora=True) / "adapter_model.safetensors")
    magnitudes = {f"base_model.model.{module}.lora_magnitude_vector": torch.ones(8) for module in MODULES}
    save_file({**tensors, **magnitudes}, place / "dora" / "adapter_model.safetensors")
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text("{}")
    save_file({}, place / "base" / "model.safetensors")
    assert "base: model.safetensors of the base model holds no tensors" in refused(
        capsys, *words, "--base-id", "base", "-o", "out"
    )


def test_names_of_a_million_letters(place, capsys):
    for names in ("target_modules", "modules_to_save"):
        adapter(place / names, **{names: ["n" * 10**6]})
        assert exit_code("merge", "a", names, "-o", f"out-{names}") == 0
    assert 0 < len(capsys.readouterr().err) < 10_000


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("lm_head.weight", torch.zeros(0), "1 tensors have no values: 'base_model.model.lm_head.weight'"),
        ("embed.token_adapter.trainable_tokens_delta", torch.ones(4), "is [4]; token rows are (tokens, width)"),
        ("embed.token_adapter.trainable_tokens_delta", torch.tensor(1.0), "is []; token rows are (tokens, width)"),
    ],
)
def test_full_tensors_without_values_or_with_another_form(place, capsys, name, tensor, words):
    file = adapter(place / "c") / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{name}": tensor}, file)
    assert words in merge(capsys, "a", "c")
